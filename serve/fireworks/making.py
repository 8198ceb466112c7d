"""Make something at Fireworks once, and wait until it is ready: what every kind of resource shares."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.fireworks.api import EXISTS, Api
from serve.fireworks.ledger import DELETED, PLANNED, Ledger, Resource, reason_of, state_of
from serve.fireworks.requests import Request
from serve.fireworks.wire import ApiError
from understudy.errors import EndpointError, NotFoundError
from understudy.progress import Progress

GOOD = ("READY", "COMPLETED", "EARLY_STOPPED", "DEPLOYED")
BAD = ("FAILED", "CANCELLED", "CANCELLING", "EXPIRED", "DELETING", "DELETING_CLEANING_UP", DELETED, "UNDEPLOYING")
HELD = ("PAUSED",)  # by an account's suspension, or by hand

Report = Callable[[str], None]


@dataclass(frozen=True)
class Hosted:
    """The account's API, the workspace's ledger of it, and how a person is told."""

    api: Api
    ledger: Ledger
    report: Report
    show_progress: Callable[[str, int], Progress]
    poll_seconds: float = 10.0
    wait_seconds: float = 21_600.0


def ensure(hosted: Hosted, resource: Resource, creation: Request, is_paid: bool = True) -> dict[str, Any]:
    """What the server holds under a resource's id, made unless it is there.

    The ledger knows of it first, so that a run killed after the request finds it again. Raises NotFoundError where something paid was
    there once and is not any more, ApiError.
    """
    found = hosted.api.find(resource.kind, resource.id)
    known = hosted.ledger.get(resource.kind, resource.id)
    if found is None:
        if is_paid and known is not None and known.state != PLANNED:
            raise _deleted(resource)
        known = hosted.ledger.put(resource)
        found = _create(hosted, resource, creation)
    hosted.ledger.saw(known or resource, state_of(found))
    return found


def _deleted(resource: Resource) -> NotFoundError:
    return NotFoundError(f"{resource.key} was deleted at Fireworks", "run the command again; with --again, where that makes another run or deployment")


def _create(hosted: Hosted, resource: Resource, creation: Request) -> dict[str, Any]:
    """The server's answer to a creation; where an attempt went through that was not answered, what it made."""
    try:
        return hosted.api.call(creation)
    except ApiError as error:
        found = hosted.api.find(resource.kind, resource.id) if error.status == EXISTS else None
        if found is None:
            raise
        return found


def wait(hosted: Hosted, resource: Resource, found: dict[str, Any]) -> dict[str, Any]:
    """A resource once it is ready. Raises EndpointError where it fails, is held, or is not ready in time."""
    deadline, shown = time.monotonic() + hosted.wait_seconds, ""
    with hosted.show_progress(resource.id, 100) as progress:
        while True:
            state = state_of(found)
            hosted.ledger.saw(hosted.ledger.get(resource.kind, resource.id) or resource, state)
            progress.advance(percent_of(found) - progress.done, state)
            if state != shown:
                shown = state
                hosted.report(f"{resource.key}: {state}")
            if state in GOOD:
                return found
            check(resource, found)
            if time.monotonic() >= deadline:
                raise EndpointError(f"{resource.key} is still {state} after {hosted.wait_seconds:g} s", "run the same command again: it goes on waiting")
            hosted.api.sleep(hosted.poll_seconds)
            answer = hosted.api.find(resource.kind, resource.id)
            if answer is None:
                hosted.ledger.saw(resource, DELETED)
                raise _deleted(resource)
            found = answer


def check(resource: Resource, found: dict[str, Any]) -> None:
    """Raise EndpointError where a resource has failed or is held."""
    state, reason = state_of(found), reason_of(found)
    said = f": {reason}" if reason else ""
    if state in BAD:
        raise EndpointError(f"{resource.key} is {state}{said}", "see to the cause; then run the command with --again, which makes another and is paid anew")
    status = found.get("status")
    if state == "UPLOADING" and isinstance(status, dict) and status.get("code") not in (None, "", "OK"):
        raise EndpointError(f"{resource.key} was refused{said or ': ' + str(status['code'])}", "correct the rows, then build and upload again")
    if state in HELD:
        raise EndpointError(f"{resource.key} is {state}{said}", "see the account at Fireworks; then run the same command again: it goes on waiting")


def percent_of(found: dict[str, Any]) -> int:
    """How far a job is, 0 to 100."""
    progress = found.get("jobProgress")
    percent = progress.get("percent") if isinstance(progress, dict) else None
    return min(100, max(0, int(percent))) if isinstance(percent, int | float) else 0


def cost_of(found: dict[str, Any]) -> str | None:
    """A job's estimated cost, such as "USD 2.50" (google.type.Money)."""
    cost = found.get("estimatedCost")
    if not isinstance(cost, dict) or not cost.get("currencyCode"):
        return None
    return f"{cost['currencyCode']} {int(cost.get('units') or 0) + int(cost.get('nanos') or 0) / 1e9:.2f}"


def latest_attempt(hosted: Hosted, resource_of: Callable[[int], Resource], again: bool) -> int:
    """Which attempt to go on with: the last that was begun; with `again` the one after it, where that one has failed or is gone."""
    attempt = 1
    while hosted.ledger.get(resource_of(attempt + 1).kind, resource_of(attempt + 1).id) is not None:
        attempt += 1
    last = resource_of(attempt)
    known = hosted.ledger.get(last.kind, last.id)
    if not again or known is None or known.state == PLANNED:
        return attempt
    found = hosted.api.find(last.kind, last.id)
    return attempt + 1 if found is None or state_of(found) in BAD else attempt
