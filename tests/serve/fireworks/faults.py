"""What may happen to one request instead of its answer, or on the way."""

from __future__ import annotations

from typing import Any

from tests.serve.fireworks.server import Fault, Handler


def status(code: int, message: str = "not now", **headers: str) -> Fault:
    """An answer without any effect."""

    def fault(handler: Handler) -> bool:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        handler.send(code, {"code": 14, "message": message}, **headers)
        return True

    return fault


def cut_off(handler: Handler) -> bool:
    """The connection breaks while the body is being sent."""
    handler.rfile.read(min(1000, int(handler.headers.get("Content-Length", 0))))
    handler.reset()
    return True


def unanswered(handler: Handler) -> bool:
    """The request has its effect, and the answer is lost."""
    handler.send = lambda *_args, **_headers: handler.reset()  # type: ignore[method-assign]
    handler.answer()
    return True


def half(handler: Handler) -> bool:
    """The answer breaks off half-way."""
    write = handler.wfile.write

    def write_half(content: Any) -> int:
        if b"HTTP/1." in bytes(content)[:10]:
            return write(content)
        done = write(content[: len(content) // 2])
        handler.wfile.flush()
        handler.reset()
        return done

    handler.wfile.write = write_half  # type: ignore[method-assign]
    handler.answer()
    return True
