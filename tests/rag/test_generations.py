"""Index generations: built beside the live one, switched at once, kept by name, and free of what was deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rag.reindex
from rag.generations import live_generation, snapshot, snapshots
from rag.index import open_index
from rag.ingest import remove_documents
from rag.reindex import Reindexed, restore_snapshot
from rag.retrieve import open_retriever
from tests.rag.conftest import configured, index
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.progress import show_progress
from understudy.records import Chunk, Document
from understudy.workspace import Workspace

Put = Callable[..., Reindexed]
KETTLES = {"kettles.txt": ["Copper kettles are polished with vinegar.", "Iron kettles are dried by the fire."]}
BOATS = {"boats.txt": ["Boats are tarred in spring by the xylographer."]}
LONG = {"long.txt": [" ".join(f"Rule {i} says that desk {i} is cleaned on day {i}." for i in range(30))]}


def found(workspace: Workspace, query: str, k: int = 5) -> list[str]:
    return [passage.chunk.text for passage in open_retriever(workspace).search([query], k)]


def restore(workspace: Workspace, name: str) -> dict[str, object]:
    return restore_snapshot(workspace, rag.reindex.open_embedder(workspace), name, show_progress)


def test_another_precision_is_another_embedder_and_is_refused_until_rebuilt(corpus_workspace: Workspace, put: Put) -> None:
    first = put(corpus_workspace, KETTLES, "default")
    other = configured(
        corpus_workspace, "models.embedder_precision=" + ("bfloat16" if open_retriever(corpus_workspace).embedder.precision == "float32" else "float32")
    )
    with pytest.raises(StorageError, match="another embedding model") as caught:
        open_retriever(other)
    assert "index rebuild" in caught.value.remedy
    rebuilt = index(other, "default", f"models.embedder_precision={other.config.models.embedder_precision}")
    assert (rebuilt.embedded, rebuilt.generation != first.generation) == (2, True)
    retriever = open_retriever(other)
    kept = other.store.embeddings(retriever.embedder.fingerprint, retriever.facts.chunk_ids)
    np.testing.assert_array_equal(retriever.searcher.vectors, np.concatenate([kept[chunk_id] for chunk_id in retriever.facts.chunk_ids]))  # type: ignore[attr-defined]


def test_other_chunk_settings_are_refused_until_rebuilt_from_the_store(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, LONG)
    smaller = configured(corpus_workspace, "ingest.chunk_tokens=32")
    before = {chunk.id for chunk in smaller.store.chunks("default")}
    with pytest.raises(StorageError, match="other chunk settings") as caught:
        open_retriever(smaller)
    assert "index rebuild" in caught.value.remedy
    done = index(corpus_workspace, "default", "ingest.chunk_tokens=32")
    after = {chunk.id for chunk in smaller.store.chunks("default")}
    assert done.removed == len(before - after) == 1
    assert len(after) == done.chunks > 5
    assert "desk 7" in found(smaller, "when is desk 7 cleaned?", 1)[0]


def test_a_rebuild_killed_at_any_write_goes_on_and_queries_go_on_meanwhile(corpus_workspace: Workspace, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(Exception):
        pass

    put(corpus_workspace, LONG | KETTLES)
    whole = corpus_workspace.root.with_name("whole")
    shutil.copytree(corpus_workspace.root, whole, symlinks=True)
    wanted = index(configured(Workspace(whole, corpus_workspace.config, {})), "default", "ingest.chunk_tokens=32")
    writes = ["add_chunks", "put_embeddings", "build_index", "make_live", "remove_chunks"]
    for name in writes:
        store = corpus_workspace.store.__class__ if hasattr(corpus_workspace.store, name) else rag.reindex
        with monkeypatch.context() as patched:
            patched.setattr(store, name, lambda *_: (_ for _ in ()).throw(KilledError))
            with pytest.raises(KilledError):
                index(corpus_workspace, "default", "ingest.chunk_tokens=32")
        if name != "remove_chunks":  # not switched yet: the old generation answers whole
            assert found(corpus_workspace, "how are copper kettles polished?", 1) == [KETTLES["kettles.txt"][0]]
    assert index(corpus_workspace, "default", "ingest.chunk_tokens=32").generation == wanted.generation
    ordinals = [chunk.ordinal for chunk in corpus_workspace.store.chunks("default") if chunk.document == "long.txt"]
    assert len(ordinals) == len(set(ordinals))


def test_a_document_added_while_the_index_is_built_is_in_it(
    corpus_workspace: Workspace, put: Put, monkeypatch: pytest.MonkeyPatch, make_document: Callable[..., tuple[Document, list[Chunk]]]
) -> None:
    build, calls = rag.reindex.build_index, []

    def build_while_another_ingests(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 1:
            corpus_workspace.store.add_document(*make_document("boats.txt", BOATS["boats.txt"]))
        return build(*args)

    monkeypatch.setattr(rag.reindex, "build_index", build_while_another_ingests)
    put(corpus_workspace, KETTLES)
    assert len(calls) == 2
    assert found(corpus_workspace, "when are boats tarred?", 1) == BOATS["boats.txt"]


def test_equal_texts_are_embedded_once(corpus_workspace: Workspace, put: Put) -> None:
    assert put(corpus_workspace, {"a.txt": ["The same words.", "The same words.", "Others."]}).embedded == 2
    assert put(corpus_workspace, {"b.txt": ["The same words.", "New ones."]}).embedded == 1


def test_a_snapshot_brings_back_what_was_indexed_then(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, KETTLES)
    then = snapshot(corpus_workspace.index, "default", "before-boats")
    put(corpus_workspace, BOATS)
    index(corpus_workspace, "default", "ingest.chunk_tokens=32")  # another chunker, whose chunks stand beside
    with pytest.raises(UsageError, match="already"):
        snapshot(corpus_workspace.index, "default", "before-boats")
    with pytest.raises(UsageError, match="no name"):
        snapshot(corpus_workspace.index, "default", "../up")
    with pytest.raises(StorageError, match="other chunk settings"):
        restore(configured(corpus_workspace, "ingest.chunk_tokens=32"), "before-boats")
    assert restore(corpus_workspace, "before-boats")["generation"] == then == live_generation(corpus_workspace.index, "default")
    assert set(found(corpus_workspace, "when are boats tarred? kettles")) == set(KETTLES["kettles.txt"])
    index(corpus_workspace)
    assert BOATS["boats.txt"][0] in found(corpus_workspace, "when are boats tarred?", 1)
    with pytest.raises(NotFoundError, match="no snapshot"):
        restore(corpus_workspace, "other")


def test_a_removed_document_is_gone_from_every_snapshot_too(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, KETTLES | BOATS)
    snapshot(corpus_workspace.index, "default", "all")
    put(corpus_workspace, BOATS | {"c.txt": ["Clay is dug in autumn."]})
    snapshot(corpus_workspace.index, "default", "more")
    opened = open_retriever(corpus_workspace)
    assert opened.search(["boats tarred xylographer"], 1)[0].chunk.document == "boats.txt"
    (document,) = [d for d in corpus_workspace.store.documents("default") if d.source == "boats.txt"]
    remove_documents(corpus_workspace, [document.id])
    on_disk = b"".join(file.read_bytes() for file in sorted(corpus_workspace.index.rglob("*")) if file.is_file())
    assert b"xylograph" not in on_disk and document.id.encode() not in on_disk
    assert not any(passage.chunk.document == "boats.txt" for passage in opened.search(["boats tarred xylographer"], 5))
    restore(corpus_workspace, "all")
    assert set(found(corpus_workspace, "boats and kettles")) == set(KETTLES["kettles.txt"])
    for document in corpus_workspace.store.documents("default"):
        remove_documents(corpus_workspace, [document.id])
    assert snapshots(corpus_workspace.index, "default") == {}


def test_tenants_never_mix(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, KETTLES | {"plan.txt": ["The red plan is secret."]}, "red")
    put(corpus_workspace, BOATS | {"plan.txt": ["The blue plan is secret."]}, "blue")
    red, blue = configured(corpus_workspace, "tenant=red"), configured(corpus_workspace, "tenant=blue")
    assert {passage.chunk.tenant for passage in open_retriever(red).search(["secret plan boats kettles"], 20)} == {"red"}
    assert found(blue, "secret plan", 1) == ["The blue plan is secret."]
    snapshot(red.index, "red", "mine")
    with pytest.raises(NotFoundError):
        restore(blue, "mine")
    stolen = open_retriever(blue)
    swapped = type(stolen)(**{**vars(open_retriever(red)), "tenant": "blue"})  # an index under the wrong tenant still gives nothing away
    assert swapped.search(["secret plan"], 5) == []


def test_a_flipped_byte_or_a_shortened_file_is_found_at_opening_and_rebuilt(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, KETTLES)
    generation = live_generation(corpus_workspace.index, "default")
    folder = corpus_workspace.index / generation
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        content = bytearray((folder / file).read_bytes())
        for damaged in (content[: len(content) // 2], content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]):
            (folder / file).write_bytes(damaged)
            with pytest.raises(StorageError) as caught:
                open_index(corpus_workspace.index, generation)
            assert "index rebuild" in caught.value.remedy
        (folder / file).write_bytes(content)
    (folder / file).unlink()
    index(corpus_workspace)
    assert "Copper kettles" in found(corpus_workspace, "copper", 1)[0]


def test_an_index_of_an_older_version_is_refused_and_its_documents_are_chunked_anew(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, KETTLES)
    account = corpus_workspace.index / live_generation(corpus_workspace.index, "default") / "index.json"
    account.write_text('{"version": 1, "generation": "g", "embedder": "e", "files": {}}')
    with pytest.raises(StorageError, match="another version") as caught:
        open_retriever(corpus_workspace)
    assert "index rebuild" in caught.value.remedy
    assert index(corpus_workspace).removed == 2  # the paragraphs, which no chunker of ours cut
    assert "Copper kettles" in found(corpus_workspace, "copper", 1)[0]
