"""Deployments and what is loaded into them are made once, and deleted in order."""

from __future__ import annotations

import pytest

from serve.fireworks.datasets import upload
from serve.fireworks.hosting import chosen, deploy, load, newest_deployment, remove, status
from serve.fireworks.making import Hosted
from serve.fireworks.requests import DataFile, Hosting, Training
from serve.fireworks.training import train, trained_model
from serve.fireworks.wire import ApiError
from tests.serve.fireworks import faults
from tests.serve.fireworks.conftest import HASTY
from tests.serve.fireworks.server import BASE, HOME, FireworksServer
from understudy.errors import EndpointError, NotFoundError


@pytest.fixture
def served(hosted: Hosted, training: Training) -> tuple[str, str]:
    """A trained model and a deployment that it can be loaded into."""
    model = train(hosted, training, "d1", again=False, is_waiting=True)["model"]
    return model, deploy(hosted, Hosting(BASE, takes_addons=True), again=False, is_waiting=True)["deployment"]


def test_a_deployment_and_what_is_loaded_are_made_once(hosted: Hosted, server: FireworksServer, served: tuple[str, str]) -> None:
    model, deployment = served
    assert deploy(hosted, Hosting(BASE, takes_addons=True), again=False, is_waiting=True)["deployment"] == deployment
    first = load(hosted, model, newest_deployment(hosted, None), is_waiting=True)
    assert first["state"] == "DEPLOYED"
    assert (first["model"], first["deployment"]) == (f"{HOME}/models/{model}", f"{HOME}/deployments/{deployment}")
    assert load(hosted, model, deployment, is_waiting=True) == first
    assert len([each for each in server.made if each.startswith("deploy")]) == 2


def test_a_load_whose_answer_is_lost_is_found_by_looking(hosted: Hosted, server: FireworksServer, served: tuple[str, str]) -> None:
    server.faults = [("POST .*deployedModels", faults.unanswered)]
    assert load(hosted, *served, is_waiting=True)["state"] == "DEPLOYED"
    assert len([each for each in server.asked if each.startswith("POST") and each.endswith("deployedModels")]) == 1


def test_a_load_that_did_not_happen_is_not_repeated_blindly(hosted: Hosted, server: FireworksServer, served: tuple[str, str]) -> None:
    server.faults = [("POST .*deployedModels", faults.status(500))]
    with pytest.raises(ApiError, match="500"):
        load(hosted, *served, is_waiting=True)
    server.faults = [("POST .*deployedModels", faults.status(429))]  # this had no effect for certain
    assert load(hosted, *served, is_waiting=True)["state"] == "DEPLOYED"


def test_a_failed_deployment_says_so(hosted: Hosted, server: FireworksServer) -> None:
    server.deployment_steps = [{"state": "FAILED", "status": {"code": "RESOURCE_EXHAUSTED", "message": "no such accelerators"}}]
    with pytest.raises(EndpointError, match="is FAILED: no such accelerators"):
        deploy(hosted, Hosting(BASE, takes_addons=True, accelerator="NVIDIA_H100_80GB"), again=False, is_waiting=True)
    with pytest.raises(NotFoundError, match="there is no deployment"):
        newest_deployment(hosted, None)


def test_a_trained_model_can_be_deployed_merged(hosted: Hosted, server: FireworksServer, served: tuple[str, str]) -> None:
    merged = deploy(hosted, Hosting(f"{HOME}/models/{served[0]}", takes_addons=False), again=False, is_waiting=True)
    assert "enableAddons" not in server.resources["deployments"][merged["deployment"]]
    assert newest_deployment(hosted, None) == served[1]  # not the merged one


def test_everything_is_deleted_in_order(hosted: Hosted, server: FireworksServer, served: tuple[str, str]) -> None:
    load(hosted, *served, is_waiting=True)
    assert {row["state"] for row in status(hosted)} == {"READY", "COMPLETED", "DEPLOYED"}
    del server.resources["datasets"][next(iter(server.resources["datasets"]))]  # gone already
    for resource in chosen(hosted.ledger, ["all"]):
        remove(hosted, resource)
    assert not any(server.resources.values())
    assert status(hosted) == []
    with pytest.raises(NotFoundError, match="has no models"):
        chosen(hosted.ledger, [f"models/{served[0]}"])


def test_what_was_planned_and_never_made_is_said_to_be(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("POST", faults.status(500))] * HASTY.attempts
    with pytest.raises(ApiError):
        upload(hosted, file, "d1")
    assert [row["state"] for row in status(hosted)] == ["NOT MADE"]


def test_status_follows_a_run(hosted: Hosted, training: Training) -> None:
    train(hosted, training, "d1", again=False, is_waiting=False)
    seen = [next((row["state"], row["percent"]) for row in status(hosted) if "Job" in row["kind"]) for _ in range(4)]
    assert seen == [("CREATING", 0), ("VALIDATING", 0), ("RUNNING", 40), ("COMPLETED", 100)]
    assert trained_model(hosted, None).facts["adapter"] == "handbooks"
