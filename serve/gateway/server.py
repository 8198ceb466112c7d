"""The gateway as a server: where it may listen, over what, and until when."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from serve.keys import keys_file, read_keys
from understudy.errors import EngineError, NotFoundError, UsageError
from understudy.settings.serving import Gateway
from understudy.workspace import Workspace

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # longer than the clients' own pools keep an idle connection, so that none is closed under a request


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(workspace: Workspace) -> socket.socket:
    """The listening socket, bound before anything slow is begun.

    Raises UsageError where it would be open to a network without a key, EngineError where the port is taken.
    """
    settings = workspace.config.gateway
    if not is_loopback(settings.host) and not read_keys(keys_file(workspace)):
        raise UsageError(f"{settings.host} can be reached from other machines, and there is no key", "make one first: understudy keys create NAME")
    tls_context(settings)
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        is_foreign = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        remedy = "set gateway.host to an address of this machine" if is_foreign else f"stop what uses it, or choose another: gateway.port={settings.port + 1}"
        raise EngineError(f"the gateway cannot listen on {settings.host} port {settings.port}: {error.strerror}", remedy) from error
    return made


def tls_context(settings: Gateway) -> ssl.SSLContext | None:
    """The certificate and key, checked; None where plain HTTP is spoken. Raises UsageError, NotFoundError."""
    if not settings.tls_certificate and not settings.tls_key:
        return None
    if not (settings.tls_certificate and settings.tls_key):
        raise UsageError("TLS needs both gateway.tls_certificate and gateway.tls_key", "set the other one too")
    for path in (settings.tls_certificate, settings.tls_key):
        if not Path(path).is_file():
            raise NotFoundError(f"{path} does not exist", "check gateway.tls_certificate and gateway.tls_key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"the certificate and key cannot be used: {error}", "give a PEM chain and its own private key without a passphrase") from error
    return context


def url_of(settings: Gateway) -> str:
    """The base URL for clients on this machine."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "localhost") else "[::1]" if settings.host == "::" else settings.host
    return f"http{'s' * bool(settings.tls_certificate)}://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{settings.port}/v1"


class Server(uvicorn.Server):
    """uvicorn's server, which ends in order on SIGINT and SIGTERM and does not raise them again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn.Server."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def make_server(app: ASGIApp, settings: Gateway) -> Server:
    """A server for the application; it stops on SIGINT and SIGTERM, after `drain_seconds` for what runs."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        backlog=BACKLOG,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    config.load()
    context = tls_context(settings)
    if context is not None:
        config.ssl = context
    return Server(config)
