"""The hosted path against a strict server: what is made, that it is made once, and what becomes of faults. Nothing here has met the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.fireworks import datasets as dataset_module
from serve.fireworks.api import Account, Api, account_of, open_api
from serve.fireworks.datasets import upload
from serve.fireworks.hosting import chosen, deploy, load, newest_deployment, remove, status
from serve.fireworks.ledger import Ledger
from serve.fireworks.making import Hosted
from serve.fireworks.requests import DataFile, Hosting, Job, Training, data_files
from serve.fireworks.training import download, train, trained_model
from serve.fireworks.wire import ApiError
from tests.serve import fireworks_server as faults
from tests.serve.fireworks_server import ACCOUNT, BASE, HOME, KEY, FireworksServer, fireworks_server
from understudy.client import Patience
from understudy.errors import EndpointError, NotFoundError, StorageError, TrainingError, UsageError
from understudy.progress import SilentProgress
from understudy.workspace import Workspace, create_workspace

HASTY = Patience(seconds=5, attempts=4, first_pause=0.001)
ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}


@pytest.fixture
def server() -> Iterator[FireworksServer]:
    with fireworks_server() as made:
        made.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 400, "training_args.bin": b"\x80\x04."}
        yield made
        assert not made.leaks


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "workspace"))


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here ends between a write and its being durable; test_fireworks_killed.py does."""
    monkeypatch.setattr("understudy.files.os.fsync", lambda _: None)


@pytest.fixture
def pauses() -> list[float]:
    """The seconds that were slept."""
    return []


@pytest.fixture
def hosted(server: FireworksServer, workspace: Workspace, pauses: list[float]) -> Iterator[Hosted]:
    with Api(Account(server.url, ACCOUNT, "FIREWORKS_API_KEY"), KEY, HASTY, pauses.append) as api:
        yield Hosted(api, Ledger(workspace, ACCOUNT), lambda _: None, SilentProgress, wait_seconds=5)


@pytest.fixture
def file(tmp_path: Path) -> DataFile:
    return rows_file(tmp_path, 5)


def rows_file(folder: Path, count: int) -> DataFile:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(count)))
    return data_files(path)[0]


@pytest.fixture
def training(hosted: Hosted, file: DataFile) -> Training:
    """Of a dataset that is there."""
    upload(hosted, file, "d1")
    return Training(name="handbooks", dataset=file.id, base_model=BASE, epochs=2, rank=8, learning_rate=1e-4)


def test_a_dataset_is_sent_once(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    first, second = upload(hosted, file, "d1"), upload(hosted, file, "d1")
    assert first == {"id": file.id, "split": "train", "rows": 5, "bytes": file.path.stat().st_size, "state": "READY", "sent": True}
    assert second["sent"] is False
    assert server.sent == [file.id]
    assert server.made == [f"datasets/{file.id}"]


def test_a_dataset_is_known_without_the_ledger(hosted: Hosted, server: FireworksServer, file: DataFile, tmp_path: Path) -> None:
    upload(hosted, file, "d1")
    for each in hosted.ledger.folder.iterdir():
        each.unlink()
    assert upload(hosted, file, "d1")["sent"] is False
    assert upload(hosted, rows_file(tmp_path, 6), "d2")["sent"] is True  # other rows are another dataset
    assert len(server.sent) == 2


def test_a_deleted_dataset_is_sent_again(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    upload(hosted, file, "d1")
    server.resources["datasets"].clear()
    assert upload(hosted, file, "d1")["sent"] is True
    assert len(server.sent) == 2


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("GET .*datasets/", faults.half),
        ("GET .*datasets/", faults.status(503)),
        ("POST .*datasets$", faults.unanswered),
        ("POST .*datasets$", faults.status(429)),
        ("POST .*:upload", faults.cut_off),
        ("POST .*:upload", faults.unanswered),
    ],
)
def test_an_upload_outlives_faults(hosted: Hosted, server: FireworksServer, file: DataFile, fault: faults.Fault, step: str) -> None:
    server.faults = [(step, fault)]
    assert upload(hosted, file, "d1")["state"] == "READY"
    assert server.made == [f"datasets/{file.id}"]
    assert len(server.sent) <= 2  # the same bytes again, where their arrival was not answered


def test_an_upload_that_was_taken_and_not_answered_counts(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.dataset_steps = []
    server.faults = [("POST .*:upload", lambda _: server.resources["datasets"][file.id].update(state="READY") or False)]
    assert upload(hosted, file, "d1")["state"] == "READY"


def test_a_large_file_goes_to_a_signed_url(hosted: Hosted, server: FireworksServer, file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "LARGEST_UPLOAD", 100)
    server.upload_limit = 100
    server.faults = [("PUT /bucket", faults.cut_off), ("PUT /bucket", faults.status(503))]
    assert upload(hosted, file, "d1")["state"] == "READY"
    assert [each.split(":")[-1] for each in server.asked if ":" in each] == ["getUploadEndpoint", "validateUpload"]
    assert server.stored[file.id] == file.path.read_bytes()


def test_an_interrupted_upload_is_gone_on_with(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("POST .*:upload", faults.cut_off)] * HASTY.attempts
    with pytest.raises(ApiError, match="broke the connection"):
        upload(hosted, file, "d1")
    assert upload(hosted, file, "d1")["sent"] is True
    assert (server.made, server.sent) == ([f"datasets/{file.id}"], [file.id])


def test_rows_that_were_taken_are_not_sent_again(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.dataset_steps = [{"state": "UPLOADING"}, {"state": "UPLOADING"}, {"state": "READY"}]
    server.faults = [("GET .*datasets/", lambda _: False)] + [("GET .*datasets/", faults.status(500))] * HASTY.attempts
    with pytest.raises(ApiError, match="500"):
        upload(hosted, file, "d1")
    assert upload(hosted, file, "d1")["state"] == "READY"
    assert server.sent == [file.id]


def test_rows_that_are_refused_are_said_to_be(hosted: Hosted, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "judge", "content": "x"}]}\n' * 3)
    with pytest.raises(EndpointError, match="was refused: rows are not conversations"):
        upload(hosted, data_files(path)[0], "d1")


def test_a_dataset_of_another_size_is_not_taken_for_ours(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    upload(hosted, file, "d1")
    server.resources["datasets"][file.id]["exampleCount"] = "4"
    with pytest.raises(EndpointError, match="has 4 rows at Fireworks"):
        upload(hosted, file, "d1")


def test_a_dataset_that_stays_unready_is_sent_anew(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.dataset_steps = [{"state": "UPLOADING"}] * 50
    with pytest.raises(EndpointError, match="is still UPLOADING"):
        upload(Hosted(hosted.api, hosted.ledger, lambda _: None, SilentProgress, wait_seconds=0), file, "d1")
    server.dataset_steps = [{"state": "READY"}]
    assert upload(hosted, file, "d1")["state"] == "READY"
    assert len(server.sent) == 2


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="fewer than 3"):
        rows_file(tmp_path, 2)


def test_a_short_validation_file_is_left_out(tmp_path: Path) -> None:
    rows_file(tmp_path, 5)
    (tmp_path / "validation.jsonl").write_text(json.dumps(ROW) + "\n")
    assert [each.split for each in data_files(tmp_path)] == ["train"]


def test_a_run_is_paid_once(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    first = train(hosted, training, "d1", again=False, is_waiting=True)
    assert first["state"] == "COMPLETED"
    assert first["estimated_cost"] == "USD 2.50"
    assert train(hosted, training, "d1", again=False, is_waiting=True) == first
    assert train(hosted, training, "d1", again=True, is_waiting=True) == first  # it has not failed
    assert [each for each in server.made if "Job" in each] == [f"supervisedFineTuningJobs/{first['job']}"]
    assert trained_model(hosted, None).id == first["model"]


@pytest.mark.parametrize("fault", [faults.unanswered, faults.status(502), faults.half])
def test_a_run_is_paid_once_whatever_the_answer(hosted: Hosted, server: FireworksServer, training: Training, fault: faults.Fault) -> None:
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
def test_an_adapter_is_brought_here_in_pieces(hosted: Hosted, server: FireworksServer, training: Training, fault: faults.Fault) -> None:
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


def test_a_model_without_an_adapter_is_refused(hosted: Hosted, server: FireworksServer, training: Training) -> None:
    train(hosted, training, "d1", again=False, is_waiting=True)
    server.files = {"model.safetensors": b"x"}
    with pytest.raises(EndpointError, match=r"no adapter_config.json and no adapter_model.safetensors"):
        download(hosted, trained_model(hosted, None))


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


def test_retry_after_is_honoured(hosted: Hosted, server: FireworksServer, file: DataFile, pauses: list[float]) -> None:
    server.faults = [("GET", faults.status(429, Retry_After="30"))]
    upload(hosted, file, "d1")
    assert 30 <= pauses[0] <= 33
    server.faults = [("GET", faults.status(429, Retry_After="3600"))]
    with pytest.raises(ApiError, match="429"):
        upload(hosted, file, "d1")


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"\xff", b"[" * 100_000, b"x" * (17 << 20)], ids=["html", "list", "no text", "deep", "long"])
def test_an_answer_that_is_none_is_an_error(hosted: Hosted, server: FireworksServer, file: DataFile, answer: bytes) -> None:
    def odd(handler: faults.Handler) -> bool:
        handler.send(200, answer)
        return True

    server.faults = [("GET", odd)]
    with pytest.raises(ApiError, match=r"not JSON|JSON object|longer than"):
        upload(hosted, file, "d1")


def test_a_redirect_is_not_followed(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("GET", faults.status(307, Location=f"{server.url}/bucket/trap"))]
    with pytest.raises(ApiError, match="a redirect, which is not followed"):
        upload(hosted, file, "d1")
    assert not server.leaks


def test_a_key_in_an_answer_is_blotted_out(hosted: Hosted, server: FireworksServer, file: DataFile) -> None:
    server.faults = [("GET", faults.status(400, f"bad key {KEY}"))]
    with pytest.raises(ApiError) as caught:
        upload(hosted, file, "d1")
    assert KEY not in f"{caught.value.message} {caught.value.__cause__} {caught.value.__context__}"


def test_a_damaged_ledger_is_refused(hosted: Hosted, file: DataFile) -> None:
    upload(hosted, file, "d1")
    (hosted.ledger.folder / f"{ACCOUNT}.json").write_text('[{"kind": "moons"}]')
    with pytest.raises(StorageError, match="is not a list of resources"):
        upload(hosted, file, "d1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("offline: true\nfireworks: {account: acme}", "this workspace is offline"),
        ("", "account is not set"),
        ("fireworks: {account: acme, url: 'http://192.0.2.1'}", "not encrypted"),
        ("fireworks: {account: acme}", "no key for Fireworks"),
    ],
)
def test_it_is_refused_before_any_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, message: str) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    made = create_workspace(str(tmp_path / "w"), settings)
    with pytest.raises((UsageError, NotFoundError), match=message):
        open_api(made.config)


def test_an_account_is_an_id(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fireworks\.account"):
        create_workspace(str(tmp_path / "w"), "fireworks: {account: '../x'}")
    assert account_of(create_workspace(str(tmp_path / "v"), "fireworks: {account: acme}").config).id == "acme"


def test_a_signed_url_without_encryption_is_refused(tmp_path: Path) -> None:
    with Api(Account("https://api.example.invalid", ACCOUNT, "K"), KEY, HASTY) as api, pytest.raises(ApiError, match="without encryption"):
        api.fetch_file("http://192.0.2.1/adapter", tmp_path / "x")
