"""Training as real processes: killed and started again, interrupted from a terminal, and two of them as one run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.processes import Processes
from train.recipe import Recipe
from train.sft import train
from understudy.adapters import WEIGHTS, find_adapter
from understudy.errors import UsageError
from understudy.files import read_jsonl
from understudy.progress import show_progress
from understudy.workspace import Workspace

from .killed_runs import KILLS, RECIPE

SETTINGS = [f"{key}={json.dumps(value)}" for key, value in RECIPE.model_dump(exclude_defaults=True).items()]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def adapter_of(workspace: Workspace) -> Path:
    return find_adapter(workspace, RECIPE.name)[1]


@pytest.mark.training
def test_killed_again_and_again_it_ends_with_the_adapter_of_the_uninterrupted_run(make_workspace: Callable[[], Workspace]) -> None:
    whole, killed = make_workspace(), make_workspace()
    train(whole, RECIPE, lambda _: None, show_progress)
    seed = random.randrange(10**6)
    command = [sys.executable, "-m", "tests.train.killed_runs", str(killed.root), str(seed)]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed\n") >= KILLS // 2, f"seed {seed}: {done.stdout}"
    assert "resuming at step" in done.stdout
    assert adapter_of(killed).name == adapter_of(whole).name, f"seed {seed}: another digest, so another weight"
    assert [row["loss"] for row in read_jsonl(adapter_of(killed) / "metrics.jsonl")] == [row["loss"] for row in read_jsonl(adapter_of(whole) / "metrics.jsonl")]


@pytest.mark.training
def test_ctrl_c_is_130_and_the_same_command_goes_on(make_workspace: Callable[[], Workspace]) -> None:
    workspace = make_workspace()
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "train", *SETTINGS, "max_steps=null", "epochs=20"]
    running = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    assert running.stderr
    while not list(workspace.runs.glob("*/checkpoint-*")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.stderr.read()
    assert running.wait() == 130
    assert "stopped after step" in said
    assert "run the same command again: it goes on where it stopped" in said
    [folder] = workspace.runs.glob("*/checkpoint-*")
    assert f"stopped after step {int(folder.name.removeprefix('checkpoint-'))}" in said


@pytest.mark.training
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_the_adapter_of_one(fsdp: bool, make_workspace: Callable[[], Workspace]) -> None:
    recipe = RECIPE.model_copy(update={"batches_per_step": 3, "max_steps": 4, "lora_dropout": 0.0, "fsdp": fsdp})  # two batches for one, one for the other
    one, two = make_workspace(), make_workspace()
    train(one, recipe.model_copy(update={"fsdp": False}), lambda _: None, show_progress)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launch, "understudy.cli", "--workspace", str(two.root), "train"]
    settings = [f"{key}={json.dumps(value)}" for key, value in recipe.model_dump(exclude_defaults=True).items()]
    done = subprocess.run([*command, *settings, "--json"], env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ("each of 2 processes holds 7,744 of the layers' 15,488 weights" in done.stderr) == fsdp
    assert json.loads(done.stdout)["steps"] == 4  # one process prints
    found, wanted = load_file(adapter_of(two) / WEIGHTS), load_file(adapter_of(one) / WEIGHTS)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7) for name in wanted)
    losses = [[row["loss"] for row in read_jsonl(adapter_of(workspace) / "metrics.jsonl")] for workspace in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_processes_with_nothing_to_do_or_to_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    processes.check(Recipe())
    monkeypatch.setattr(processes, "count", 4)
    with pytest.raises(UsageError, match="batches_per_step=2 leaves some of 4 processes idle"):
        processes.check(Recipe(batches_per_step=2))
    with pytest.raises(UsageError, match="fsdp shares the base out among processes, and this is one"):
        Processes().check(Recipe(fsdp=True, quantisation="none"))
