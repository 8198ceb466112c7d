"""The memory that training keeps and gives back."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from pathlib import Path
import torch
from train.base import give_back_freed_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

keep_freed_memory()
before = resident()
held = [torch.ones(250_000) for _ in range(100)]
last = torch.ones(1000)  # above them, so that their memory is a gap
del held
kept = resident()
give_back_freed_memory()
print(kept - before, resident() - before)
"""


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    kept, left = map(int, done.stdout.split())
    assert kept > 90e6 > 20e6 > left
