"""A hosted training run: begun once, watched until its model is ready, and the model's files brought here."""

from __future__ import annotations

import time
from pathlib import PurePosixPath
from typing import Any

from serve.fireworks.ledger import Resource, state_of
from serve.fireworks.making import GOOD, Hosted, check, cost_of, ensure, latest_attempt, percent_of, wait
from serve.fireworks.requests import Job, Request, Training, create_job, download_endpoint, get, last_part
from understudy.adapters import CONFIG, WEIGHTS
from understudy.errors import EndpointError, NotFoundError


def train_requests(account: str, training: Training) -> list[Request]:
    """What `train` asks for a run that was never begun, in order; the last two again and again."""
    job = Job(training)
    datasets = [get("datasets", each) for each in (training.dataset, training.evaluation) if each]
    return [*datasets, create_job(account, job), get("supervisedFineTuningJobs", job.id), get("models", job.output_model)]


def train(hosted: Hosted, training: Training, dataset: str, again: bool, is_waiting: bool) -> dict[str, Any]:
    """Begin a run, or go on with the one that was begun for the same training; the result is the command's JSON.

    `dataset` is the digest of the dataset here. With `again` a run that failed is begun anew. Raises NotFoundError where the dataset
    was not uploaded, EndpointError where the run fails.
    """

    def resource_of(attempt: int) -> Resource:
        job = Job(training, attempt)
        facts = {"dataset": dataset, "adapter": training.name, "model": job.output_model}
        return Resource(kind="supervisedFineTuningJobs", id=job.id, facts=facts, created_at=time.time())

    for identity in filter(None, (training.dataset, training.evaluation)):
        found = hosted.api.find("datasets", identity)
        if found is None or state_of(found) != "READY":
            raise NotFoundError(f"the dataset {identity} is not at Fireworks yet", "run `understudy fireworks upload` first")
    attempt = latest_attempt(hosted, resource_of, again)
    resource, job = resource_of(attempt), Job(training, attempt)
    found = ensure(hosted, resource, create_job(hosted.api.account.id, job))
    if cost := cost_of(found):
        hosted.report(f"estimated cost: {cost}")
    if is_waiting:
        found = wait(hosted, resource, found)
        wait(hosted, enter_model(hosted, resource, found), _model(hosted, model_of(resource, found)))
    else:
        check(resource, found)
    return {
        "job": job.id,
        "state": state_of(found),
        "percent": 100 if state_of(found) in GOOD else percent_of(found),
        "model": model_of(resource, found),
        "estimated_cost": cost_of(found),
        "attempt": attempt,
        "dataset": dataset,
        "adapter": training.name,
    }


def model_of(resource: Resource, found: dict[str, Any]) -> str:
    """The id of the model that a job makes: as the server says, else as was asked."""
    return last_part(str(found.get("outputModel") or resource.facts["model"]))


def enter_model(hosted: Hosted, job: Resource, found: dict[str, Any]) -> Resource:
    """The job's model in the ledger."""
    identity = model_of(job, found)
    facts = {"dataset": job.facts["dataset"], "adapter": job.facts["adapter"], "job": job.id}
    known = hosted.ledger.get("models", identity)
    return known or hosted.ledger.put(Resource(kind="models", id=identity, state="STATE_UNSPECIFIED", facts=facts, created_at=time.time()))


def _model(hosted: Hosted, identity: str) -> dict[str, Any]:
    found = hosted.api.find("models", identity)
    if found is None:
        raise EndpointError(
            f"the run has ended, and there is no model {identity}", "run the same command again; if that does not help, see the job at Fireworks"
        )
    return found


def trained_model(hosted: Hosted, name: str | None) -> Resource:
    """The model of this id, or the newest that was trained; raises NotFoundError."""
    models = [each for each in hosted.ledger.all("models") if name in (None, each.id)]
    if models:
        return models[-1]
    raise NotFoundError(
        f"no model {name} was trained from this workspace" if name else "no model was trained at Fireworks yet",
        "`understudy fireworks status` lists what there is; `understudy fireworks train` makes one, and waits for it",
    )


def download(hosted: Hosted, model: Resource) -> dict[str, Any]:
    """Bring a trained model's adapter here: its configuration and weights, nothing else of it.

    What is here already is not brought again. Raises EndpointError where the model is not ready, or has no adapter.
    """
    folder = hosted.ledger.files_of(model.id)
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        found = _model(hosted, model.id)
        hosted.ledger.saw(model, state_of(found))
        if state_of(found) != "READY":
            raise EndpointError(f"the model {model.id} is {state_of(found)}", "run `understudy fireworks train` again: it waits until the model is ready")
        urls = urls_of(hosted.api.call(download_endpoint(model.id)), model.id)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                with hosted.show_progress(f"{name} (bytes)", 0) as progress:
                    hosted.api.fetch_file(urls[name], folder / name, progress)
    return {"model": model.id, "folder": folder, "name": model.facts["adapter"], "dataset": model.facts["dataset"]}


def urls_of(answer: dict[str, Any], model: str) -> dict[str, str]:
    """The URLs of an adapter's two files, by their names without folders; raises EndpointError where one is not there."""
    urls = answer.get("filenameToSignedUrls")
    named = {PurePosixPath(str(path)).name: str(url) for path, url in urls.items()} if isinstance(urls, dict) else {}
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in named]:
        raise EndpointError(f"the model {model} has no {' and no '.join(missing)}", "is it a LoRA model? only those can be brought here")
    return {name: named[name] for name in (CONFIG, WEIGHTS)}
