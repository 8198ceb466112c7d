"""Start from an adapter's weights: one of the same base, tokenizer, template and shape, whole and untouched, or none at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from train.recipe import Recipe
from understudy.adapters import CONFIG, WEIGHTS, AdapterManifest, find_adapter, verify_adapter
from understudy.chat import template_digest
from understudy.digests import digest_of_file
from understudy.errors import AdapterError
from understudy.files import read_json
from understudy.models import weights_digest
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHAPE = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "layers_to_transform": "layers_to_transform"}  # PEFT's name: the recipe's


def find_warm_start(workspace: Workspace, recipe: Recipe, base: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Recipe, tuple[AdapterManifest, Path] | None]:
    """The recipe with its warm start named by digest, and that adapter, proven to fit. Raises NotFoundError, or AdapterError with every misfit."""
    if recipe.warm_start is None:
        return recipe, None
    _, folder = find_adapter(workspace, recipe.warm_start)
    manifest = verify_adapter(folder)
    pairs = {
        "base": (manifest.base_digest, weights_digest(base)),
        "quantisation": (manifest.quantisation, recipe.quantisation),
        "tokenizer": (manifest.tokenizer_digest, digest_of_file(base / "tokenizer.json")),
        "chat template": (manifest.chat_template_digest, template_digest(tokenizer)),
        "targets": (sorted(manifest.targets), sorted(recipe.targets)),
    }
    config = read_json(folder / CONFIG)
    pairs |= {ours: (config.get(name), getattr(recipe, ours)) for name, ours in SHAPE.items()}
    misfits = [f"its {name} is {str(its)[:60]}, the recipe's {str(ours)[:60]}" for name, (its, ours) in pairs.items() if its != ours]
    if misfits:
        raise AdapterError(f"{manifest.served_name} cannot be trained on: {'; '.join(misfits)}", "make the recipe like it, or start without warm_start")
    return recipe.model_copy(update={"warm_start": manifest.served_name}), (manifest, folder)


def load_warm_start(model: PreTrainedModel, folder: Path) -> None:
    """Put an adapter's weights in place of the fresh ones; raises AdapterError where a tensor is missing, extra or of another shape."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = load_file(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(wanted.keys() ^ found.keys()) + sorted(name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape)
    if odd:
        raise AdapterError(f"{folder.name[:12]} and the recipe differ in {len(odd)} tensors, such as {odd[0]}", "start without warm_start")
    set_peft_model_state_dict(model, found)
