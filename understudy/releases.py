"""Releases by alias: releases/ALIAS/DIGEST.json, each immutable, and decisions.jsonl, which says what is live.

Every decision is one line, and its last words are how the alias stands after it. So the log's last whole line is the alias' one
pointer: what is live and what was decided can never disagree, a line that was cut off has not happened, and no line ever changes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from understudy.digests import digest_of
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import append_jsonl, locked, read_json, write_json
from understudy.records import SCHEMA_VERSION, Record
from understudy.workspace import Workspace

ALIAS = r"[a-z][a-z0-9-]{0,47}"
RESERVED = ("base", "frontier", "live", "rag", "teacher")
DECISIONS = "decisions.jsonl"
ENGINE = "engine"  # a release's endpoint, where it is no remote
FORMER = 20  # releases that rollbacks may go back through

ModelStep = Literal["plan", "answer", "validate"]  # the steps that ask a model
Action = Literal["created", "canary", "promoted", "rolled back", "stopped"]


class Release(Record):
    """What answers under an alias; immutable, and named by its content."""

    schema_version: int = SCHEMA_VERSION
    alias: str
    tenant: str  # whose corpus the generation is of
    generation: str  # the corpus generation that it was made on, and is judged on
    adapters: dict[ModelStep, str]  # name@digest12, or base
    prompt_version: str
    endpoint: str = ENGINE  # the workspace's own engine, or the configured remote that serves it

    @property
    def digest(self) -> str:
        """Identity: two releases that say the same are one."""
        return digest_of(self.model_dump())

    @property
    def name(self) -> str:
        """The immutable name it answers under."""
        return f"{self.alias}@{self.digest[:12]}"


class Canary(Record):
    """A candidate on trial beside the live release."""

    release: str  # digest
    share: float = 0.0  # of conversations, in (0, 1]
    tenants: list[str] = Field(default_factory=list)  # whose every conversation it answers, whatever the share
    shadow: bool = False  # its answers are recorded, and the live release's are shown
    began_at: float  # seconds since the epoch


class Standing(Record):
    """What an alias means at one moment, by digests."""

    live: str | None = None
    canary: Canary | None = None
    former: list[str] = Field(default_factory=list)  # what was live before, the latest FORMER, the last one last: where a rollback goes


class Decision(Record):
    """What was decided about a release, when, on what evidence; and how the alias stands since."""

    schema_version: int = SCHEMA_VERSION
    at: float  # seconds since the epoch
    action: Action
    release: str  # digest of the release that it is about
    reason: str = ""
    forced: bool = False  # against the evidence
    evidence: dict[str, Any] = Field(default_factory=dict)
    standing: Standing


def aliases(workspace: Workspace) -> list[str]:
    """Every alias that has a release."""
    return sorted(path.parent.name for path in workspace.releases.glob(f"*/{DECISIONS}"))


def is_alias(workspace: Workspace, name: str) -> bool:
    """Whether a name, with or without a digest, is of an alias."""
    alias = name.partition("@")[0]
    return re.fullmatch(ALIAS, alias) is not None and (workspace.releases / alias / DECISIONS).exists()


def decisions(workspace: Workspace, alias: str) -> list[Decision]:
    """What was decided under an alias, oldest first; none where there is no such alias. Raises StorageError."""
    return _read(workspace.releases / alias / DECISIONS)


def standing(workspace: Workspace, alias: str) -> Standing:
    """How an alias stands. Raises StorageError."""
    last = _read(workspace.releases / alias / DECISIONS, latest=1)
    return last[0].standing if last else Standing()


def read_release(workspace: Workspace, alias: str, digest: str) -> Release:
    """The release of a whole digest; raises NotFoundError, StorageError where the file is another's."""
    path = workspace.releases / alias / f"{digest}.json"
    try:
        release = Release.model_validate(read_json(path))
    except ValidationError as error:
        raise StorageError(f"{path} is not a release: {error.errors()[0]['msg']}", "restore the file from a backup") from error
    if release.digest != digest:
        raise StorageError(f"{path} is not the release of its digest", "restore the file from a backup")
    return release


def releases_of(workspace: Workspace, alias: str) -> list[Release]:
    """Every release of an alias, oldest first."""
    made = dict.fromkeys(decision.release for decision in decisions(workspace, alias) if decision.action == "created")
    return [read_release(workspace, alias, digest) for digest in made]


def find_release(workspace: Workspace, name: str) -> Release:
    """The release called ALIAS@DIGEST12, or ALIAS: what is live, or before anything was, the newest. Raises NotFoundError."""
    alias, _, digest = name.partition("@")
    known = releases_of(workspace, alias) if is_alias(workspace, alias) else []
    live = standing(workspace, alias).live if known and not digest else None
    matching = [release for release in known if release.digest.startswith(live or digest)]
    if not matching:
        names = ", ".join(release.name for release in known) or ", ".join(aliases(workspace)) or "none yet: run `understudy release create`"
        raise NotFoundError(f"no release {name}", f"{'of this alias' if known else 'aliases'}: {names}")
    return matching[-1]


def add_release(workspace: Workspace, release: Release) -> bool:
    """Keep a release; False where it is there already. Raises UsageError for a name that something else has."""
    alias = release.alias
    if not re.fullmatch(ALIAS, alias) or alias in RESERVED:
        raise UsageError(
            f"{alias!r} cannot be an alias", f"small letters, digits and -, beginning with a letter, at most 48, and none of {', '.join(RESERVED)}"
        )
    taken = {
        "a remote": alias in workspace.config.remotes,
        "an adapter": (workspace.adapters / alias).exists(),
        "the base": alias == workspace.config.models.base,
    }
    if any(taken.values()):
        raise UsageError(f"{alias} is the name of {next(what for what, is_taken in taken.items() if is_taken)} already", "choose another alias")
    folder = workspace.releases / alias
    with _changing(workspace, alias):
        made = decisions(workspace, alias)
        if any(decision.release == release.digest for decision in made):
            return False
        write_json(folder / f"{release.digest}.json", release.model_dump())
        _append(folder, "created", release.digest, made[-1].standing if made else Standing())
    return True


def decide(
    workspace: Workspace,
    alias: str,
    action: Action,
    move: Callable[[Standing], tuple[str, Standing]],
    reason: str = "",
    forced: bool = False,
    evidence: dict[str, Any] | None = None,
) -> Decision:
    """Move an alias: `move` says from how it stands which release this is about and how it stands then, or raises. One decision at a time."""
    with _changing(workspace, alias):
        digest, after = move(standing(workspace, alias))
        return _append(workspace.releases / alias, action, digest, after, reason, forced, evidence or {})


def promoted(before: Standing, digest: str) -> Standing:
    """The release is live; a trial of whatever release, which was measured against the one before, is over. Raises UsageError."""
    if before.live == digest:
        raise UsageError("that release is live already", "`understudy release ls` shows what is")
    former = [*before.former, before.live] if before.live else before.former
    return Standing(live=digest, former=former[-FORMER:])


def on_trial(before: Standing, canary: Canary) -> Standing:
    """The release answers a part of what the live one answers. Raises UsageError where nothing is live, or it is the same."""
    if before.live is None:
        raise UsageError("nothing is live under this alias, so there is nothing to try a release against", "`understudy release promote` it")
    if before.live == canary.release:
        raise UsageError("that release is live already", "`understudy release ls` shows what is")
    return before.model_copy(update={"canary": canary})


def rolled_back(before: Standing) -> tuple[str, Standing]:
    """(the release that goes, without it): the canary where there is one, else the live one, in favour of what was live before it."""
    if before.canary:
        return before.canary.release, before.model_copy(update={"canary": None})
    if before.live is None or not before.former:
        raise UsageError("there is nothing to go back to", "`understudy release ls` shows what was live before")
    return before.live, Standing(live=before.former[-1], former=before.former[:-1])


def stopped(before: Standing, canary: Canary) -> tuple[str, Standing]:
    """(the canary, without it). Raises UsageError where this trial is over already."""
    if before.canary != canary:
        raise UsageError("this trial is over already", "`understudy release ls` shows what is live")
    return canary.release, before.model_copy(update={"canary": None})


def _read(path: Path, latest: int = 0) -> list[Decision]:
    """The decisions of a file, or the latest few; a line that was cut off is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", "fix the folder's permissions") from error
    try:
        return [Decision.model_validate_json(line) for line in content.split(b"\n")[:-1][-latest:]]
    except ValidationError as error:
        raise StorageError(f"{path} holds a line that is no decision: {error.errors()[0]['msg']}", "restore the file from a backup") from error


def _changing(workspace: Workspace, alias: str) -> AbstractContextManager[None]:
    return locked(workspace.releases / alias / ".lock")


def _append(
    folder: Path, action: Action, digest: str, after: Standing, reason: str = "", forced: bool = False, evidence: dict[str, Any] | None = None
) -> Decision:
    made = Decision(at=time.time(), action=action, release=digest, reason=reason, forced=forced, evidence=evidence or {}, standing=after)
    append_jsonl(folder / DECISIONS, made.model_dump())
    return made
