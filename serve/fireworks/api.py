"""Fireworks' management API over HTTP: bounded retries, bounded replies, files sent and fetched in pieces.

The key goes to the configured host only: redirects are not followed, and signed URLs are used by a client that does not know it.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from serve.fireworks.requests import Kind, Request, address, get
from serve.fireworks.wire import REMEDIES, Answer, ApiError, Watched, detail_of, target_host
from understudy.client import CONNECT_SECONDS, LONGEST_MESSAGE
from understudy.config import Config
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import sync_file, sync_folder
from understudy.patience import Patience, pause_before, seconds_asked
from understudy.progress import Progress

PATIENCE = Patience(seconds=60, attempts=8)  # a minute of trouble is waited out
FILE_SECONDS = 600.0  # of silence while a file goes over
LONGEST_REPLY = 16 * 2**20  # bytes of JSON
LARGEST_FILE = 16 * 2**30  # bytes of a fetched file
EXISTS, UNKNOWN = 409, 404
LOOPBACK = ("127.0.0.1", "localhost", "::1")


T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """Whose resources, and where."""

    base: str
    id: str
    key_variable: str


def account_of(config: Config) -> Account:
    """The configured account; raises UsageError where there is none, or where its key would travel in the clear."""
    settings = config.fireworks
    if not settings.account:
        raise UsageError("fireworks.account is not set", "set it in understudy.yaml to your account's id at Fireworks (`accounts/ID`)")
    check_address(settings.url)
    return Account(settings.url, settings.account, settings.api_key_env)


def check_address(url: str) -> None:
    """Raise UsageError for a URL without encryption that leaves this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise UsageError(f"{parts.scheme}://{parts.hostname} is not encrypted", "use an https URL")


def open_api(config: Config) -> Api:
    """The API of the configured account.

    Raises UsageError where the workspace is offline or names no account, NotFoundError without a key; opens no connection.
    """
    if config.offline:
        raise UsageError("Fireworks is a remote, and this workspace is offline", "train here with `understudy train`, or set offline: false")
    account = account_of(config)
    key = os.environ.get(account.key_variable, "")
    if not key:
        raise NotFoundError("no key for Fireworks", f"set the environment variable {account.key_variable}")
    return Api(account, key)


@cache
def trust() -> ssl.SSLContext:
    """The certificates that are trusted, read once."""
    return httpx2.create_ssl_context()


class Api:
    """One account's management API. Use as a context manager."""

    def __init__(self, account: Account, key: str, patience: Patience = PATIENCE, sleep: Callable[[float], None] = time.sleep) -> None:
        self.account, self.patience, self._key, self.sleep = account, patience, key, sleep
        shared: dict[str, Any] = {
            "follow_redirects": False,
            "verify": trust(),
            "headers": {"User-Agent": "understudy", "Accept-Encoding": "identity"},
        }
        limits = httpx2.Timeout(patience.seconds, connect=CONNECT_SECONDS)
        self._http = httpx2.Client(timeout=limits, **shared)
        self._files = httpx2.Client(timeout=httpx2.Timeout(FILE_SECONDS, connect=CONNECT_SECONDS), **shared)  # carries no key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()
        self._files.close()

    def call(self, request: Request, progress: Progress | None = None) -> dict[str, Any]:
        """The JSON object that answers a request. Asked again after 429, 5xx and broken connections, where it may be repeated; raises ApiError."""

        def once() -> dict[str, Any]:
            url = address(self.account.base, self.account.id, request)
            headers = {"Authorization": f"Bearer {self._key}"}
            if request.file is None:
                return self._json(self._http, request.method, url, headers, json=request.body)
            with Watched(request.file, progress) as file:
                return self._json(self._files, request.method, url, headers, files={"file": (request.file.name, file, "application/jsonl")})

        return self._patiently(once, may_repeat=request.may_repeat)

    def find(self, kind: Kind, identity: str) -> dict[str, Any] | None:
        """A resource, or None where there is none of that id."""
        try:
            return self.call(get(kind, identity))
        except ApiError as error:
            if error.status == UNKNOWN:
                return None
            raise

    def put_file(self, url: str, path: Path, progress: Progress | None = None) -> None:
        """Send a file to a signed URL; raises ApiError."""
        self._check_signed(url)
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "x-goog-content-length-range": f"{size},{size}", "Content-Length": str(size)}

        def once() -> dict[str, Any]:
            with Watched(path, progress) as file:
                return self._json(self._files, "PUT", url, headers, content=file)

        self._patiently(once)

    def fetch_file(self, url: str, target: Path, progress: Progress | None = None) -> None:
        """Bring a signed URL's file; what an earlier run brought of it is gone on from. Raises ApiError, StorageError."""
        self._check_signed(url)
        partial = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._patiently(lambda: self._fetch(url, partial, progress))
            sync_file(partial)
            partial.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}", "free space, then run the command again: it goes on") from error

    def _fetch(self, url: str, partial: Path, progress: Progress | None) -> None:
        held = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={held}-"} if held else {}
        with self._answer(self._files, "GET", url, headers) as response:
            if response.status_code == 416:  # nothing is left to bring, or the file is another
                partial.unlink()
                raise ApiError("the file there is no longer the one that was begun", "run the command again", status=500)
            self._check(response)
            if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
                raise ApiError(
                    f"{target_host(url)} sends another part of the file than was asked for", f"remove {partial}, then run the command again", status=400
                )
            held = held if response.status_code == 206 else 0
            stated = response.headers.get("Content-Length", "")
            if not stated.isdigit() or held + int(stated) > LARGEST_FILE:
                raise ApiError(
                    f"{target_host(url)} sends a file without a length, or one over {LARGEST_FILE >> 30} GiB", "see the model at Fireworks", status=400
                )
            if progress is not None:
                progress.total = held + int(stated)
                progress.advance(held - progress.done)
            with partial.open("ab" if held else "wb") as file:
                for piece in response.iter_raw():
                    file.write(piece)
                    if progress is not None:
                        progress.advance(len(piece))
            if partial.stat().st_size != held + int(stated):
                raise ApiError(f"{target_host(url)} broke off", "run the command again: it goes on")

    def _check_signed(self, url: str) -> None:
        """A signed URL is encrypted, unless the API itself is on this machine."""
        if urlsplit(self.account.base).hostname not in LOOPBACK and urlsplit(url).scheme != "https":
            raise ApiError("Fireworks named a URL without encryption for a file", "nothing was sent; ask Fireworks' support", status=400)

    def _patiently(self, once: Callable[[], T], may_repeat: bool = True) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                return once()
            except ApiError as error:
                fault = ApiError(self._clean(error.message), error.remedy, error.status, error.retry_after)
            may_repeat_now = fault.may_pass and (may_repeat or fault.status == 429)  # what is 429 had no effect
            pause = pause_before(attempt, self.patience, fault.retry_after) if may_repeat_now else None
            if pause is None or attempt >= self.patience.attempts:
                raise fault
            self.sleep(pause)

    def _clean(self, message: str) -> str:
        return message.replace(self._key, "…")[:LONGEST_MESSAGE]

    def _json(self, client: httpx2.Client, method: str, url: str, headers: dict[str, str], **content: Any) -> dict[str, Any]:
        with self._answer(client, method, url, headers, **content) as response:
            self._check(response)
            text = self._read(response)
        if client is self._files and method == "PUT":  # a bucket answers with nothing, or XML
            return {}
        try:
            value = json.loads(text or b"{}")
        except (ValueError, RecursionError) as error:
            raise ApiError("Fireworks answered with something that is not JSON", "is fireworks.url right?", status=response.status_code) from error
        if not isinstance(value, dict):
            raise ApiError("Fireworks answered with something that is not a JSON object", "is fireworks.url right?", status=response.status_code)
        return value

    def _answer(self, client: httpx2.Client, method: str, url: str, headers: dict[str, str], **content: Any) -> Answer:
        return Answer(client, method, url, headers, content)

    def _read(self, response: httpx2.Response) -> bytes:
        """The body, up to a length and a time: a slow drip ends here too."""
        deadline, parts, size = time.monotonic() + self.patience.seconds, [], 0
        for piece in response.iter_raw():
            size += len(piece)
            if size > LONGEST_REPLY:
                raise ApiError(f"a reply is longer than {LONGEST_REPLY >> 20} MiB", "is fireworks.url right?", status=response.status_code)
            if time.monotonic() > deadline:
                raise ApiError(f"a reply took longer than {self.patience.seconds:g} s", "run the command again: it goes on")
            parts.append(piece)
        return b"".join(parts)

    def _check(self, response: httpx2.Response) -> None:
        """Raise ApiError unless a request was granted."""
        status = response.status_code
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError("Fireworks compressed its reply unasked", "is there a proxy between?", status=400)
        if status < 300:
            return
        detail = "a redirect, which is not followed" if status < 400 else detail_of(self._read(response))
        host = response.url.host
        remedy = REMEDIES.get(status, "run the command again: it goes on")
        raise ApiError(f"{host} answered {status}: {detail}", remedy, status, seconds_asked(response.headers.get("Retry-After")))
