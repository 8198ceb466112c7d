"""Which files are taken, what is kept of them, and what becomes of updates, duplicates, removals."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rag.chunk import Chunker
from rag.documents import Intake, find_documents, take_in
from rag.ingest import remove_documents
from rag.load import find_files
from rag.metadata import Metadata, from_arguments, moment
from rag.parse import VERSION
from rag.watch import gone_from
from tests.conftest import EMBEDDER, MODELS
from understudy.adapters import AdapterManifest
from understudy.cli import main
from understudy.errors import NotFoundError, UsageError
from understudy.progress import show_progress
from understudy.workspace import Workspace, create_workspace

Take = Callable[..., Intake]


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = create_workspace(str(tmp_path / "workspace"), "ingest: {parse_processes: 1}\n")
    yield made
    made.store.close()


@pytest.fixture
def take(workspace: Workspace) -> Take:
    """Ingest without embedding."""
    chunker = Chunker(MODELS / EMBEDDER / "tokenizer.json", 64, 0)
    return lambda *files, given=None: take_in(workspace, list(files), chunker, "e", given or Metadata(), show_progress)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_what_a_folder_or_glob_finds_stays_inside_it(tmp_path: Path) -> None:
    inside, secret = tmp_path / "in", write(tmp_path / "out" / "secret.txt", "secret")
    for name in ("b.txt", "a.pdf", "deep/c.md", ".hidden/d.txt", "deep/.e.txt", "f.png", "a.pdf.meta.yaml"):
        write(inside / name, "public")
    (inside / "link.txt").symlink_to(secret)
    (inside / "up.txt").symlink_to("../out/secret.txt")
    (inside / "deep" / "folder").symlink_to(secret.parent)
    (inside / "loop").symlink_to(inside)
    os.mkfifo(inside / "pipe.txt")
    names = {str(f.relative_to(inside)) for f in find_files([inside])}
    assert names == {"a.pdf", "b.txt", "deep/c.md"}
    assert {f.name for f in find_files([f"{inside}/**/*.txt"])} == {"b.txt"}
    assert find_files([f"{inside}/*.txt", inside / "b.txt"]) == [inside / "b.txt"]
    assert find_files([inside / "link.txt"]) == [inside / "link.txt"]  # named outright
    with pytest.raises(UsageError, match="leaves its own folder"):
        find_files([f"{inside}/*/../../out/*.txt"])
    with pytest.raises(NotFoundError, match="nothing matches"):
        find_files([f"{inside}/*.docx"])
    with pytest.raises(NotFoundError, match="does not exist"):
        find_files([tmp_path / "missing"])
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        find_files([inside / "pipe.txt"])


def test_a_list_comes_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / name, "text") for name in ("a.txt", "b c.txt")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, [*files, files[0], ""]))))
    assert find_files(["-"]) == files


def test_files_parsed_side_by_side_come_in_their_order(workspace: Workspace, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n:02}.txt", f"File number {n}.") for n in range(12)]
    (tmp_path / "05.txt").write_bytes(b"\xff\xfe\xfd")
    limits = workspace.config.ingest.model_copy(update={"parse_processes": 3})
    several = Workspace(workspace.root, workspace.config.model_copy(update={"ingest": limits}), {})
    intake = take_in(several, files, Chunker(MODELS / EMBEDDER / "tokenizer.json", 64, 0), "e", Metadata(), show_progress)
    assert (intake.added, [row["source"] for row in intake.quarantined]) == (11, [str(files[5])])
    several.store.close()


def test_unchanged_files_are_not_parsed_again(take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", "The kiln is fired on Tuesdays.")
    assert take(file).added == 1
    monkeypatch.setattr("rag.documents.load_documents", lambda *_: pytest.fail("parsed again"))
    again = take(file)
    assert (again.unchanged, again.chunks_added, again.pages) == (1, 0, 1)


def test_another_parser_version_reads_files_again(take: Take, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", "The kiln is fired on Tuesdays.")
    take(file)
    before = workspace.store.chunks("default")
    monkeypatch.setattr("rag.documents.VERSION", VERSION + "x")
    assert take(file).updated == 1
    after = workspace.store.chunks("default")
    assert (len(after), after[0].text) == (1, before[0].text)
    assert after[0].id != before[0].id


def test_metadata_from_arguments_and_sidecar(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    import numpy as np

    file = write(tmp_path / "fees.txt", "Fees are due on Mondays.")
    write(tmp_path / "fees.txt.meta.yaml", "title: Fee table\ntags: harbour\nvalid_until: 2026-03-31\n")
    take(file, given=from_arguments(tags=["law"], valid_from="2026-01-01", boost=2.0))
    (document,) = workspace.store.documents("default")
    assert (document.title, document.tags, document.boost) == ("Fee table", ["law", "harbour"], 2.0)
    assert (document.valid_from, document.valid_until) == (1767225600.0, 1774828800.0 + 2 * 86400)  # through the last day
    assert document.is_stale(document.valid_until)
    assert not document.is_stale(document.valid_until - 1)
    (chunk,) = workspace.store.chunks("default")
    workspace.store.put_embeddings("e", {chunk.id: np.ones((1, 4), np.float32)})
    write(tmp_path / "fees.txt.meta.yaml", "tags: [harbour]\n")
    assert take(file).updated == 1
    (document,) = workspace.store.documents("default")
    assert (document.tags, document.boost, document.valid_until) == (["law", "harbour"], 2.0, None)  # what the command line said stays
    assert take(file, given=from_arguments(tags=["new"])).updated == 1
    (document,) = workspace.store.documents("default")
    assert (document.tags, document.boost) == (["new", "harbour"], 1.0)
    assert take(file).unchanged == 1
    assert chunk.id in workspace.store.embeddings("e", [chunk.id])  # its text is the same, so its vectors stay


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("tag: a", "tag: Extra inputs"),
        ("boost: -1", "boost"),
        ("valid_from: soon", "valid_from"),
        ("- a\n- b", "metadata"),
        ("a: [", "not YAML"),
        ("!!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_sidecar_that_cannot_be_understood_quarantines_its_file(take: Take, tmp_path: Path, content: str, reason: str) -> None:
    file = write(tmp_path / "a.txt", "Text.")
    write(tmp_path / "a.txt.meta.yaml", content)
    (row,) = take(file, write(tmp_path / "b.txt", "Other text.")).quarantined
    assert row["reason"].startswith("a.txt.meta.yaml")
    assert reason in row["reason"]


def test_moments() -> None:
    assert moment("2026-03-31T12:00:00+02:00", end_of_day=True) == 1774951200.0
    assert moment(12.5, end_of_day=False) == 12.5
    for wrong in ("someday", True, float("nan"), [1]):
        with pytest.raises(ValueError, match=r"."):
            moment(wrong, end_of_day=False)
    with pytest.raises(UsageError, match="boost"):
        from_arguments(boost=0)


def test_the_same_bytes_twice_are_one_document_and_a_moved_file_is_an_update(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, "The same words.") for name in ("a.txt", "b.txt"))
    for _ in range(2):
        intake = take(first, second)
        assert [(row["source"], row["of"]) for row in intake.duplicates] == [(str(second), "a.txt")]
        assert [d.source for d in workspace.store.documents("default")] == ["a.txt"]
    moved = first.rename(tmp_path / "c.txt")
    second.unlink()
    assert take(moved).updated == 1
    assert [(d.source, d.source_key) for d in workspace.store.documents("default")] == [("c.txt", str(moved))]


def test_files_that_trade_contents_keep_both(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", "Red words."), write(tmp_path / "b.txt", "Blue words.")
    take(first, second)
    first.write_text("Blue words.")
    second.write_text("Red words.")
    take(first, second)
    assert {(d.source, d.text) for d in workspace.store.documents("default")} == {("a.txt", "Blue words."), ("b.txt", "Red words.")}


def test_rows_of_a_jsonl_file_come_change_and_go(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    def rows(**texts: str) -> Path:
        return write(tmp_path / "rows.jsonl", "\n".join(json.dumps({"id": key, "text": text, "metadata": {"tags": ["t"]}}) for key, text in texts.items()))

    assert take(rows(a="Red words.", b="Blue words.")).added == 2
    assert take(rows(a="Red words.", b="Blue words.")).unchanged == 2
    intake = take(rows(a="Green words.", c="White words."))
    assert (intake.updated, intake.added) == (1, 1)
    found = {d.source: (d.text, d.tags) for d in workspace.store.documents("default")}
    assert found == {"rows.jsonl#a": ("Green words.", ["t"]), "rows.jsonl#c": ("White words.", ["t"])}


def test_names_with_signs_are_names(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    files = [write(tmp_path / name, f"Words of {name}.") for name in ("a#b.txt", "c [1].txt")]
    rows = write(tmp_path / "r#s.jsonl", json.dumps({"id": "http://x//y#z", "text": "Row."}))
    assert take(*files, rows).added == 3
    assert take(*files, rows).unchanged == 3
    assert gone_from(workspace, tmp_path) == []
    assert find_files([tmp_path / "c [1].txt"]) == [tmp_path / "c [1].txt"]
    assert [d.source for d in find_documents(workspace, str(rows))] == ["r#s.jsonl#http://x//y#z"]


def test_a_file_that_vanishes_is_quarantined(take: Take, tmp_path: Path) -> None:
    kept = write(tmp_path / "b.txt", "Words.")
    (row,) = take(tmp_path / "a.txt", kept).quarantined
    assert "No such file" in row["reason"]


def test_pages_without_text_are_named(take: Take, tmp_path: Path) -> None:
    from tests.rag.pdfs import Pdf, Text

    pdf = Pdf()
    pdf.page(Text(72, 700, "Words."))
    pdf.page(drawing="100 100 200 200 re f")
    (tmp_path / "scan.pdf").write_bytes(pdf.write())
    assert take(tmp_path / "scan.pdf").without_text == [{"source": "scan.pdf", "pages": [2]}]


def adapter_of(workspace: Workspace, document_id: str) -> None:
    manifest = AdapterManifest(
        name="tiny", digest="d" * 64, base="b", base_digest="", served_base_digest="", quantisation="none", tokenizer_digest="", chat_template_digest="",
        prompt_version="", dataset_digest="", recipe={}, seed=0, rank=1, alpha=1, targets=[], packages={}, metrics={}, tenants=[],
        group_ids=[f"{document_id}#Scope"], question_digests=[], created_at=0.0,
    )  # fmt: skip
    write(workspace.adapters / "tiny" / manifest.digest / "manifest.json", manifest.model_dump_json())
    write(workspace.datasets / "abc" / "dataset.json", json.dumps({"document_ids": [document_id]}))


def test_a_removed_document_lists_what_was_learnt_and_a_purge_leaves_no_byte(take: Take, workspace: Workspace, tmp_path: Path) -> None:
    take(write(tmp_path / "a.txt", "The password of the vault is xyzzy-4711."))
    (document,) = workspace.store.documents("default")
    adapter_of(workspace, document.id)
    write(workspace.models / "ours" / "manifest.json", json.dumps({"group_ids": [document.id]}))
    (workspace.models / EMBEDDER).symlink_to((MODELS / EMBEDDER).resolve())
    with pytest.raises(NotFoundError):
        remove_documents(workspace, [document.id[:5]])  # too short to be meant
    result = remove_documents(workspace, ["a.txt"], purge=True)
    assert result["learnt"] == {"adapters": [f"tiny@{'d' * 12}"], "embedders": ["ours"], "unknown": [], "datasets": ["abc"], "traces": 0}
    assert not any(b"xyzzy" in file.read_bytes() for file in workspace.root.rglob("*") if file.is_file())


def test_documents_ls_and_show_escape_what_names_hold(take: Take, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[31m<b>red</b>\x07"
    file = write(tmp_path / f"{hostile.replace('/', '')}.txt", f"{hostile} words.")
    take(file, given=Metadata(tags=[hostile], title=hostile, valid_until=time.time() - 1))
    assert main(["--workspace", str(workspace.root), "documents", "ls"]) == 0
    assert main(["--workspace", str(workspace.root), "documents", "show", workspace.store.documents("default")[0].id[:8]]) == 0
    printed = capsys.readouterr().out
    assert "STALE" in printed
    assert "\x1b" not in printed and "\x07" not in printed
    assert main(["--workspace", str(workspace.root), "documents", "ls", "--json", "--tag", hostile]) == 0
    (row,) = json.loads(capsys.readouterr().out)["documents"]
    assert (row["chunks"], row["stale"], row["tags"]) == (1, True, [hostile])
