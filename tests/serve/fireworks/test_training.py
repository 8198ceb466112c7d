"""A run is paid once, whatever happens on the way, and its adapter is brought here whole."""

from __future__ import annotations

import pytest

from serve.fireworks.making import Hosted
from serve.fireworks.requests import Job, Training
from serve.fireworks.training import download, train, trained_model
from serve.fireworks.wire import ApiError
from tests.serve.fireworks import faults
from tests.serve.fireworks.conftest import HASTY
from tests.serve.fireworks.server import BASE, Fault, FireworksServer, Handler
from understudy.errors import EndpointError, NotFoundError, UsageError
from understudy.progress import SilentProgress


def test_a_run_is_paid_once(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    first = train(hosted, training, "d1", again=False, is_waiting=True)
    assert first["state"] == "COMPLETED"
    assert first["estimated_cost"] == "USD 2.50"
    assert train(hosted, training, "d1", again=False, is_waiting=True) == first
    assert train(hosted, training, "d1", again=True, is_waiting=True) == first  # it has not failed
    assert [each for each in server.made if "Job" in each] == [f"supervisedFineTuningJobs/{first['job']}"]
    assert trained_model(hosted, None).id == first["model"]


@pytest.mark.parametrize("fault", [faults.unanswered, faults.status(502), faults.half])
def test_a_run_is_paid_once_whatever_the_answer(hosted: Hosted, server: FireworksServer, training: Training, fault: Fault) -> None:
    server.faults = [("POST .*Jobs", fault), ("GET .*Jobs/.", faults.status(500)), ("GET .*Jobs/.", faults.cut_off)]
    assert train(hosted, training, "d1", again=False, is_waiting=True)["state"] == "COMPLETED"
    assert len([each for each in server.made if "Job" in each]) == 1


def test_a_run_that_was_begun_and_never_answered_is_found(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    server.faults = [("POST .*Jobs", faults.unanswered)] + [("Jobs", faults.status(500))] * 9
    with pytest.raises(ApiError):
        train(hosted, training, "d1", again=False, is_waiting=True)
    server.faults = []
    assert train(hosted, training, "d1", again=False, is_waiting=True)["attempt"] == 1
    assert len([each for each in server.made if "Job" in each]) == 1


@pytest.mark.parametrize("state", ["FAILED", "EXPIRED"])
def test_a_failed_run_says_why_and_is_begun_anew_only_when_asked(hosted: Hosted, server: FireworksServer, training: Training, state: str) -> None:
    steps, server.job_steps = server.job_steps, [{"state": f"JOB_STATE_{state}", "status": {"code": "INTERNAL", "message": "out of\nmemory"}}]
    for _ in range(2):
        with pytest.raises(EndpointError, match=f"is {state}: out of memory"):
            train(hosted, training, "d1", again=False, is_waiting=True)
    server.job_steps = steps
    result = train(hosted, training, "d1", again=True, is_waiting=True)
    assert (result["attempt"], result["state"]) == (2, "COMPLETED")
    assert train(hosted, training, "d1", again=False, is_waiting=True) == result
    assert len([each for each in server.made if "Job" in each]) == 2


def test_a_paused_run_is_gone_on_with(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    server.job_steps = [{"state": "JOB_STATE_PAUSED"}, {"state": "JOB_STATE_COMPLETED"}]
    with pytest.raises(EndpointError, match="PAUSED"):
        train(hosted, training, "d1", again=False, is_waiting=True)
    assert train(hosted, training, "d1", again=False, is_waiting=True)["attempt"] == 1


def test_a_slow_run_is_waited_for_next_time(hosted: Hosted, training: Training) -> None:
    impatient = Hosted(hosted.api, hosted.ledger, lambda _: None, SilentProgress, wait_seconds=0)
    with pytest.raises(EndpointError, match="is still CREATING after 0 s"):
        train(impatient, training, "d1", again=False, is_waiting=True)
    assert train(hosted, training, "d1", again=False, is_waiting=True)["state"] == "COMPLETED"


def test_a_run_deleted_elsewhere_is_not_made_again_unasked(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    job = train(hosted, training, "d1", again=False, is_waiting=True)["job"]
    del server.resources["supervisedFineTuningJobs"][job]
    with pytest.raises(NotFoundError, match="was deleted at Fireworks"):
        train(hosted, training, "d1", again=False, is_waiting=True)
    assert train(hosted, training, "d1", again=True, is_waiting=True)["attempt"] == 2


def test_training_needs_its_dataset_there(hosted: Hosted) -> None:
    with pytest.raises(NotFoundError, match="is not at Fireworks yet"):
        train(hosted, Training(name="x", dataset="understudy-0", base_model=BASE), "d1", again=False, is_waiting=True)


@pytest.mark.parametrize(
    "values",
    [{}, {"base_model": BASE, "warm_start": "m"}, {"base_model": BASE, "rank": 3}, {"base_model": BASE, "rank": 65}, {"base_model": BASE, "epochs": 0}],
)
def test_a_training_that_cannot_be_is_refused_here(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Training(name="x", dataset="d", **values)  # type: ignore[arg-type]


def test_every_setting_makes_another_run() -> None:
    plain = Training(name="x", dataset="d", base_model=BASE)
    others = [
        plain,
        Training(name="y", dataset="d", base_model=BASE),
        Training(name="x", dataset="e", base_model=BASE),
        Training(name="x", dataset="d", base_model=BASE, rank=8),
    ]
    assert len({Job(each).id for each in others} | {Job(plain, 2).id}) == 5
    assert all(len(Job(Training(name="n" * 48, dataset="d", base_model=BASE)).output_model) <= 63 for _ in "x")


@pytest.mark.parametrize("fault", [faults.half, faults.status(503)], ids=["half", "503"])
def test_an_adapter_is_brought_here_in_pieces(hosted: Hosted, server: FireworksServer, training: Training, fault: Fault) -> None:
    model = train(hosted, training, "d1", again=False, is_waiting=True)["model"]
    server.faults = [("GET /bucket/.*safetensors", fault)]
    brought = download(hosted, trained_model(hosted, model))
    assert (brought["name"], brought["dataset"]) == ("handbooks", "d1")
    assert sorted(each.name for each in brought["folder"].iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]  # the pickle stays there
    assert (brought["folder"] / "adapter_model.safetensors").read_bytes() == server.files["adapter_model.safetensors"]
    before = len(server.asked)
    download(hosted, trained_model(hosted, None))
    assert len(server.asked) == before


def test_a_download_goes_on_where_it_was_cut_off(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    train(hosted, training, "d1", again=False, is_waiting=True)
    server.faults = [("GET /bucket/.*safetensors", faults.half)] + [("GET /bucket/.*safetensors", faults.cut_off)] * (HASTY.attempts - 1)
    with pytest.raises(ApiError, match="broke"):
        download(hosted, trained_model(hosted, None))
    partial = next(hosted.ledger.folder.glob("models/*/.adapter_model.safetensors.part"))
    assert 0 < partial.stat().st_size < len(server.files["adapter_model.safetensors"])
    folder = download(hosted, trained_model(hosted, None))["folder"]
    assert (folder / "adapter_model.safetensors").read_bytes() == server.files["adapter_model.safetensors"]


def test_another_part_than_was_asked_for_is_refused(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    model = train(hosted, training, "d1", again=False, is_waiting=True)["model"]
    partial = hosted.ledger.files_of(model) / ".adapter_model.safetensors.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files["adapter_model.safetensors"][:100])

    def odd(handler: Handler) -> bool:
        handler.headers.replace_header("Range", "bytes=50-")
        handler.answer()
        return True

    server.faults = [("GET /bucket/.*safetensors", odd)]
    with pytest.raises(ApiError, match="another part of the file"):
        download(hosted, trained_model(hosted, None))
    assert partial.stat().st_size == 100


def test_a_model_without_an_adapter_is_refused(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    train(hosted, training, "d1", again=False, is_waiting=True)
    server.files = {"model.safetensors": b"x"}
    with pytest.raises(EndpointError, match=r"no adapter_config.json and no adapter_model.safetensors"):
        download(hosted, trained_model(hosted, None))
