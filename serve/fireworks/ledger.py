"""What a workspace has at Fireworks: fireworks/ACCOUNT.json, written before each request that makes something.

The server is asked what is true; the ledger says what to ask about, and what must not be made a second time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from serve.fireworks.requests import Kind
from understudy.errors import StorageError
from understudy.files import locked, read_json, write_json
from understudy.records import Record
from understudy.workspace import Workspace

PLANNED = "PLANNED"  # about to be made; whether it was is not known
SENT = "SENT"  # a dataset's rows were taken
DELETED = "DELETED"


class Resource(Record):
    """Something at Fireworks that this workspace made, or was about to make."""

    kind: Kind
    id: str
    state: str = PLANNED  # the server's, when it was last seen
    facts: dict[str, str] = Field(default_factory=dict)  # what it was made of: the dataset's digest, the model, …
    created_at: float

    @property
    def key(self) -> str:
        """KIND/ID."""
        return f"{self.kind}/{self.id}"


class Ledger:
    """The resources of one account, read anew for every use: several commands may run at once."""

    def __init__(self, workspace: Workspace, account: str) -> None:
        self.folder = workspace.root / "fireworks"
        self._file = self.folder / f"{account}.json"

    def all(self, kind: Kind | None = None) -> list[Resource]:
        """The resources of a kind, oldest first. Raises StorageError where the file is damaged."""
        rows = read_json(self._file) if self._file.exists() else []
        try:
            found = [Resource.model_validate(row) for row in rows]
        except (ValidationError, TypeError) as error:
            raise StorageError(f"{self._file} is not a list of resources", "restore it; what is at Fireworks is not touched by that") from error
        return sorted((each for each in found if kind in (None, each.kind)), key=lambda each: (each.created_at, each.id))

    def get(self, kind: Kind, identity: str) -> Resource | None:
        """The resource of this id, or None."""
        return next((each for each in self.all(kind) if each.id == identity), None)

    def put(self, resource: Resource) -> Resource:
        """Enter a resource, in place of the one with its key."""
        with locked(self.folder / ".lock"):
            kept = [each for each in self.all() if each.key != resource.key]
            write_json(self._file, [each.model_dump() for each in [*kept, resource]])
        return resource

    def saw(self, resource: Resource, state: str, **facts: str) -> Resource:
        """Enter what the server said of a resource, unless that is known."""
        seen = resource.model_copy(update={"state": state, "facts": resource.facts | facts})
        return seen if self.get(resource.kind, resource.id) == seen else self.put(seen)

    def files_of(self, model: str) -> Path:
        """Where a model's files are brought to."""
        return self.folder / "models" / model


def state_of(answer: dict[str, Any]) -> str:
    """A resource's state, in a form that an unknown answer has too."""
    return str(answer.get("state") or "STATE_UNSPECIFIED").removeprefix("JOB_STATE_")


def reason_of(answer: dict[str, Any]) -> str:
    """What the server says beside a state, one line."""
    status = answer.get("status")
    message = status.get("message") if isinstance(status, dict) else None
    return " ".join(str(message).split())[:300] if message else ""
