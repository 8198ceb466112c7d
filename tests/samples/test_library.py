"""The committed sample library is what it claims to be: its PDFs, its questions, their splits."""

import json
import re
from bisect import bisect_right
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pypdfium2
import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "samples" / "ai-governance"
SPLITS = ("train", "calibration", "held-out")

Row = dict[str, Any]

# The words a question's skeleton keeps; all others are its content.
FUNCTION_WORDS = frozenset(
    """a an the this that these those each every any some all both either neither no not only
    own same such other another more most less least few many much enough i you he she it we
    they me him her us them my your his its our their who whom whose which what when where why
    how whether is are was were be been being am do does did done doing have has had having will
    would shall should can could may might must ought need and or but nor so yet if then else
    than as because since while until unless although though before after once of in on at by
    for with without from to into onto upon over under above below between among through during
    within across against about around per via up down out off there here one ones just also
    even still ever never yes""".split()
)


@cache
def pages_by_document() -> dict[str, list[str]]:
    """Each PDF's pages as text with its white space collapsed."""
    texts = {}
    for path in sorted((LIBRARY / "pdf").glob("*.pdf")):
        with pypdfium2.PdfDocument(path) as pdf:
            texts[path.name] = [collapse(page.get_textpage().get_text_range()) for page in pdf]
    return texts


@cache
def rows_by_split() -> dict[str, list[Row]]:
    """Each split's questions."""
    return {split: read_rows(LIBRARY / "questions" / f"{split}.jsonl") for split in SPLITS}


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows() -> list[Row]:
    return [row for rows in rows_by_split().values() for row in rows]


def is_answerable(row: Row) -> bool:
    return bool(row["type"] != "unanswerable")


def documents(row: Row) -> set[str]:
    """The slugs of the handbooks a question belongs to."""
    names = row["documents"] if is_answerable(row) else [row["document"]]
    return {Path(name).stem for name in names}


def collapse(text: str) -> str:
    return " ".join(text.split())


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9€%'-]+", text.lower())


def skeleton(question: str) -> str:
    """The question with every run of content words masked."""
    masked = " ".join(word if word in FUNCTION_WORDS else "_" for word in words(question))
    return re.sub(r"_( _)+", "_", masked)


def content_stems(question: str) -> frozenset[str]:
    """The content words, cut to six letters so that inflections agree."""
    return frozenset(word[:6] for word in words(question) if word not in FUNCTION_WORDS)


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity of two sets."""
    return len(one & other) / max(1, len(one | other))


def sentence_count(answer: str) -> int:
    return len(re.split(r"[.!?][\"')]*\s+(?=[\"'(]*[A-Z])", answer.strip()))


def window_with(terms: list[str], text: str, size_words: int) -> str | None:
    """The first stretch of so many words of a text that holds every term, if there is one."""
    starts = [0, *(space.end() for space in re.finditer(" ", text))]
    for term in terms:
        for hit in re.finditer(re.escape(term), text):
            first = bisect_right(starts, hit.start()) - 1
            after = first + size_words
            stretch = text[starts[first] : starts[after] if after < len(starts) else None]
            if all(other in stretch for other in terms):
                return stretch
    return None


def test_there_are_enough_documents_and_pages() -> None:
    texts = pages_by_document()
    assert len(texts) >= 6
    assert sum(map(len, texts.values())) >= 45
    assert all(page for pages in texts.values() for page in pages), "a page has no text"


def test_every_pdf_has_its_source() -> None:
    sources = {f"{path.stem}.pdf" for path in (LIBRARY / "sources").glob("*.md")}
    assert sources == set(pages_by_document())


def test_there_are_enough_questions() -> None:
    rows = all_rows()
    assert len(rows) >= 520
    assert sum(not is_answerable(row) for row in rows) >= 120
    assert sum(len(row["quotes"]) == 2 for row in rows) >= 50


@pytest.mark.parametrize(
    ("split", "questions", "unanswerable"),
    [("train", 300, 50), ("calibration", 40, 0), ("held-out", 180, 60)],
)
def test_the_splits_are_large_enough(split: str, questions: int, unanswerable: int) -> None:
    rows = rows_by_split()[split]
    assert len(rows) >= questions
    assert sum(not is_answerable(row) for row in rows) >= unanswerable


def test_ids_and_questions_are_unique() -> None:
    for field in ("id", "question"):
        counts = Counter(row[field] for row in all_rows())
        assert not [value for value, count in counts.items() if count > 1]


def test_every_quote_is_on_its_page() -> None:
    texts = pages_by_document()
    missing = []
    for row in filter(is_answerable, all_rows()):
        assert row["quotes"], row["id"]
        for name, number, quote in zip(row["documents"], row["pages"], row["quotes"], strict=True):
            if collapse(quote) not in texts[name][number - 1]:
                missing.append(f"{row['id']}: not on page {number} of {name}: {quote}")
    assert not missing, "\n".join(missing)


def test_unanswerable_questions_have_no_answer() -> None:
    for row in all_rows():
        if not is_answerable(row):
            assert row["answer"] is None, row["id"]
            assert row["quotes"] == row["documents"] == row["pages"] == [], row["id"]
            assert f"{Path(row['document']).stem}.pdf" in pages_by_document(), row["id"]


def test_what_an_unanswerable_question_needs_is_nowhere() -> None:
    texts = {name: " ".join(pages).lower() for name, pages in pages_by_document().items()}
    found = []
    for row in all_rows():
        if is_answerable(row):
            continue
        assert row["needs"], row["id"]
        terms = [term.lower() for term in row["needs"]]
        for name, text in texts.items():
            if stretch := window_with(terms, text, size_words=60):
                found.append(f"{row['id']}: {terms} in {name}: {stretch}")
    assert not found, "\n".join(found)


def test_answers_are_one_or_two_sentences() -> None:
    rows = filter(is_answerable, all_rows())
    wrong = [row["id"] for row in rows if not row["answer"] or sentence_count(row["answer"]) > 2]
    assert not wrong


def test_no_document_is_on_two_sides() -> None:
    sides = {split: set().union(*map(documents, rows)) for split, rows in rows_by_split().items()}
    for one, other in combinations(SPLITS, 2):
        assert not sides[one] & sides[other], (one, other)


def test_no_question_has_a_near_duplicate_on_another_side() -> None:
    stems = {
        split: [(row["id"], content_stems(row["question"])) for row in rows]
        for split, rows in rows_by_split().items()
    }
    alike = [
        (one_id, other_id)
        for one, other in combinations(SPLITS, 2)
        for one_id, one_stems in stems[one]
        for other_id, other_stems in stems[other]
        if similarity(one_stems, other_stems) >= 0.6
    ]
    assert not alike


def test_no_skeleton_is_used_more_than_three_times() -> None:
    counts = Counter(skeleton(row["question"]) for row in all_rows())
    assert not {form: count for form, count in counts.items() if count > 3}
