"""Deployments at Fireworks, the LoRA models loaded into them, and the removal of all of it."""

from __future__ import annotations

import time
from typing import Any

from serve.fireworks.api import UNKNOWN
from serve.fireworks.ledger import DELETED, PLANNED, Ledger, Resource, reason_of, state_of
from serve.fireworks.making import BAD, GOOD, Hosted, check, cost_of, ensure, latest_attempt, percent_of, wait
from serve.fireworks.requests import KINDS, Hosting, Kind, create_deployment, delete, full_name, last_part, list_loaded, load_lora
from serve.fireworks.training import enter_model
from serve.fireworks.wire import ApiError
from understudy.adapters import CONFIG, WEIGHTS
from understudy.errors import EndpointError, NotFoundError, UsageError

CHAT = "/inference/v1"


def deploy(hosted: Hosted, hosting: Hosting, again: bool, is_waiting: bool) -> dict[str, Any]:
    """Deploy, or go on with the deployment that was begun; the result is the command's JSON. Raises EndpointError where it fails."""

    def resource_of(attempt: int) -> Resource:
        facts = {"model": hosting.model, "addons": str(hosting.takes_addons)}
        return Resource(kind="deployments", id=_with(hosting, attempt).id, facts=facts, created_at=time.time())

    attempt = latest_attempt(hosted, resource_of, again)
    resource = resource_of(attempt)
    found = ensure(hosted, resource, create_deployment(_with(hosting, attempt)))
    if is_waiting:
        found = wait(hosted, resource, found)
    else:
        check(resource, found)
    return {"deployment": resource.id, "model": hosting.model, "state": state_of(found), "takes_addons": hosting.takes_addons, "attempt": attempt}


def _with(hosting: Hosting, attempt: int) -> Hosting:
    return Hosting(hosting.model, hosting.takes_addons, hosting.accelerator, hosting.scale_to_zero_seconds, attempt)


def newest_deployment(hosted: Hosted, name: str | None) -> str:
    """The id of the deployment to load into: the one named, else the newest that takes addons; raises NotFoundError."""
    if name:
        return name.rpartition("/")[2]
    known = [each for each in hosted.ledger.all("deployments") if each.facts.get("addons") == "True" and each.state not in BAD]
    if not known:
        raise NotFoundError("there is no deployment to load into", "run `understudy fireworks deploy` first, or name one with --deployment")
    return known[-1].id


def load(hosted: Hosted, model: str, deployment: str, is_waiting: bool) -> dict[str, Any]:
    """Load a LoRA model into a deployment, unless it is; the result is the command's JSON. Raises EndpointError where it fails."""
    target = hosted.api.find("deployments", deployment)
    if target is None or state_of(target) != "READY":
        state = state_of(target) if target else "not there"
        raise NotFoundError(f"the deployment {deployment} is {state}", "run `understudy fireworks deploy` again: it waits until it is ready")
    account = hosted.api.account.id
    names = full_name(account, "models", model), full_name(account, "deployments", deployment)
    found = _loaded(hosted, *names)
    if found is None:
        try:
            found = hosted.api.call(load_lora(*names))
        except ApiError as error:
            found = _loaded(hosted, *names) if error.status is None or error.may_pass or error.status == 409 else None
            if found is None:
                raise
    identity = last_part(str(found.get("name", "")))
    resource = Resource(kind="deployedModels", id=identity, state=state_of(found), facts={"model": model, "deployment": deployment}, created_at=time.time())
    hosted.ledger.put(hosted.ledger.get("deployedModels", identity) or resource)
    if is_waiting:
        found = wait(hosted, resource, found)
    else:
        check(resource, found)
    return {"loaded": identity, "model": names[0], "deployment": names[1], "state": state_of(found)}


def _loaded(hosted: Hosted, model: str, deployment: str) -> dict[str, Any] | None:
    """What the server has loaded of a model into a deployment."""
    rows = hosted.api.call(list_loaded(model, deployment)).get("deployedModels")
    matching = [row for row in rows if row.get("model") == model and row.get("deployment") == deployment] if isinstance(rows, list) else []
    return next((row for row in matching if state_of(row) not in BAD), None)


def remote_settings(base: str, model: str, key_variable: str, deployment: str | None = None) -> dict[str, str]:
    """The entry under `remotes` with which `ask`, `evaluate` and the gateway use what is served: full names of both."""
    served = f"{model}#{deployment}" if deployment else model
    return {"base_url": base.rstrip("/") + CHAT, "model": served, "api_key_env": key_variable}


def status(hosted: Hosted) -> list[dict[str, Any]]:
    """Every resource of the ledger that is not known to be deleted, as the server has it now; a job that has ended brings its model in."""
    rows: list[dict[str, Any]] = []
    for kind in reversed(KINDS):  # jobs before models
        rows += [status_of(hosted, resource) for resource in hosted.ledger.all(kind) if resource.state != DELETED]
    return rows


def status_of(hosted: Hosted, resource: Resource) -> dict[str, Any]:
    """One resource as the server has it now, which the ledger learns."""
    found = hosted.api.find(resource.kind, resource.id)
    state = state_of(found) if found else ("NOT MADE" if resource.state == PLANNED else DELETED)
    if found or state == DELETED:
        hosted.ledger.saw(resource, state)
    row: dict[str, Any] = {"kind": resource.kind, "id": resource.id, "state": state, "facts": resource.facts}
    if found and resource.kind == "supervisedFineTuningJobs":
        row |= {"percent": 100 if state in GOOD else percent_of(found), "estimated_cost": cost_of(found)}
        if state in GOOD:
            enter_model(hosted, resource, found)
    if found and (reason := reason_of(found)):
        row["reason"] = reason
    return row


def chosen(ledger: Ledger, names: list[str]) -> list[Resource]:
    """The resources called KIND/ID, or all of them, in the order in which they can be deleted. Raises NotFoundError, UsageError."""
    known = {each.key: each for each in ledger.all() if each.state != DELETED}
    if names == ["all"]:
        picked = list(known.values())
    else:
        picked = []
        for name in names:
            if name not in known:
                raise NotFoundError(f"this workspace has no {name} at Fireworks", "`understudy fireworks status` lists what it has, as KIND/ID")
            picked.append(known[name])
    return sorted(picked, key=lambda each: (KINDS.index(each.kind), each.created_at))


def check_kept(ledger: Ledger, resources: list[Resource]) -> None:
    """Raise UsageError where a trained model would be lost: one whose adapter was not brought here."""
    for resource in resources:
        folder = ledger.files_of(resource.id)
        if resource.kind == "models" and not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise UsageError(f"the model {resource.id} is nowhere else", "bring it here with `understudy fireworks download`, or give --force")


def remove(hosted: Hosted, resource: Resource) -> None:
    """Delete a resource at Fireworks; one that is gone already counts as deleted. Raises EndpointError."""
    try:
        hosted.api.call(delete(resource.kind, resource.id))
    except ApiError as error:
        if error.status != UNKNOWN:
            raise
    if resource.kind == "deployedModels":
        wait_until_gone(hosted, resource.kind, resource.id)  # a deployment with a loaded model cannot be deleted
    hosted.ledger.saw(resource, DELETED)


def wait_until_gone(hosted: Hosted, kind: Kind, identity: str) -> None:
    """Return once a resource is not there any more; raises EndpointError where that takes too long."""
    deadline = time.monotonic() + hosted.wait_seconds
    while hosted.api.find(kind, identity) is not None:
        if time.monotonic() >= deadline:
            raise EndpointError(f"{kind}/{identity} is still there after {hosted.wait_seconds:g} s", "run the command again")
        hosted.api.sleep(hosted.poll_seconds)
