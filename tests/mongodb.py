"""A MongoDB server for the tests: the one that UNDERSTUDY_TEST_MONGODB_URI names, else secantusdb as a process of its own.

secantusdb speaks MongoDB's wire protocol on a socket. It is licensed under the GPL-2.0: the tests run it, nothing imports it.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import bson
import pymongo

OP_MSG = 2013
GIVEN = os.environ.get("UNDERSTUDY_TEST_MONGODB_URI", "")


class Server:
    """secantusdb on a free port of the loopback; `kill` and `start` keep port and files."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.start()

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "secantus", "--port", str(self.port), "--storage-path", str(self.folder / "db"), "--cache-size", "64M"]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        with pymongo.MongoClient(self.url, serverSelectionTimeoutMS=30_000) as client:
            client.admin.command("hello")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def fresh_database(url: str) -> Iterator[str]:
    """The URL of a database that nobody else uses, dropped at the end."""
    name = f"understudy_test_{secrets.token_hex(8)}"
    parts = urlsplit(url)
    login = [f"authSource={parts.path[1:] or 'admin'}"] if "@" in parts.netloc and "authSource" not in parts.query else []
    yield urlunsplit(parts._replace(path=f"/{name}", query="&".join([parts.query, *login] if parts.query else login)))
    with pymongo.MongoClient(url) as client:
        client.drop_database(name)


def nothing(_command: str) -> bool:
    """Lose no answer."""
    return False


class Proxy:
    """A TCP proxy in front of a server that can lose an answer (the request is carried out, and the connection closed instead), or give one itself."""

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.lose: Callable[[str], bool] = nothing
        self.answer: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _request: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.server_port)) as server:
            while request := _message(client):
                body = _body(request)
                if (given := self.answer(body)) is not None:
                    client.sendall(_reply(request, given))
                    continue
                server.sendall(request)
                answer = _message(server)
                if not answer or self.lose(next(iter(body), "")):
                    return
                client.sendall(answer)


def _message(connection: socket.socket) -> bytes:
    """One whole wire message; empty at the end of the stream."""
    try:
        header = connection.recv(4, socket.MSG_WAITALL)
        return header + connection.recv(struct.unpack("<i", header)[0] - 4, socket.MSG_WAITALL) if len(header) == 4 else b""
    except OSError:
        return b""


def _body(message: bytes) -> dict[str, Any]:
    """The document of an OP_MSG's first section; empty for the driver's handshakes."""
    if struct.unpack("<i", message[12:16])[0] != OP_MSG or message[20] != 0:
        return {}
    size = struct.unpack("<i", message[21:25])[0]
    return bson.decode(message[21 : 21 + size])


def _reply(request: bytes, document: dict[str, Any]) -> bytes:
    content = bytes(5) + bson.encode(document)  # no flags, a section of kind 0
    return struct.pack("<iiii", 16 + len(content), 0, struct.unpack("<i", request[4:8])[0], OP_MSG) + content
