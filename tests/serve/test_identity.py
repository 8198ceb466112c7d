"""Adapters that are not what their digest names fail the proof; weights that are gone are missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.identity import check_files
from understudy.adapters import AdapterManifest, adapter_digest, verify_adapter
from understudy.errors import NotFoundError
from understudy.files import read_json, write_json
from understudy.models import find_weights
from understudy.workspace import create_workspace


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A registered adapter of two small matrices."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    save_file({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}, scratch / "adapter_model.safetensors")
    write_json(scratch / "adapter_config.json", {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "base-id", "target_modules": ["q_proj"]})
    digest = adapter_digest(scratch, "b" * 64)
    manifest = AdapterManifest(
        name="tiny", digest=digest, base="base-id", base_digest="b" * 64, served_base_digest="b" * 64, quantisation="none", tokenizer_digest="",
        chat_template_digest="", prompt_version="", dataset_digest="", recipe={}, seed=0, rank=2, alpha=4, targets=["q_proj"], packages={},
        metrics={}, tenants=[], group_ids=[], question_digests=[], created_at=0.0,
    )  # fmt: skip
    write_json(scratch / "manifest.json", manifest.model_dump())
    folder = tmp_path / "adapters" / "tiny" / digest
    folder.parent.mkdir(parents=True)
    return scratch.rename(folder)


def manifest_of(folder: Path) -> AdapterManifest:
    return AdapterManifest.model_validate(read_json(folder / "manifest.json"))


def test_an_untouched_adapter_passes_the_files_check(adapter: Path) -> None:
    assert check_files(manifest_of(adapter), adapter).passed


def _zero(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "adapter_model.safetensors")


def _change_manifest(**values: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "manifest.json", read_json(folder / "manifest.json") | values)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_zero, "not those of its digest"),
        (lambda folder: write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | {"lora_alpha": 8}), "not those of its digest"),
        (_change_manifest(digest="0" * 64), "not those of its digest"),
        (_change_manifest(served_base_digest="0" * 64), "not those of its digest"),
        (_change_manifest(name="other"), "is of other@"),
        (_change_manifest(rank=4), "rank is 4"),
        (_change_manifest(base="another"), "base is another"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"pickle"), "adapter_model.bin"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
)
def test_a_damaged_adapter_fails_the_files_check(adapter: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(adapter)
    check = check_files(manifest_of(adapter), adapter)
    assert not check.passed and check.value >= 1
    assert named in check.detail


def test_a_zeroed_copy_under_its_own_digest_is_no_fault_of_files(adapter: Path) -> None:
    """What the log-probabilities are for."""
    _zero(adapter)
    digest = adapter_digest(adapter, "b" * 64)
    _change_manifest(digest=digest)(adapter)
    moved = adapter.rename(adapter.with_name(digest))
    assert verify_adapter(moved).digest == digest
    assert check_files(manifest_of(moved), moved).passed


def test_weights_that_are_not_there_are_missed(tmp_path: Path) -> None:
    workspace = create_workspace(str(tmp_path / "workspace"))
    with pytest.raises(NotFoundError, match="bbbbbbbbbbbb"):
        find_weights(workspace, "b" * 64)
