"""Store URLs: where a password may stand, and what of a URL may be shown."""

from __future__ import annotations

import os
from urllib.parse import SplitResult, urlsplit, urlunsplit

from understudy.errors import UsageError

ENVIRONMENT = "env:"


def resolve_url(url: str) -> str:
    """The URL itself, or for `env:NAME` the one that the environment variable NAME holds. Raises UsageError where it is not set."""
    if not url.startswith(ENVIRONMENT):
        return url
    name = url.removeprefix(ENVIRONMENT)
    value = os.environ.get(name, "").strip()
    if not value:
        raise UsageError(f"the environment variable {name} is not set", f"export {name}=mongodb://user:password@host/database")
    return value


def has_secret(url: str) -> bool:
    """Whether a URL carries a user's name or password, or options that may be secrets themselves."""
    parts = _split(url)
    return "@" in parts.netloc or "password" in parts.query.lower() or "authmechanismproperties" in parts.query.lower()


def shown_url(url: str) -> str:
    """The URL as it may be printed: without its user, password and options."""
    parts = _split(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, ("***@" if at and credentials else "") + hosts, parts.path, "", "")) if parts.netloc else url.partition("?")[0]


def refuse_secret(url: str, place: str) -> None:
    """Raise UsageError where a URL that is not from the environment carries a secret."""
    if has_secret(url):
        raise UsageError(
            f"{place}: the store's URL {shown_url(url)} carries a password, and passwords come from the environment only",
            "keep the URL in a variable and write env:NAME, or set UNDERSTUDY_STORE",
        )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UsageError("the store's URL is malformed", "write for example mongodb://host:27017/database") from error
