"""Who may use the gateway: keys with a tenant, scopes and a rate limit, in keys.json of the workspace.

A key is 256 random bits, so its SHA-256 is all that has to be kept: nobody can try out 2^256 keys, however fast the hash. Slow hashes
(scrypt, argon2) protect what people choose themselves, and would cost every request their time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import locked, read_json, write_json
from understudy.records import Record
from understudy.workspace import Workspace

SCOPES = {
    "chat": "the base and its adapters",
    "rag": "rag and rag:fast",
    "embeddings": "the embedder",
    "feedback": "corrections, which become training data",
    "remotes": "configured remotes, which may cost money",
    "metrics": "/metrics",
}
USUAL_SCOPES = ("chat", "rag", "embeddings", "feedback")
PREFIX = "us"
MAX_DAYS = 36_500
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NOBODY = hashlib.sha256(b"").hexdigest()  # compared against where a key's id is unknown, so that this takes as long


class Key(Record):
    """A key as it is kept: everything but the key itself."""

    id: str  # the part of the key that may be shown
    name: str
    tenant: str
    scopes: list[str]
    requests_per_minute: int
    sha256: str  # of the whole key
    created_at: float  # seconds since the epoch
    expires_at: float | None = None  # seconds since the epoch
    revoked_at: float | None = None  # seconds since the epoch

    def is_valid(self, at: float) -> bool:
        """Whether the key opens anything at a time (seconds since the epoch)."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)


def keys_file(workspace: Workspace) -> Path:
    """Where a workspace keeps its keys."""
    return workspace.root / "keys.json"


def read_keys(file: Path) -> dict[str, Key]:
    """Every key ever made, by id, oldest first; empty where there is no file. Raises StorageError."""
    if not file.exists():
        return {}
    try:
        return {row["id"]: Key.model_validate(row) for row in read_json(file)["keys"]}
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{file} is not a list of keys", "restore it from a backup") from error


def create_key(workspace: Workspace, name: str, tenant: str, scopes: list[str], requests_per_minute: int, days: float | None = None) -> tuple[Key, str]:
    """A new key and its text, which is kept nowhere. Raises UsageError where the name is taken or a scope unknown."""
    unknown = set(scopes) - SCOPES.keys()
    if unknown:
        raise UsageError(f"no scope {', '.join(sorted(unknown))}", f"choose from {', '.join(SCOPES)}")
    for label, value in (("key", name), ("tenant", tenant)):
        if not re.fullmatch(NAME, value):
            raise UsageError(f"{value!r} cannot name a {label}", "use letters, digits, dots, - and _")
    if requests_per_minute < 1 or not (days is None or 0 < days <= MAX_DAYS):
        raise UsageError(
            f"a key needs at least one request a minute, and above 0 and up to {MAX_DAYS} days to live", "leave --days out for a key without an end"
        )
    file = keys_file(workspace)
    with locked(_lock(file)):
        keys = read_keys(file)
        if any(key.name == name and key.revoked_at is None for key in keys.values()):
            raise UsageError(f"there is a key {name} already", "choose another name, or revoke that one first: `understudy keys revoke`")
        key_id, now = secrets.token_hex(4), time.time()
        text = f"{PREFIX}-{key_id}-{secrets.token_hex(32)}"
        made = Key(
            id=key_id,
            name=name,
            tenant=tenant,
            scopes=[scope for scope in SCOPES if scope in scopes],
            requests_per_minute=requests_per_minute,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            created_at=now,
            expires_at=None if days is None else now + days * 86400,
        )
        _write(file, {**keys, key_id: made})
    return made, text


def revoke_key(workspace: Workspace, name: str) -> Key:
    """End a key, named by its name or its id; running gateways refuse it from the next request on. Raises NotFoundError."""
    file = keys_file(workspace)
    with locked(_lock(file)):
        keys = read_keys(file)
        found = next((key for key in keys.values() if name in (key.id, key.name) and key.revoked_at is None), None)
        if found is None:
            raise NotFoundError(f"no key {name} that is not revoked already", "`understudy keys ls` lists them")
        revoked = found.model_copy(update={"revoked_at": time.time()})
        _write(file, {**keys, found.id: revoked})
    return revoked


class KeyRing:
    """The keys of a workspace as a gateway checks them; a change of the file holds from the next request on."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file, self._clock = file, clock
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._are_required = False

    @property
    def are_required(self) -> bool:
        """Whether a key is asked for: from the first one made on. Revoking the last one, or losing the file, opens nothing."""
        self._are_required = self._are_required or bool(self.keys)
        return self._are_required

    @property
    def keys(self) -> dict[str, Key]:
        """Every key by id."""
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError:
            stamp = None
        if stamp != self._stamp:
            self._keys = read_keys(self._file)
            self._stamp = stamp
        return self._keys

    def find(self, text: str) -> Key | None:
        """The valid key that this text is, compared in constant time."""
        parts = text.split("-")
        key = self.keys.get(parts[1]) if len(parts) == 3 else None
        right = hmac.compare_digest(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), key.sha256 if key else NOBODY)
        return key if key and right and key.is_valid(self._clock()) else None


def _write(file: Path, keys: dict[str, Key]) -> None:
    write_json(file, {"schema_version": 1, "keys": [key.model_dump() for key in keys.values()]})


def _lock(file: Path) -> Path:
    return file.parent / "run" / "keys.lock"
