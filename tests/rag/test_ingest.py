"""Real PDFs through the real parser, splitter, embedder and index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.generations import live_generation
from rag.index import open_index
from rag.ingest import ingest, remove_documents
from rag.load import join_pages, load_document
from rag.retrieve import open_retriever
from tests.conftest import SAMPLE
from understudy.errors import DocumentError, NotFoundError, StorageError
from understudy.progress import show_progress
from understudy.settings.corpus import Ingest
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


@settings(max_examples=50)
@given(pages=st.lists(st.text("ab. \n", max_size=20), min_size=1, max_size=5))
def test_pages_start_where_they_are_said_to(pages: list[str]) -> None:
    text, starts = join_pages(pages, ["\n\n"] * len(pages))
    assert len(starts) == len(pages)
    for page, start in zip(pages, starts, strict=True):
        assert text[start : start + len(page)] == page


def test_a_second_ingest_adds_nothing_and_an_update_replaces(corpus_workspace: Workspace, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The quartz committee meets on the ninth of March in the yellow room.")
    first = run(corpus_workspace, PDF, note)
    again = run(corpus_workspace, PDF, note)
    assert first["documents"]["added"] == 2
    assert again["documents"] == {"added": 0, "updated": 0, "unchanged": 2, "quarantined": [], "duplicates": [], "without_text": []}
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
