"""Train in processes that are killed, until one comes through: `python -m tests.train.killed_runs WORKSPACE SEED`, run by test_killed.py.

Everything is imported once, and each run is a fork. The first half dies by SIGKILL inside the write of a checkpoint, at a file's sync that
the seed draws; the second half at a moment that it draws.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable

import peft  # noqa: F401 - forks have it at once
import torch
import transformers  # noqa: F401

import train.card
from train.recipe import Recipe
from train.sft import train as train_adapter
from understudy.progress import show_progress
from understudy.workspace import open_workspace

RECIPE = Recipe(
    name="tiny", quantisation="none", rank=4, alpha=8, tokens_per_batch=512, max_steps=6, learning_rate=5e-3, lora_dropout=0.1, checkpoint_minutes=1e-9
)
KILLS = 6


def die_at_sync(number: int) -> None:
    """Be killed at the sync of so many files from now on."""
    whole, left = os.fsync, iter(range(number))

    def sync(descriptor: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(descriptor)

    os.fsync = sync


def fork(run: Callable[[], object]) -> int:
    """The child's id."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return child


def main(root: str, seed: int) -> None:
    """Kill KILLS runs, then let one end."""
    torch.set_num_threads(1)
    rng = random.Random(seed)

    def run() -> object:
        return train_adapter(open_workspace(root), RECIPE, lambda line: print(line, flush=True), show_progress)

    for kill in range(KILLS):
        in_write = kill < KILLS // 2
        drawn = rng.randrange(2, 14)

        def killed(in_write: bool = in_write, drawn: int = drawn) -> None:
            if in_write:
                die_at_sync(drawn)
            run()

        child = fork(killed)
        if not in_write:
            time.sleep(rng.uniform(0.1, 1.0))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("killed" if status == -signal.SIGKILL else f"ended {status}", flush=True)
    run()


if __name__ == "__main__":
    assert train.card
    main(sys.argv[1], int(sys.argv[2]))
