"""Chunks are slices that cover the text, fit their tokens, and end where sentences and sections do."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.chunk import Chunker, load_tokenizer
from rag.citations import page_of
from rag.load import join_pages
from tests.conftest import EMBEDDER, MODELS
from understudy.records import Document, Heading

TOKENIZER = MODELS / EMBEDDER / "tokenizer.json"
SENTENCES = [
    "The harbour opens at five.",
    "Fees are due on 3.5 days, e.g. Monday!",
    "Who pays? ",
    "Boats wait",
    "- first point",
    "A | B | 12",
    "\n",
    "\n\n",
    "Ünïcödé 語句。次の文。",
]


@cache
def chunker(tokens: int, overlap: int) -> Chunker:
    return Chunker(TOKENIZER, tokens, overlap)


def document(text: str, headings: list[str] = [], starts: list[int] | None = None) -> Document:  # noqa: B006
    found = [Heading(start=text.index(title), level=title.count("#") or 1, title=title) for title in headings]
    pages = starts or [0]
    return Document(
        id="d", source_key="k", source="s", title="t", media_type="text/plain", pages=len(pages), text=text, page_starts=pages, headings=found, ingested_at=0.0
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    pages=st.lists(st.one_of(st.text("abc é.\n#|-1語", max_size=300), st.lists(st.sampled_from(SENTENCES), max_size=30).map(" ".join)), min_size=1, max_size=4),
    size=st.sampled_from([(32, 0), (32, 8), (64, 32), (2048, 64)]),
)
def test_chunks_are_slices_that_cover_the_text_and_fit(pages: list[str], size: tuple[int, int]) -> None:
    text, starts = join_pages(pages, ["\n\n"] * len(pages))
    chunks = chunker(*size).chunks(document(text, starts=starts))
    covered: set[int] = set()
    for before, chunk in zip([None, *chunks], chunks, strict=False):
        assert text[chunk.start : chunk.end] == chunk.text == chunk.text.strip() != ""
        assert before is None or (before.start < chunk.start and before.end < chunk.end)
        assert len(load(TOKENIZER).encode(chunk.text, add_special_tokens=False)) <= size[0]
        assert chunk.pages == list(range(page_of(chunk.start, starts), page_of(chunk.end - 1, starts) + 1))
        covered |= set(range(chunk.start, chunk.end))
    assert all(i in covered for i, character in enumerate(text) if not character.isspace())
    assert len({chunk.id for chunk in chunks}) == len(chunks)


load = cache(load_tokenizer)


def test_no_sentence_is_cut_that_fits() -> None:
    sentences = [f"Rule {n} says that the boat of member number {n} leaves before noon, cf. Art. {n} of Dr. Berg's list." for n in range(60)]
    text = " ".join(sentences[:30]) + "\n\n" + " ".join(sentences[30:])
    for chunk in chunker(64, 16).chunks(document(text)):
        assert re.fullmatch(r"(Rule \d+ says .*? list\.\s*)+", chunk.text)


def test_a_heading_stays_with_its_text_and_gives_the_path() -> None:
    body = "The boats of members leave before noon and come back in the evening when the light is lit. " * 3
    text = f"# Harbour\n\n{body}\n\n## Fees\n\n{body}\n\n## Light\n\n### Lamp\n\n{body}"
    chunks = chunker(96, 0).chunks(document(text, ["# Harbour", "## Fees", "## Light", "### Lamp"]))
    assert [c.headings for c in chunks] == [["Harbour"], ["Harbour", "Fees"], ["Harbour", "Light", "Lamp"]]
    assert all(c.text.startswith("#") and c.text.endswith("lit.") for c in chunks)


def test_rows_and_items_are_not_cut() -> None:
    rows = "\n".join(f"Class {n} | The meaning of the class is number {n} | Within {n} hours" for n in range(40))
    for chunk in chunker(64, 0).chunks(document(rows)):
        assert all(re.fullmatch(r"Class \d+ \| .* hours", line) for line in chunk.text.split("\n"))


def test_overlap_is_whole_sentences() -> None:
    text = " ".join(f"Short rule number {n}." for n in range(100))
    chunks = chunker(48, 16).chunks(document(text))
    for before, chunk in pairwise(chunks):
        shared = text[chunk.start : before.end]
        assert shared.endswith(".")
        assert 0 < len(load(TOKENIZER).encode(shared, add_special_tokens=False)) <= 16


@pytest.mark.parametrize("text", ["word " * 3000, "x" * 50_000, "\n".join("1." for _ in range(3000)), "语" * 3000])
def test_text_without_sentences_is_cut_evenly(text: str) -> None:
    chunks = chunker(256, 0).chunks(document(text))
    sizes = [len(load(TOKENIZER).encode(c.text, add_special_tokens=False)) for c in chunks]
    assert max(sizes) <= 256
    assert max(len(c.text) for c in chunks) <= 256 * 32
    assert len(chunks) <= 1.4 * max(sum(sizes) / 256, len(text) / 256 / 32) + 1


def test_another_parser_makes_other_ids() -> None:
    text = "One sentence of a text."
    ids = {chunker(64, 0).chunks(document(text).model_copy(update={"parser": parser}))[0].id for parser in ("parse-1", "parse-2")}
    assert len(ids) == 2
