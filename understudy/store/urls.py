"""Store URLs: where a password may stand, and what of a URL may be shown."""

from __future__ import annotations

import os
import re

from understudy.errors import UsageError

ENVIRONMENT = "env:"
PLAIN = ("sqlite:", ENVIRONMENT)  # these hold no secret
HOST = r"(\[[0-9a-fA-F:]+\]|[\w.-]+)(:\d+)?"


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
    options = url.partition("?")[2].lower()
    return not url.startswith(PLAIN) and ("@" in url or "password" in options or "authmechanismproperties" in options)


def shown_url(url: str) -> str:
    """The URL as it may be printed: without its user, password and options, also where they are not escaped as they should be."""
    if url.startswith(PLAIN):
        return url
    scheme, _, rest = url.partition("://")
    before, at, place = rest.rpartition("@")
    hosts = None if "?" in before else re.match(rf"{HOST}(,{HOST})*(/[\w.-]*)?(?=$|\?)", place)
    return f"{scheme}://{'***@' if at else ''}{hosts.group() if hosts else '…'}"


def refuse_secret(url: str, place: str) -> None:
    """Raise UsageError where a URL that is not from the environment carries a secret."""
    if has_secret(url):
        raise UsageError(
            f"{place}: the store's URL {shown_url(url)} carries a password, and passwords come from the environment only",
            "keep the URL in a variable and write env:NAME, or set UNDERSTUDY_STORE",
        )
