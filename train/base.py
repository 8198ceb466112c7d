"""The base model as it is trained on, and the same weights as they must be served."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.attention import attend_by_branch, attend_on_gpu
from train.fused import fuse_layers, keep_copies
from train.methods import Sample, prepare
from train.recipe import Recipe
from train.trie import check_architecture
from understudy.errors import TrainingError
from understudy.files import read_json, whole_folder, write_json
from understudy.models import CARD, folder_name, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: giving every large tensor's pages back and faulting them in again is dear
    on virtual machines, where the first touch of a page costs a round to the host (docs/benchmarks.md)."""
    libc = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(libc, "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, 2**30)


def give_back_freed_memory() -> None:
    """Have glibc give back what `keep_freed_memory` kept: done now and then, it takes back what gaps between live tensors have grown to."""
    libc = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def load_base(folder: Path, quantisation: str, on_cpu: bool = False) -> PreTrainedModel:
    """The frozen base on the GPU if there is one and it may be there, else the CPU, in bf16 or double-quantised NF4. Raises TrainingError."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if quantisation == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            device_map=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() and not on_cpu else "cpu",
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"cannot load {folder.name}: {error}", "check it with `understudy models ls`") from error
    model.requires_grad_(False)
    return model


def load_trainable(folder: Path, recipe: Recipe, sample: Sample = list) -> PreTrainedModel:
    """The base with what the recipe trains on it, fresh, and the attention that suits the device. Raises TrainingError."""
    model = load_base(folder, recipe.quantisation, on_cpu=recipe.fsdp)
    check_architecture(model.config)
    if not torch.cuda.is_available():
        attend_by_branch(model)
    else:
        attend_on_gpu(model)
    keep_copies(model)
    adapted = prepare(model, recipe, sample)
    fuse_layers(adapted)
    return adapted


def served_base(models: Path, base: Path, base_id: str, quantisation: str) -> Path:
    """The folder of the weights an adapter must be served on: the base itself, or for NF4 its dequantised weights.

    The dequantised folder is made once and reused while it was made from the same base.
    """
    if quantisation == "none":
        return base
    target = models / f"{folder_name(base_id)}-nf4"
    origin = f"{base_id} as dequantised NF4, from {weights_digest(base)}"
    if (target / CARD).exists() and read_json(target / CARD)["origin"] == origin:
        return target
    with whole_folder(target) as scratch:
        _write_dequantised(base, scratch)
        from understudy.digests import digest_of_files

        digest = digest_of_files(scratch.glob("*.safetensors"))
        write_json(scratch / CARD, {"id": base_id, "origin": origin, "weights_digest": digest})
    return target


def _write_dequantised(base: Path, target: Path) -> None:
    """The base with every 4-bit layer replaced by the bf16 weights its forward pass computes with."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    quantised = load_base(base, "nf4")
    weights = {
        f"{name}.weight": dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16).cpu()
        for name, layer in quantised.named_modules()
        if isinstance(layer, Linear4bit)
    }
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16, local_files_only=True)
    missing = plain.load_state_dict(weights, strict=False).unexpected_keys
    if missing:
        raise TrainingError(f"the quantised base has layers the base lacks: {missing[:3]}", "report this base model")
    plain.save_pretrained(target)
    for file in base.iterdir():  # tokenizer and template, byte for byte
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != CARD and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
