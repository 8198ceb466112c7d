"""Refuses every connection that leaves this machine, in each Python process that has this folder on PYTHONPATH, and notes it.

tests/conftest.py puts it there for every test and what it starts, .ci/run for the demo. UNDERSTUDY_REFUSED names the file of notes.
What compiled code connects by itself, without Python's sockets, is not seen.
"""

from __future__ import annotations

import ipaddress
import os
import sys

ALLOWED = os.environ.get("UNDERSTUDY_REACHABLE", "").split()  # hosts of servers given for the tests


def is_here(host: object) -> bool:
    """Whether a host is this machine; an empty one is a wildcard or a socket's own."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not host or not isinstance(host, str) or host in ("localhost", *ALLOWED):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook (PEP 578): raise ConnectionRefusedError for another machine's address or name."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) and address else None  # a path is a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_here(host):
        if notes := os.environ.get("UNDERSTUDY_REFUSED"):
            with open(notes, "a", encoding="utf-8") as file:
                file.write(f"{event} {host} by {' '.join(sys.argv[:4])}\n")
        raise ConnectionRefusedError(f"{host} is another machine")


sys.addaudithook(refuse)
