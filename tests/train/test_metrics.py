"""Where a run's metrics go, and that a run that goes on has each step once."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.metrics import FILE, GROUP, Metrics
from understudy.errors import UsageError
from understudy.files import read_jsonl

PLUGIN = """
class Kept:
    def __init__(self, run, steps):
        self.file = (run / "plugin.txt").open("a")
    def log(self, row):
        self.file.write(f"{row['step']} ")
    def close(self):
        self.file.close()
"""


def log(run: Path, report_to: list[str], done: int, steps: range) -> None:
    with Metrics(run, report_to, done) as metrics:
        for step in steps:
            metrics.log({"step": step, "loss": step / 2, "learning_rate": 1e-3})


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    log(tmp_path, [], 0, range(1, 6))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    log(tmp_path, [], 3, range(4, 7))
    assert [row["step"] for row in read_jsonl(tmp_path / FILE)] == [1, 2, 3, 4, 5, 6]


def test_of_several_processes_only_the_main_one_writes(tmp_path: Path) -> None:
    with Metrics(tmp_path, ["tensorboard"], 0, is_main=False) as metrics:
        metrics.log({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_scalar(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    log(tmp_path, ["tensorboard"], 0, range(1, 3))
    [file] = (tmp_path / "tensorboard").iterdir()
    content, found, place = file.read_bytes(), [], 0
    while place < len(content):  # a TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, round(value.simple_value, 6)) for value in event.summary.value]
        place += length + 16
    assert sorted(found) == [("train/learning_rate", 1, 1e-3), ("train/learning_rate", 2, 1e-3), ("train/loss", 1, 0.5), ("train/loss", 2, 1.0)]


def test_an_installed_plugin_is_a_reporter_and_an_unknown_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "keeper-1.dist-info").mkdir(parents=True)
    (site / "keeper.py").write_text(PLUGIN)
    (site / "keeper-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: keeper\nVersion: 1\n")
    (site / "keeper-1.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nkeeper = keeper:Kept\n")
    monkeypatch.syspath_prepend(str(site))
    log(tmp_path, ["keeper"], 0, range(1, 4))
    assert (tmp_path / "plugin.txt").read_text() == "1 2 3 "
    with pytest.raises(UsageError, match="no reporter wandb"):
        log(tmp_path, ["wandb"], 0, range(0))
