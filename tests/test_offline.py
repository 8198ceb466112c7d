"""Every test runs with outbound connections refused (tests/conftest.py); these show that the refusal is real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRIES = {
    "an address": "socket.create_connection(('192.0.2.1', 80), 1)",
    "a name": "socket.getaddrinfo('example.org', 443)",
    "a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "IPv6": "socket.create_connection(('2001:db8::1', 80), 1)",
    "a client": "__import__('httpx').get('https://example.org')",
}


@pytest.mark.parametrize("code", TRIES.values(), ids=TRIES)
def test_another_machine_is_refused_and_noted(code: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    done = subprocess.run([sys.executable, "-c", f"import socket; {code}"], env=os.environ | {"UNDERSTUDY_REFUSED": str(notes)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is another machine" in done.stderr
    assert notes.read_text().startswith("socket.")


def test_this_machine_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(("localhost", server.getsockname()[1])):
        pass


def test_this_process_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNDERSTUDY_REFUSED", str(tmp_path / "notes"))
    with pytest.raises(ConnectionRefusedError):
        socket.getaddrinfo("example.org", 443)
