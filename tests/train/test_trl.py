"""TRL trains on a built dataset as it lies on disk, on the very tokens that training here sees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rag.prompts import example_messages
from tests.conftest import BASE
from train.dataset import epoch_zero, newest_dataset, read_dataset
from understudy.chat import encode_example
from understudy.workspace import Workspace

pytestmark = [pytest.mark.training, pytest.mark.timeout(900)]
ROWS = 2


def test_trl_trains_on_the_rows_unchanged(trained_workspace: Workspace, tmp_path: Path) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder, base = newest_dataset(trained_workspace), str(trained_workspace.models / BASE)
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    settings = SFTConfig(output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=1, bf16=False, use_cpu=True, report_to="none", seed=0)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=base, args=settings, train_dataset=rows.select(range(ROWS)), peft_config=adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples, passages, _ = read_dataset(folder)
    shown = [epoch_zero(example, 0) for example in examples if example.split == "train"]
    for row, example in zip(trainer.train_dataset, shown[:ROWS], strict=True):
        ours = encode_example(tokenizer, example_messages(example, passages), example.target).ids
        assert row["input_ids"][: len(ours)] == ours
        assert tokenizer.decode(row["input_ids"][len(ours) :]).strip() == ""  # the template's line break after the end of turn
    assert math.isfinite(trainer.train().training_loss)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
