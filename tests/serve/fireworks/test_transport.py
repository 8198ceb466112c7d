"""Bounded, honest retries; a key goes to its host only; odd answers are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.fireworks.api import Account, Api, account_of, open_api
from serve.fireworks.datasets import upload
from serve.fireworks.making import Hosted
from serve.fireworks.requests import DataFile
from serve.fireworks.wire import ApiError
from tests.serve.fireworks import faults
from tests.serve.fireworks.conftest import HASTY
from tests.serve.fireworks.server import ACCOUNT, KEY, FireworksServer, Handler
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.workspace import create_workspace


def test_retry_after_is_honoured(hosted: Hosted, server: FireworksServer, file: DataFile, pauses: list[float]) -> None:
    server.faults = [("GET", faults.status(429, Retry_After="30"))]
    upload(hosted, file, "d1")
    assert 30 <= pauses[0] <= 33
    server.faults = [("GET", faults.status(429, Retry_After="3600"))]
    with pytest.raises(ApiError, match="429"):
        upload(hosted, file, "d1")


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"\xff", b"[" * 100_000, b"x" * (17 << 20)], ids=["html", "list", "no text", "deep", "long"])
def test_an_answer_that_is_none_is_an_error(hosted: Hosted, server: FireworksServer, file: DataFile, answer: bytes) -> None:
    def odd(handler: Handler) -> bool:
        handler.send(200, answer)
        return True

    server.faults = [("GET", odd)]
    with pytest.raises(ApiError, match=r"not JSON|JSON object|longer than"):
        upload(hosted, file, "d1")


def test_a_redirect_is_not_followed(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("GET", faults.status(307, Location=f"{server.url}/bucket/trap"))]
    with pytest.raises(ApiError, match="a redirect, which is not followed"):
        upload(hosted, file, "d1")
    assert not server.leaks


def test_a_key_in_an_answer_is_blotted_out(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("GET", faults.status(400, f"bad key {KEY}"))]
    with pytest.raises(ApiError) as caught:
        upload(hosted, file, "d1")
    assert KEY not in f"{caught.value.message} {caught.value.__cause__} {caught.value.__context__}"


def test_a_damaged_ledger_is_refused(hosted: Hosted, file: DataFile) -> None:
    upload(hosted, file, "d1")
    (hosted.ledger.folder / f"{ACCOUNT}.json").write_text('[{"kind": "moons"}]')
    with pytest.raises(StorageError, match="is not a list of resources"):
        upload(hosted, file, "d1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("offline: true\nfireworks: {account: acme}", "this workspace is offline"),
        ("", "account is not set"),
        ("fireworks: {account: acme, url: 'http://192.0.2.1'}", "not encrypted"),
        ("fireworks: {account: acme}", "no key for Fireworks"),
    ],
)
def test_it_is_refused_before_any_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, message: str) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    made = create_workspace(str(tmp_path / "w"), settings)
    with pytest.raises((UsageError, NotFoundError), match=message):
        open_api(made.config)


def test_an_account_is_an_id(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fireworks\.account"):
        create_workspace(str(tmp_path / "w"), "fireworks: {account: '../x'}")
    assert account_of(create_workspace(str(tmp_path / "v"), "fireworks: {account: acme}").config).id == "acme"


def test_a_signed_url_without_encryption_is_refused(tmp_path: Path) -> None:
    with Api(Account("https://api.example.invalid", ACCOUNT, "K"), KEY, HASTY) as api, pytest.raises(ApiError, match="without encryption"):
        api.fetch_file("http://192.0.2.1/adapter", tmp_path / "x")
