"""The transport under Fireworks' API: faults translated, files read in pieces, bodies of errors."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx2

from understudy.errors import EndpointError
from understudy.progress import Progress

PIECE = 2**20  # bytes
TRANSIENT = (408, 425, 429)  # and everything from 500 on; 409 is ALREADY_EXISTS here
REMEDIES = {
    400: "`understudy fireworks status` shows what is there; docs/fireworks.md has the limits",
    401: "is the key right, and of this account? it is read from the environment variable that fireworks.api_key_env names",
    402: "see the account's billing at Fireworks",
    403: "may this key do that, and is fireworks.account right?",
    412: "is the account suspended? see its billing at Fireworks",
    429: "too many requests, or a quota is used up: wait, or see the account's quotas, then run the command again",
}


class ApiError(EndpointError):
    """A request that failed; `status` is None where no answer came, so that it may have had its effect or not."""

    def __init__(self, message: str, remedy: str = "", status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, remedy)
        self.status, self.retry_after = status, retry_after

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status is None or self.status in TRANSIENT or self.status >= 500


class Answer:
    """A response as a context manager, the transport's faults translated, also those that come while it is read."""

    def __init__(self, client: httpx2.Client, method: str, url: str, headers: dict[str, str], content: dict[str, Any]) -> None:
        self._stream, self._host = client.stream(method, url, headers=headers, **content), target_host(url)

    def __enter__(self) -> httpx2.Response:
        try:
            return self._stream.__enter__()
        except httpx2.HTTPError as error:
            raise self._translated(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.__exit__(kind, error, trace)
        if isinstance(error, httpx2.HTTPError):
            raise self._translated(error) from error

    def _translated(self, error: httpx2.HTTPError) -> ApiError:
        match error:
            case httpx2.TimeoutException():
                return ApiError(f"{self._host} did not answer in time", "run the command again: it goes on")
            case httpx2.ConnectError():
                return ApiError(f"cannot reach {self._host}", "is there a way to it from here? then run the command again: it goes on")
        return ApiError(f"{self._host} broke the connection", "run the command again: it goes on")


class Watched(io.FileIO):
    """A file that is read in pieces and counts them; what was counted is taken back where it is read anew."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(path, "rb")
        self._progress = progress
        if progress is not None and progress.done:
            progress.advance(-progress.done)

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        piece = super().read(size)
        if self._progress is not None:
            self._progress.advance(len(piece))
        return piece

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(PIECE):
            yield piece


def target_host(url: str) -> str:
    """The host of a URL; the rest of a signed one is a secret."""
    return urlsplit(url).hostname or "the host"


def detail_of(content: bytes) -> str:
    """The message of an error body (google.rpc.Status: code, message), or its beginning."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = content.decode("utf-8", "replace")
    if isinstance(value, dict):
        inner = value.get("error")
        value = value.get("message") or (inner.get("message") if isinstance(inner, dict) else inner) or value
    return str(value).strip() or "no message"
