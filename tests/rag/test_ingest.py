"""Real PDFs through the real parser, splitter, embedder and index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag.chunk import Chunker
from rag.generations import live_generation
from rag.index import open_index
from rag.ingest import ingest, remove_documents
from rag.load import find_files, join_pages, load_document
from rag.parse import unwrap, without_running_lines
from rag.retrieve import open_retriever
from tests.conftest import SAMPLE
from understudy.config import Ingest
from understudy.errors import DocumentError, NotFoundError, StorageError
from understudy.progress import show_progress
from understudy.records import Document
from understudy.workspace import Workspace

PDF = SAMPLE / "pdf" / "13-public-sector.pdf"


def run(workspace: Workspace, *paths: Path) -> dict:  # type: ignore[type-arg]
    return ingest(workspace, list(paths), show_progress)


def test_pdf_text_is_clean_and_paged() -> None:
    document = load_document(PDF, "default", Ingest())
    assert document.pages == len(document.page_starts) >= 4
    assert document.title.startswith("AI in public bodies")
    assert "page 2 of" not in document.text.lower()
    assert "\u00ad" not in document.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.pdf", b"", "empty"),
        ("text.pdf", b"just words, no PDF", "not a PDF"),
        ("broken.pdf", b"%PDF-1.7\nnonsense", "damaged"),
        ("page.docx", b"PK\x03\x04", "unsupported"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_bad_files_give_their_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=reason):
        load_document(tmp_path / name, "default", Ingest())


def test_an_encrypted_pdf_says_so(tmp_path: Path) -> None:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(PDF))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(DocumentError, match="encrypted"):
        load_document(tmp_path / "locked.pdf", "default", Ingest())


def test_a_parser_that_hangs_is_stopped() -> None:
    with pytest.raises(DocumentError, match="stopped after"):
        load_document(PDF, "default", Ingest(parse_seconds=0.01))


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "out.txt").write_text("secret")
    (inside / "link.txt").symlink_to(tmp_path / "out.txt")
    (inside / "real.txt").write_text("public")
    assert [f.name for f in find_files([inside])] == ["real.txt"]
    with pytest.raises(NotFoundError):
        find_files([tmp_path / "missing"])


def test_running_headers_go_and_paragraphs_stay() -> None:
    bodies = ["Rivers rise.", "Bridges are built.", "Tolls are due.", "Boats return."]
    pages = [["Handbook", body, f"page {n} of 4"] for n, body in enumerate(bodies, 1)]
    assert without_running_lines(pages) == [[body] for body in bodies]
    lines = ["The first sentence of a long paragraph runs on", "and ends here.", "Next paragraph begins and is quite long too, it", "goes on."]
    assert unwrap(lines) == "The first sentence of a long paragraph runs on and ends here.\n\nNext paragraph begins and is quite long too, it goes on."


@settings(max_examples=50)
@given(pages=st.lists(st.text("ab. \n", max_size=20), min_size=1, max_size=5))
def test_pages_start_where_they_are_said_to(pages: list[str]) -> None:
    text, starts = join_pages(pages)
    assert len(starts) == len(pages)
    for page, start in zip(pages, starts, strict=True):
        assert text[start : start + len(page)] == page


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("abc é.\n", min_size=1, max_size=600).filter(str.strip))
def test_chunks_are_slices_that_cover_the_text(corpus_workspace: Workspace, text: str) -> None:
    document = Document(id="d", source_key="k", source="s", title="t", media_type="text/plain", pages=1, text=text, page_starts=[0], ingested_at=0.0)
    chunks = Chunker(corpus_workspace.models / "all-minilm-l6-v2" / "tokenizer.json", 32, 8).chunks(document)
    covered: set[int] = set()
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        covered |= set(range(chunk.start, chunk.end))
    assert all(i in covered for i, character in enumerate(text) if not character.isspace())


def test_a_second_ingest_adds_nothing_and_an_update_replaces(corpus_workspace: Workspace, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The quartz committee meets on the ninth of March in the yellow room.")
    first = run(corpus_workspace, PDF, note)
    again = run(corpus_workspace, PDF, note)
    assert first["documents"]["added"] == 2
    assert again["documents"] == {"added": 0, "updated": 0, "unchanged": 2, "quarantined": []}
    assert (again["chunks"]["added"], again["generation"]) == (0, first["generation"])
    assert "quartz" in open_retriever(corpus_workspace).search(["When does the quartz committee meet?"], 1)[0].chunk.text
    note.write_text("The quartz committee was dissolved.")
    changed = run(corpus_workspace, note)
    assert changed["documents"]["updated"] == 1
    assert changed["generation"] != first["generation"]
    texts = [p.chunk.text for p in open_retriever(corpus_workspace).search(["quartz committee yellow room"], 5)]
    assert not any("yellow room" in text for text in texts)
    for document in corpus_workspace.store.documents("default"):
        remove_documents(corpus_workspace, [document.id])
    with pytest.raises(NotFoundError, match="empty"):
        open_retriever(corpus_workspace)


def test_some_bad_files_are_quarantined_and_all_bad_is_an_error(corpus_workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 broken")
    (tmp_path / "good.txt").write_text("Some good words to keep.")
    result = run(corpus_workspace, tmp_path)
    assert [q["source"].endswith("bad.pdf") for q in result["documents"]["quarantined"]] == [True]
    with pytest.raises(DocumentError):
        run(corpus_workspace, tmp_path / "bad.pdf")
    with pytest.raises(NotFoundError):
        run(corpus_workspace, tmp_path / "nothing-here.pdf")


def test_a_damaged_index_is_found_at_opening_and_rebuilt(corpus_workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A note on copper kettles and their care.")
    run(corpus_workspace, tmp_path / "a.txt")
    generation = live_generation(corpus_workspace.index, "default")
    target = corpus_workspace.index / generation / "vectors.npy"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="damaged") as caught:
        open_index(corpus_workspace.index, generation)
    assert "index rebuild" in caught.value.remedy
    run(corpus_workspace, tmp_path / "a.txt")
    assert open_retriever(corpus_workspace).search(["copper kettles"], 1)
    shutil.rmtree(corpus_workspace.index)
