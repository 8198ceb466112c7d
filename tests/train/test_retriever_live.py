"""The retriever tuned for real on small notes: the new embedder is a new index generation; an interrupted run goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rag.generations import live_generation
from tests.conftest import EMBEDDER, NOTES, workspace_of_notes
from train.checkpoint import newest_checkpoint
from train.recipe import RetrieverRecipe
from train.retriever import Pair, fit_pairs, load_model
from understudy.cli import main
from understudy.files import read_json
from understudy.progress import Progress
from understudy.workspace import Workspace, open_workspace

pytestmark = pytest.mark.training

QUESTIONS = {
    "train": [
        ("When is the kiln fired?", "On Tuesdays.", "fired on Tuesdays"),
        ("How long does the glaze cool?", "Nine hours.", "cools for nine hours"),
        ("Who paints the barn doors?", "The village school.", "by the village school"),
        ("Which colour do the doors get?", "Green.", "painted green every third summer"),
    ],
    "calibration": [("How many carp are put in?", "Forty.", "stocked with forty carp"), ("When is the pond stocked?", "In April.", "forty carp in April")],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    from rag.traces import import_traces
    from train.dataset import build_dataset
    from understudy.progress import show_progress

    root = tmp_path_factory.mktemp("retriever")
    made = workspace_of_notes(root, NOTES)
    real = made.models.resolve()
    made.models.unlink()  # the tuned embedder must not land among the session's models
    made.models.mkdir()
    for model in real.iterdir():
        if not model.name.startswith("."):
            (made.models / model.name).symlink_to(model)
    for split, rows in QUESTIONS.items():
        file = root / f"{split}.jsonl"
        file.write_text("".join(json.dumps({"question": q, "answer": a, "quotes": [quote], "query": quote}) + "\n" for q, a, quote in rows))
        import_traces(made, file, split, show_progress)
    build_dataset(made, seed=0)
    return made


def test_a_tuned_embedder_becomes_a_new_generation(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--workspace", str(workspace.root), "--json"]
    tune = [*command, "retriever", "tune", "name=ours", "batch=4", "epochs=1", "learning_rate=1e-4"]
    assert main(tune) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["n"] for row in result["recall"]} == {2}
    assert len({(row["ranking"], row["k"]) for row in result["recall"]}) == len(result["recall"]) == 8
    folder = workspace.root / result["path"]
    assert (folder / "model.safetensors").is_file()
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".py", ".pt")]
    manifest = read_json(folder / "manifest.json")
    assert (manifest["result"]["digest"], manifest["recipe"]["seed"]) == (result["digest"], 0)
    assert main(tune) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True
    assert main([*tune, "seed=1"]) == 2  # the name is taken

    before = live_generation(workspace.index, "default")
    chosen = [*command, "--set", "models.embedder=ours"]
    assert main([*chosen, "search", "carp"]) == 1  # the index is of another embedder
    assert main([*chosen, "index", "rebuild"]) == 0
    capsys.readouterr()
    assert live_generation(workspace.index, "default") != before
    assert main([*chosen, "search", "How many carp?"]) == 0
    assert "carp" in json.loads(capsys.readouterr().out)["passages"][0]["text"]
    assert open_workspace(str(workspace.root)).config.models.embedder == EMBEDDER


def test_cross_validation_asks_every_question_of_a_model_that_has_not_seen_its_document(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--workspace", str(workspace.root), "--json", "retriever", "tune", "epochs=1", "batch=4"]
    models = sorted(workspace.models.iterdir())
    assert main([*command, "--folds", "2"]) == 0
    captured = capsys.readouterr()
    assert {(row["n"], row["before"] is None) for row in json.loads(captured.out)["recall"]} == {(4, False)}
    assert [line.partition(": ")[2] for line in captured.err.splitlines() if "fold " in line] == ["4 pairs, then 2 questions about 1 other documents"] * 2
    assert sorted(workspace.models.iterdir()) == models
    assert main([*command, "--folds", "3"]) == 2


@pytest.fixture
def little_embedder(workspace: Workspace, tmp_path: Path) -> Path:
    """One random layer under the real tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(workspace.models / EMBEDDER)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), Pooling(16)]).save_pretrained(str(tmp_path / "little"))
    return tmp_path / "little"


def test_a_killed_tuning_goes_on_as_the_one_that_was_not(little_embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.retriever.CHECKPOINT_SECONDS", 0.0)
    recipe = RetrieverRecipe(batch=2, epochs=2)
    pairs = [Pair(f"Who made {i}?", f"The owner of {i} made it.", (f"Nobody made {i + 9}.",), frozenset({f"The owner of {i} made it."})) for i in range(4)]

    def fit(run: Path, stop: int | None = None) -> Any:
        model = load_model(little_embedder)
        return fit_pairs(model, pairs, recipe, run, print, lambda label, total: Stopping(label, total, stop))

    whole = fit(tmp_path / "whole")
    for step in (2, 3):  # killed before this step's checkpoint
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "killed", step)
    resumed = fit(tmp_path / "killed")
    assert (resumed.steps, resumed.losses) == (4, whole.losses)
    wanted, found = (load_file(newest_checkpoint(tmp_path / name) / "state.safetensors") for name in ("whole", "killed"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Stopping(Progress):
    """Ctrl-C after so many steps of the whole run."""

    def __init__(self, label: str, total: int, stop: int | None) -> None:
        super().__init__(label, total)
        self.stop = stop

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        if self.done == self.stop:
            raise KeyboardInterrupt
