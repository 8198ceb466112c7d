"""A dataset built here, trained a few steps by plain TRL, gives an adapter that is imported, proven and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serve.engine import served_models
from tests.conftest import BASE, SERVED_BASE, Served
from train.dataset import newest_dataset
from understudy.adapters import find_adapter
from understudy.cli import main
from understudy.workspace import Workspace

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.timeout(600)]

STEPS, ROWS_A_STEP, RANK = 8, 2, 8


def train_with_trl(rows: Path, base: Path, folder: Path) -> None:
    """SFTTrainer as its documentation has it, on our file as it is; its shortest rows, to be quick."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    shortest = sorted(range(len(dataset)), key=lambda i: sum(len(m["content"]) for m in dataset[i]["messages"]))[: STEPS * ROWS_A_STEP]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS_A_STEP, learning_rate=2e-3, bf16=True, use_cpu=True, report_to="none",
            save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=dataset.select(shortest),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


def test_an_adapter_that_plain_trl_trained_on_our_dataset_is_imported_proven_and_served(
    engine_session: Served, trained_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = newest_dataset(trained_workspace)
    train_with_trl(dataset / "train.jsonl", trained_workspace.models / SERVED_BASE, tmp_path / "trl")
    assert (tmp_path / "trl" / "training_args.bin").exists()  # TRL's pickle: not to be loaded or taken along
    command = ["--workspace", str(trained_workspace.root), "--json"]
    capsys.readouterr()
    assert main([*command, "adapters", "import", str(tmp_path / "trl"), "--name", "theirs", "--dataset", dataset.name]) == 0
    imported = json.loads(capsys.readouterr().out)
    assert (imported["base"], imported["served_base"], imported["lineage"]) == (BASE, f"models/{SERVED_BASE}", "stated")
    folder = trained_workspace.root / imported["path"]
    try:
        assert not list(folder.glob("*.bin"))
        code = main([*command, "prove", "theirs"])
        proof = json.loads(capsys.readouterr().out)
        print(json.dumps(proof, indent=1))
        assert code == 0 and proof["passed"]
        assert find_adapter(trained_workspace, "theirs")[0].served_name == imported["adapter"]
        assert imported["adapter"] in served_models(engine_session.running.url)
    finally:
        shutil.rmtree(folder.parent)
