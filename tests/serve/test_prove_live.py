"""The proof against real vLLM: a really trained adapter is proven, and what only looks like it is not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from serve.arguments import ServedAdapter
from serve.command import engine_for
from serve.engine import load_adapter, plan_engine, served_models
from serve.gateway.catalogue import find_fault
from serve.matrix import MATRIX, measure_matrix
from serve.measured import trial_engine
from serve.merge import merged_spec
from serve.prove import MERGED_PROOF, PROOF, prove
from serve.repeat import ask_again
from tests.conftest import Served
from train.exchange import export_adapter
from understudy.adapters import WEIGHTS, adapter_digest, find_adapter
from understudy.cli import main
from understudy.engines import RunningEngine
from understudy.errors import EngineError, NotFoundError
from understudy.files import read_json, write_json
from understudy.progress import show_progress
from understudy.workspace import Workspace

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.timeout(900)]

CHECKS = ["files", "base", "listed", "token_ids", "nearer_to_trained", "within_engine_noise", "engine_noise", "changes_the_base", "canary"]


def failed(result: dict[str, Any]) -> set[str]:
    """Names of the checks that did not pass; the figures are shown when the test fails."""
    print(json.dumps(result, indent=1))
    return {check["name"] for check in result["checks"] if not check["passed"]}


def register_copy(workspace: Workspace, name: str, strength: float = 1.0) -> Path:
    """The trained adapter under another name with its lora_B scaled, as its own files and digest have it."""
    trained, source = find_adapter(workspace, "tiny")
    scratch = workspace.root / "copy"
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(PROOF))
    if strength != 1.0:
        weights = {key: value * (strength if "lora_B" in key else 1.0) for key, value in load_file(scratch / WEIGHTS).items()}
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
    digest = adapter_digest(scratch, trained.served_base_digest)
    write_json(scratch / "manifest.json", trained.model_copy(update={"name": name, "digest": digest, "created_at": 10.0}).model_dump())
    folder = workspace.adapters / name / digest
    folder.parent.mkdir(parents=True)
    return scratch.rename(folder)


def serve_under(workspace: Workspace, running: RunningEngine, name: str, folder: Path) -> str:
    """Make the engine serve the weights of `folder` under the served name of adapter `name`."""
    manifest, _ = find_adapter(workspace, name)
    load_adapter(running.url, ServedAdapter(manifest.served_name, folder, manifest.rank))
    return manifest.served_name


@pytest.fixture(scope="module")
def running(engine_session: Served, trained_workspace: Workspace) -> RunningEngine:
    """The session's engine, which serves the trained adapter too."""
    with engine_for(trained_workspace, lambda stage: pytest.fail(f"started another engine: {stage}")) as engine:
        assert engine.pid == engine_session.running.pid
        return engine


def test_the_trained_adapter_is_proven(running: RunningEngine, trained_workspace: Workspace) -> None:
    result = prove(trained_workspace, "tiny", running, print, show_progress)
    assert failed(result) == set()
    assert [check["name"] for check in result["checks"]] == CHECKS
    manifest, folder = find_adapter(trained_workspace, "tiny")
    assert result == read_json(folder / PROOF)
    assert (result["passed"], result["adapter"], result["digest"]) == (True, manifest.served_name, manifest.digest)
    assert result["measured"]["rows"] == 16
    sample = result["measured"]["sample"]
    assert ask_again(running, result["adapter"], sample) == ""  # a served adapter repeats its own proof, and no other's
    assert "does not repeat" in ask_again(running, running.base, sample)


def test_an_adapter_of_zeros_is_not_proven(running: RunningEngine, trained_workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, which must exit with 3."""
    folder = register_copy(trained_workspace, "zeroed", strength=0.0)
    assert main(["--workspace", str(trained_workspace.root), "--json", "prove", "zeroed"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert failed(result) >= {"nearer_to_trained", "changes_the_base"}
    assert failed(result).isdisjoint({"files", "base", "listed", "token_ids", "engine_noise"})
    assert result["adapter"] in served_models(running.url)
    assert read_json(folder / PROOF)["passed"] is False


def test_another_adapter_under_its_name_is_not_proven(running: RunningEngine, trained_workspace: Workspace, engine_session: Served) -> None:
    register_copy(trained_workspace, "swapped")
    _, other = find_adapter(trained_workspace, engine_session.adapter)
    serve_under(trained_workspace, running, "swapped", other)
    assert failed(prove(trained_workspace, "swapped", running, print, show_progress)) >= {"listed", "within_engine_noise"}


def test_the_adapter_at_four_fifths_of_its_strength_is_not_proven(running: RunningEngine, trained_workspace: Workspace, tmp_path: Path) -> None:
    """Nearer to the adapter than to the base, and yet not what was trained: a wrong scale, or a part left out."""
    folder = register_copy(trained_workspace, "weaker")
    weak = tmp_path / "weak"
    shutil.copytree(folder, weak)
    save_file({key: value * (0.8 if "lora_B" in key else 1.0) for key, value in load_file(weak / WEIGHTS).items()}, weak / WEIGHTS, metadata={"format": "pt"})
    serve_under(trained_workspace, running, "weaker", weak)
    assert failed(prove(trained_workspace, "weaker", running, print, show_progress)) == {"listed", "within_engine_noise"}


@pytest.mark.parametrize("tampered", ["manifest.json", WEIGHTS])
def test_one_byte_that_is_not_its_own_ends_the_proof(running: RunningEngine, trained_workspace: Workspace, tampered: str) -> None:
    folder = register_copy(trained_workspace, f"tampered-{len(tampered)}")
    content = bytearray((folder / tampered).read_bytes())
    place = content.index(folder.name.encode()) if tampered == "manifest.json" else len(content) - 1
    content[place] = ord("0") if content[place] != ord("0") else ord("1")
    (folder / tampered).write_bytes(content)
    result = prove(trained_workspace, folder.parent.name, running, print, show_progress)
    assert failed(result) == {"files"}
    assert len(result["checks"]) == 1
    shutil.rmtree(folder.parent)  # the engine's next start would refuse it


def test_another_base_ends_the_proof(running: RunningEngine, trained_workspace: Workspace) -> None:
    elsewhere = running.model_copy(update={"base_digest": "0" * 64})
    folder = register_copy(trained_workspace, "elsewhere")
    result = prove(trained_workspace, "elsewhere", elsewhere, print, show_progress)
    assert failed(result) == {"base"}
    shutil.rmtree(folder.parent)


def test_an_adapter_the_engine_does_not_serve_is_an_error(running: RunningEngine, trained_workspace: Workspace) -> None:
    folder = register_copy(trained_workspace, "unserved")
    with pytest.raises(EngineError, match="does not serve unserved@"):
        prove(trained_workspace, "unserved", running, print, show_progress)
    assert not (folder / PROOF).exists()
    shutil.rmtree(folder.parent)


def test_a_deleted_dataset_is_an_error(running: RunningEngine, trained_workspace: Workspace, tmp_path: Path) -> None:
    manifest, _ = find_adapter(trained_workspace, "tiny")
    dataset = trained_workspace.datasets / manifest.dataset_digest
    away = shutil.move(dataset, tmp_path / "away")
    try:
        with pytest.raises(NotFoundError, match=manifest.dataset_digest[:12]):
            prove(trained_workspace, "tiny", running, print, show_progress)
    finally:
        shutil.move(away, dataset)


def test_a_merged_adapter_is_proven_too_and_a_wrong_one_is_not(trained_workspace: Workspace) -> None:
    """On an engine of its own, with every option that this machine can take and speculative decoding."""
    manifest, folder = find_adapter(trained_workspace, "tiny")
    plan = plan_engine(trained_workspace)
    options = {"structured_outputs": "guidance", "chunked_prefill": False, "max_num_batched_tokens": 2048, "prefix_caching": False}
    lone = replace(plan, adapters=[each for each in plan.adapters if each.name == manifest.served_name], settings=plan.settings.model_copy(update=options))
    spec = merged_spec(trained_workspace, lone, lambda name, target: export_adapter(trained_workspace, name, target, "merged"))
    with trial_engine(replace(spec, speculative_tokens=3), trained_workspace.logs / "merged.log", print) as engine:
        assert (engine.models, engine.merged) == ([manifest.served_name], manifest.served_name)
        result = prove(trained_workspace, "tiny", engine, print, show_progress)
        assert failed(result) == set()
        assert (result["engine"]["merged"], read_json(folder / MERGED_PROOF)) == (True, result)
        listing = served_models(engine.url)
        assert find_fault(manifest, folder, engine, listing) == ""
        assert "not proven" in find_fault(manifest, folder, engine.model_copy(update={"base_digest": "0" * 64}), listing)
        weights = next(spec.base_path.glob("*.safetensors"))  # the folder no longer holds what the engine loaded
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert "base" in failed(prove(trained_workspace, "tiny", engine, print, show_progress))
    shutil.rmtree(spec.base_path)


def test_the_matrix_tells_the_forms_of_the_weights_apart(running: RunningEngine, trained_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.matrix.ROWS", 8)
    result = measure_matrix(trained_workspace, "tiny", running, print, show_progress)
    print(json.dumps(result, indent=1))
    rows = {row["pair"]: row for row in result["matrix"]}
    assert rows["dequantised NF4 + adapter"]["distance"] < 0.02 < rows["bf16 base + adapter"]["distance"]
    assert rows["merged into dequantised NF4"]["distance"] < rows["dequantised NF4 alone"]["distance"]
    assert len(rows) == 7 and result["recommended"] in rows and result == read_json(find_adapter(trained_workspace, "tiny")[1] / MATRIX)
