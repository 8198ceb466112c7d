"""Which release answers a conversation: read from the alias' standing at each request, so that a promotion or a rollback holds from the
next request on. What began keeps the release that it began with."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from serve.gateway.requests import ChatRequest
from understudy.releases import ALIAS, DECISIONS, Canary, Release, Standing, aliases, read_release, standing
from understudy.workspace import Workspace


@dataclass(frozen=True)
class Route:
    """What answers one question under an alias, and what its trial is told of it."""

    alias: str
    live: Release
    answers: Release
    shadow: Release | None = None  # asked too, and not shown
    canary: Canary | None = None  # the trial that the answer counts for
    is_canary: bool = False  # on whose side


class ReleaseBook:
    """What is live and on trial, by alias; a file's change is seen at the next look."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._standings: dict[str, tuple[tuple[int, int, int], Standing]] = {}
        self._releases: dict[str, Release] = {}  # by digest: they never change

    def aliases(self) -> list[str]:
        """Every alias."""
        return aliases(self._workspace)

    def standing(self, alias: str) -> Standing | None:
        """How an alias stands; None where it is none. Raises StorageError."""
        if not re.fullmatch(ALIAS, alias):
            return None
        try:
            found = (self._workspace.releases / alias / DECISIONS).stat()
        except FileNotFoundError:
            return None
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        known = self._standings.get(alias)
        if known is None or known[0] != stamp:
            known = self._standings[alias] = (stamp, standing(self._workspace, alias))
        return known[1]

    def live(self, alias: str) -> Release | None:
        """The live release of an alias."""
        stands = self.standing(alias)
        return self.release(alias, stands.live) if stands and stands.live else None

    def route(self, alias: str, tenant: str, conversation: str) -> Route | None:
        """What answers a conversation; None where nothing is live under the alias."""
        stands = self.standing(alias)
        if stands is None or stands.live is None:
            return None
        live, canary = self.release(alias, stands.live), stands.canary
        if canary is None or not takes_part(canary, tenant):
            is_reference = canary is not None and canary.share == 1.0 and not canary.shadow  # all of the tenants on trial have the canary
            return Route(alias, live, live, canary=canary if is_reference else None)
        chosen = is_chosen(canary, conversation)
        candidate = self.release(alias, canary.release) if chosen else live
        if canary.shadow:
            return Route(alias, live, live, candidate, canary) if chosen else Route(alias, live, live)
        return Route(alias, live, candidate, canary=canary, is_canary=chosen)

    def release(self, alias: str, digest: str) -> Release:
        """A release by its whole digest. Raises NotFoundError, StorageError."""
        if digest not in self._releases:
            self._releases[digest] = read_release(self._workspace, alias, digest)
        return self._releases[digest]


def takes_part(canary: Canary, tenant: str) -> bool:
    """Whether a tenant's conversations are part of a trial."""
    return not canary.tenants or tenant in canary.tenants


def is_chosen(canary: Canary, conversation: str) -> bool:
    """Whether a conversation is the candidate's: always the same for one conversation and one trial, and as good as drawn by lot."""
    drawn = hashlib.sha256(f"{canary.release}/{canary.began_at!r}/{conversation}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < canary.share * 2.0**64


def conversation_of(request: ChatRequest, caller: str) -> str:
    """What tells a conversation from others, the same at each of its turns: the id that the client gives it, else its first question."""
    given = (request.metadata or {}).get("conversation_id")
    first = next((message.text for message in request.messages if message.role == "user"), "")
    return f"{caller}/{request.user or ''}/{given or first}"
