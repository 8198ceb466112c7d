"""A dataset is sent once, whatever happens on the way. Nothing here has met the real service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.fireworks import datasets as dataset_module
from serve.fireworks.datasets import upload
from serve.fireworks.making import Hosted
from serve.fireworks.requests import DataFile, data_files
from serve.fireworks.wire import ApiError
from tests.serve.fireworks import faults
from tests.serve.fireworks.conftest import HASTY, ROW, rows_file
from tests.serve.fireworks.server import Fault, FireworksServer
from understudy.errors import EndpointError, TrainingError
from understudy.progress import SilentProgress


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
def test_an_upload_outlives_faults(hosted: Hosted, server: FireworksServer, file: DataFile, fault: Fault, step: str) -> None:
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
