"""Whatever is done to them, in whatever order, the stores answer the same and hold the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.understudy.test_store_cache import VECTOR, make_entry
from understudy.progress import Progress
from understudy.records import Chunk, Document
from understudy.store import Store, open_store
from understudy.store.copying import Digest, digest_store

Made = tuple[Document, list[Chunk]]
TENANTS, PLACES, TEXTS = ("a", "b"), ("x.txt", "y.txt"), ("one two three", "four five six")


@pytest.fixture(scope="module")
def stores(local_mongodb: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Store]]:
    root = tmp_path_factory.mktemp("alike")
    opened = [open_store(url, root) for url in ("sqlite:///store.db", f"{local_mongodb.url}/alike")]
    yield opened
    for store in opened:
        store.close()


def _made(tenant: str, place: str, text: str) -> Made:
    """A document at a place; the same text at two places is the same document."""
    document = Document(
        id=Document.make_id(tenant, text.encode()), source_key=f"/{place}", source=place, title="", media_type="text/plain", pages=1, text=text,
        page_starts=[0], ingested_at=0.0, tenant=tenant,
    )  # fmt: skip
    spans = [(start, start + len(word)) for word in text.split() if (start := text.index(word)) >= 0]
    chunks = [
        Chunk(id=Chunk.make_id(document.id, "c", a, b), document_id=document.id, document=place, text=text[a:b], start=a, end=b, pages=[1], ordinal=n,
              tenant=tenant)
        for n, (a, b) in enumerate(spans)
    ]  # fmt: skip
    return document, chunks


def _whole(made: Made) -> Chunk:
    """A chunk of another chunker: the document in one piece."""
    document, chunks = made
    return chunks[0].model_copy(update={"id": Chunk.make_id(document.id, "w", 0, len(document.text)), "text": document.text, "ordinal": 9})


def _windows(chunks: list[Chunk], count: int) -> dict[str, np.ndarray]:
    return {chunk.id: np.full((count, 3), count, np.float32) for chunk in chunks}


OPERATIONS: dict[str, Callable[[Store, Made], object]] = {
    "add": lambda store, made: store.add_document(*made),
    "add half": lambda store, made: store.add_document(made[0], made[1][:1]),
    "remove": lambda store, made: store.remove_document(made[0].id),
    "add chunks": lambda store, made: store.add_chunks([*made[1], _whole(made)]),
    "remove chunks": lambda store, made: store.remove_chunks([chunk.id for chunk in made[1][1:]]),
    "embed": lambda store, made: store.put_embeddings("e", _windows(made[1], 1)),
    "embed in windows": lambda store, made: store.put_embeddings("e", _windows(made[1][:2], 2)),
    "cache": lambda store, made: store.put_cache_entry(make_entry(made[1][0], tenant=made[0].tenant, scope=made[0].tenant), "e", VECTOR),
    "hit": lambda store, made: [store.count_cache_hit(entry.id, 5.0) for entry in store.cache_entries(made[0].tenant)],
    "trim": lambda store, made: store.trim_cache(made[0].tenant, 0, 0.0),
}


def _seen(store: Store, made: Made) -> tuple[object, ...]:
    ids = [chunk.id for chunk in (*made[1], _whole(made))]
    vectors = {chunk_id: vector.tolist() for chunk_id, vector in store.embeddings("e", ids).items()}
    return store.document(made[0].id), store.chunks_by_id(ids), vectors, store.cache_vectors(made[0].tenant, made[0].tenant, "e")[0]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.sampled_from(TENANTS), st.sampled_from(PLACES), st.sampled_from(TEXTS)), min_size=4, max_size=14)
)
def test_both_stores_answer_and_hold_the_same(stores: list[Store], steps: list[tuple[str, str, str, str]]) -> None:
    for store in stores:
        for tenant in TENANTS:
            for document_id in store.document_ids(tenant):
                store.remove_document(document_id)
    for operation, *place in steps:
        made = _made(*place)
        answers = [OPERATIONS[operation](store, made) for store in stores]
        assert answers[0] == answers[1], operation
        assert _seen(stores[0], made) == _seen(stores[1], made), operation
    assert digest_store(stores[0], Progress) == digest_store(stores[1], Progress)
    assert stores[0].tenants() == stores[1].tenants()


@given(st.lists(st.lists(st.text(max_size=3), max_size=3), max_size=6), st.randoms())
def test_a_digest_is_of_a_set_of_records_and_of_their_parts(records: list[list[str]], random: Any) -> None:
    def digest(rows: list[list[str]]) -> dict[str, object]:
        made = Digest()
        for row in rows:
            made.add(*row)
        return made.result()

    shuffled = random.sample(records, len(records))
    assert digest(records) == digest(shuffled)
    joined = [["".join(row)] for row in records]
    assert (digest(records) == digest(joined)) == (sorted(records) == sorted(joined))
