"""Import straight from a MongoDB collection, on a server of the real protocol that holds what langchain-mongodb wrote."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import json_util

from rag.foreign import collection_rows, detect_format, is_collection, read_call
from understudy.errors import StorageError, UsageError

DATA = Path(__file__).parent / "data"


def with_collection(url: str, name: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}collection={name}"


@pytest.mark.parametrize("file", ["langchain-cache.jsonl", "langchain-semantic-cache.jsonl"])
def test_a_cache_collection_is_read_as_its_export_is(mongodb_url: str, file: str) -> None:
    name = file.removesuffix(".jsonl")
    exported = [json_util.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    with pymongo.MongoClient[dict[str, Any]](mongodb_url) as client:
        client.get_default_database()[name].insert_many(exported)
    rows = list(collection_rows(with_collection(mongodb_url, name)))
    assert [number for number, _ in rows] == list(range(1, 14))
    assert detect_format(rows[0][1]) == "langchain-cache"
    calls = [read_call(row, number, "langchain-cache") for number, row in rows]
    assert calls == [read_call(row, number, "langchain-cache") for number, row in enumerate(exported, 1)]
    assert calls[1].text == "The kiln is fired on Tuesdays at seven in the morning."
    assert calls[1].asked_at == exported[1]["_id"].generation_time.timestamp()


def test_what_is_not_there_is_said(mongodb_url: str) -> None:
    server = mongodb_url.rpartition("/")[0]
    for url, cause in [
        (mongodb_url, "names no collection"),
        (with_collection(mongodb_url, "missing"), "no collection missing"),
        (f"{server}/?collection=c", "names no database"),
        ("mongodb://user:pa/ss@host/db?collection=c", "is not one"),
    ]:
        with pytest.raises(UsageError, match=cause):
            list(collection_rows(url))


def test_no_error_shows_a_password() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"mongodb://ada:hunter2@127.0.0.1:{closed.getsockname()[1]}/db?serverSelectionTimeoutMS=200&collection=c"
        assert is_collection(url)
        with pytest.raises(StorageError) as caught:
            list(collection_rows(url))
    assert "hunter2" not in caught.value.message + caught.value.remedy
