"""Whether the adapter on disk is the one its digest names, and the base the one it was trained for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rag.prompts import PROMPT_VERSION
from serve.check import Check
from understudy.adapters import CONFIG, AdapterManifest, verify_adapter
from understudy.chat import template_digest
from understudy.digests import digest_of_file, digest_of_files
from understudy.engines import RunningEngine
from understudy.errors import UnderstudyError
from understudy.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_files(manifest: AdapterManifest, folder: Path) -> Check:
    """The adapter's files are those of its digest, its folder is named by it, and its manifest says what its configuration says."""
    began = time.monotonic()
    faults = []
    try:
        verify_adapter(folder)
    except UnderstudyError as error:
        faults.append(error.message)
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}")
    if (folder.parent.name, folder.name) != (manifest.name, manifest.digest):
        faults.append(f"the manifest in {folder.parent.name}/{folder.name[:12]} is of {manifest.served_name}")
    if not faults:
        config = read_json(folder / CONFIG)
        said = {"rank": manifest.rank, "alpha": manifest.alpha, "base": manifest.base, "targets": sorted(manifest.targets)}
        meant = {"rank": config["r"], "alpha": config["lora_alpha"], "base": config["base_model_name_or_path"], "targets": sorted(config["target_modules"])}
        faults += [f"the manifest's {name} is {said[name]}, the configuration's {meant[name]}" for name in said if said[name] != meant[name]]
    return Check.of_faults("files", faults, "the files are those of the digest", began)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer


def check_base(manifest: AdapterManifest, weights: Path, tokenizer: PreTrainedTokenizerBase, engine: RunningEngine, merged: Path | None = None) -> Check:
    """The engine's base is the one the adapter was trained for: weights (read anew), tokenizer, chat template, prompts.

    An engine of `merged` weights serves those, as they are on disk now.
    """
    began = time.monotonic()
    pairs = {
        "base's id": (engine.base, manifest.base),
        "engine's weights": (engine.base_digest, digest_of_files(merged.glob("*.safetensors")) if merged else manifest.served_base_digest),
        f"weights in {weights.name}": (digest_of_files(weights.glob("*.safetensors")), manifest.served_base_digest),
        "tokenizer": (digest_of_file(weights / "tokenizer.json"), manifest.tokenizer_digest),
        "chat template": (template_digest(tokenizer), manifest.chat_template_digest),
        "prompts": (PROMPT_VERSION, manifest.prompt_version or PROMPT_VERSION),  # an imported adapter's may be unknown
    }
    faults = [f"{name}: {found[:12]}, trained with {wanted[:12]}" for name, (found, wanted) in pairs.items() if found != wanted]
    return Check.of_faults("base", faults, "weights, tokenizer, chat template and prompts are those of the training", began)
