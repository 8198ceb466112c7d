"""From dataset to registered adapter over a model of two layers, and from that adapter on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.card import model_card
from train.recipe import Recipe
from train.sft import train
from understudy.adapters import WEIGHTS, find_adapter
from understudy.errors import AdapterError, UnderstudyError
from understudy.files import read_json, read_jsonl, write_json
from understudy.progress import show_progress
from understudy.workspace import Workspace, open_workspace

RECIPE = Recipe(name="first", quantisation="none", rank=4, alpha=8, tokens_per_batch=512, max_steps=3, learning_rate=5e-3)


def run(workspace: Workspace, **changes: Any) -> dict[str, Any]:
    return train(workspace, RECIPE.model_copy(update=changes), lambda _: None, show_progress)


def folder_of(workspace: Workspace, name: str) -> Path:
    return find_adapter(workspace, name)[1]


@pytest.fixture(scope="module")
def trained(make_workspace: Callable[[], Workspace]) -> Path:
    """The folder of a workspace with the adapter `first`."""
    made = make_workspace()
    run(made, report_to=["tensorboard"])
    return made.root


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Workspace:
    """That workspace, for one test to change."""
    return open_workspace(str(shutil.copytree(trained, tmp_path / "w")))


def test_an_adapter_lies_beside_what_tells_of_it(workspace: Workspace) -> None:
    folder = folder_of(workspace, "first")
    assert {path.name for path in folder.iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "manifest.json",
        "training.json",
        "metrics.jsonl",
        "loss.svg",
        "README.md",
        "tensorboard",
    }
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"} < rows[0].keys()
    card = (folder / "README.md").read_text()
    assert "32 rows to learn from" in card
    assert "## Limits" in card
    assert "learning rate" in (folder / "loss.svg").read_text()
    assert not list(workspace.runs.glob("*"))


def test_a_card_says_what_was_learnt_and_by_which_method(workspace: Workspace) -> None:
    manifest, folder = find_adapter(workspace, "first")
    assert "rank 4, alpha 8, q_proj" in (folder / "README.md").read_text()
    tuned = manifest.model_copy(update={"method": "prompt_tuning", "recipe": manifest.recipe | {"steps": ["answer"]}})
    card = model_card(tuned, {"by_step": {"plan": 18, "answer": 12}}, (10, 2))
    assert "answers with verbatim quotes or abstains, over retrieved passages" in card
    assert "10 rows to learn from, 2 for validation, those of answer." in card
    assert "(arXiv:2104.08691): 20 virtual tokens |" in card
    assert "as the conversations did" in model_card(tuned, {"by_step": {"chat": 3}}, (3, 0))


def test_a_finished_run_is_not_trained_again(workspace: Workspace) -> None:
    [key] = [read_json(path)["key"] for path in workspace.adapters.glob("first/*/training.json")]
    (workspace.runs / key).mkdir(parents=True)  # as a run leaves it that is killed once its adapter is whole
    assert run(workspace, report_to=[], checkpoint_minutes=5.0)["reused"]
    assert not list(workspace.runs.glob("*"))


def test_training_goes_on_from_an_adapter_and_remembers_what_that_learnt(workspace: Workspace) -> None:
    first = folder_of(workspace, "first")
    write_json(first / "manifest.json", read_json(first / "manifest.json") | {"group_ids": ["g0"], "question_digests": ["q0"]})
    run(workspace, name="second", warm_start="first", learning_rate=1e-12)
    manifest, second = find_adapter(workspace, "second")
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    assert (manifest.group_ids, manifest.question_digests) == (["g0", "g1"], ["q0", "q1"])
    assert manifest.recipe["warm_start"] == f"first@{first.name[:12]}"


@pytest.mark.parametrize(
    ("changes", "misfit"),
    [
        ({"rank": 8}, "its rank is 4, the recipe's 8"),
        ({"targets": ["q_proj"]}, "its targets is"),
        ({"use_rslora": True}, "its use_rslora is False"),
    ],
)
def test_an_adapter_of_another_shape_is_no_start(workspace: Workspace, changes: dict[str, Any], misfit: str) -> None:
    with pytest.raises(AdapterError, match=misfit):
        run(workspace, name="second", warm_start="first", **changes)


def test_an_adapter_of_another_base_tokenizer_or_template_is_no_start(workspace: Workspace) -> None:
    base = workspace.models / "tiny"
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text() + " ")
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + " ")
    with pytest.raises(AdapterError) as caught:
        run(workspace, name="second", warm_start="first")
    assert all(f"its {part} is" in caught.value.message for part in ("base", "tokenizer", "chat template"))


def test_a_tampered_adapter_or_one_with_a_pickle_is_no_start(workspace: Workspace) -> None:
    folder = folder_of(workspace, "first")
    (folder / "extra.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="never loaded"):
        run(workspace, name="second", warm_start="first")
    (folder / "extra.bin").unlink()
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="not those of its digest"):
        run(workspace, name="second", warm_start="first")


def test_missing_and_extra_tensors_are_refused(make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    from train.warm_start import load_warm_start

    model = make_model(RECIPE)
    whole = get_peft_model_state_dict(model)
    name = next(iter(whole))
    rest = {key: tensor for key, tensor in whole.items() if key != name}
    for odd in (rest, {**whole, "extra": torch.zeros(1)}, {**rest, name: whole[name][:1].contiguous()}):
        save_file(odd, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match="differ in 1 tensors"):
            load_warm_start(model, tmp_path)


def test_an_unknown_start_is_named(workspace: Workspace) -> None:
    with pytest.raises(UnderstudyError, match="no adapter nobody"):
        run(workspace, name="second", warm_start="nobody")
