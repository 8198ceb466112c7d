"""Adapters made elsewhere, brought in with what is known of them; and ours, taken out as PEFT has them or merged into their base."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from train.recipe import Recipe
from understudy.adapters import CONFIG, WEIGHTS, AdapterManifest, adapter_digest, find_adapter, verify_adapter
from understudy.chat import render_prompt, template_digest
from understudy.config import explain_fault
from understudy.digests import digest_of, digest_of_file
from understudy.errors import AdapterError, NotFoundError, UsageError
from understudy.files import read_json, whole_folder, write_json, write_text
from understudy.models import CARD, find_weights, folder_name, model_path, weights_digest
from understudy.records import Message
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Format = Literal["peft", "merged", "gguf"]
MAX_RANK = 512  # vLLM's largest
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
UNSERVED = (  # vLLM refuses or ignores them
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "lora_bias",
    "fan_in_fan_out",
)
RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq")  # these change the base's own weights when training begins
GREETING = [Message(role="system", content="Be brief."), Message(role="user", content="Who are you?")]
PICKLE = "adapter_model.bin"


def import_adapter(workspace: Workspace, source: Path, name: str, base: str | None, dataset: str | None) -> dict[str, Any]:
    """Register a LoRA adapter that PEFT wrote elsewhere (TRL, Unsloth, …); the result is the command's JSON.

    `base` names the model in models/ whose weights it is to be served on, where its configuration names another place;
    `dataset` (a digest, or the beginning of one) the dataset here that it was trained on: else its lineage is unknown, and its
    manifest says so. Raises AdapterError for what cannot be served as it was trained, NotFoundError where a thing named is missing.
    """
    check_name(name)
    if not (source / WEIGHTS).is_file() and (source / PICKLE).is_file():
        raise AdapterError(f"{source} holds {PICKLE}, a pickle, which is never loaded", "save it with safe_serialization=True where it was trained")
    for needed in (CONFIG, WEIGHTS):
        if not (source / needed).is_file():
            raise NotFoundError(f"{source} has no {needed}", "give the folder that PEFT's save_pretrained wrote")
    config = read_json(source / CONFIG)
    if faults := config_faults(config):
        raise AdapterError(f"{source.name} cannot be served: {'; '.join(faults)}", "train plain LoRA: no DoRA, no biases, no modules_to_save, one rank")
    weights = _base_folder(workspace, base or str(config.get("base_model_name_or_path") or ""))
    modules = check_tensors(source / WEIGHTS, weights, int(config["r"]))
    targets = _targets(config["target_modules"], modules, weights)
    _check_tokenizer(source, weights)
    base_id = str(read_json(weights / CARD)["id"]) if (weights / CARD).exists() else weights.name
    canonical = config | {"base_model_name_or_path": base_id, "target_modules": targets, "inference_mode": True}
    staging = workspace.runs / f"import-{digest_of([digest_of_file(source / WEIGHTS), canonical])}"
    with whole_folder(staging) as scratch:
        (scratch / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
        write_json(scratch / CONFIG, canonical)
        manifest = _manifest(workspace, scratch, name, weights, canonical, _dataset(workspace, dataset))
    target = workspace.adapters / name / manifest.digest
    is_known = (target / "manifest.json").exists()
    if is_known:
        manifest = verify_adapter(target)
    else:
        with whole_folder(target) as scratch:
            for file in (WEIGHTS, CONFIG):
                shutil.copy2(staging / file, scratch / file)
            write_json(scratch / "manifest.json", manifest.model_dump())
            write_text(scratch / "README.md", f"# {manifest.served_name}\n\nA LoRA adapter for {base_id}, trained elsewhere. Lineage: {manifest.lineage}.\n")
    shutil.rmtree(staging, ignore_errors=True)
    return {
        "adapter": manifest.served_name,
        "digest": manifest.digest,
        "path": workspace.relative(target),
        "base": base_id,
        "served_base": workspace.relative(weights),
        "lineage": manifest.lineage,
        "reused": is_known,
    }


def config_faults(config: Any) -> list[str]:
    """Why vLLM could not serve what this adapter_config describes as PEFT computes it."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return [f"it is {config.get('peft_type') if isinstance(config, dict) else 'no adapter'}, not LORA"]
    faults = [f"it uses {key}" for key in UNSERVED if config.get(key)]
    variants = {key for key in config if key.startswith("use_") or key.endswith("_config")} - {"use_rslora", "eva_config"}
    faults += [f"it uses {key}" for key in sorted(variants) if config[key]]
    if config.get("bias", "none") != "none":
        faults.append("it trains biases")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"its task is {config['task_type']}")
    if str(config.get("init_lora_weights", True)).lower().startswith(RESIDUAL_STARTS):
        faults.append(f"it began with {config['init_lora_weights']}, which changes the base's own weights")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        faults.append(f"its rank is {rank}, not 1 to {MAX_RANK}")
    if type(alpha) is not int or alpha < 1:
        faults.append(f"its lora_alpha is {alpha}, not a whole number")
    targets = config.get("target_modules")
    if not targets or not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(name, str) for name in targets))):
        faults.append("it names no target_modules")
    return faults


def check_tensors(file: Path, base: Path, rank: int) -> set[str]:
    """Every tensor is half of a LoRA pair of this rank on a layer of the base, and finite; returns the layers. Raises AdapterError."""
    from safetensors import SafetensorError, safe_open

    layers = {name.removesuffix(".weight"): shape for name, shape in weight_shapes(base).items() if name.endswith(".weight") and len(shape) == 2}
    found: dict[str, set[str]] = {}
    faults = []
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                match = KEY.fullmatch(key)
                if match is None or match[1] not in layers or match[1].endswith(("embed_tokens", "lm_head")):
                    faults.append(f"{key} is no LoRA weight of a layer of {base.name} that can be served")
                    continue
                tensor, (rows, columns) = tensors.get_tensor(key), layers[match[1]]
                wanted = [rank, columns] if match[2] == "A" else [rows, rank]
                if list(tensor.shape) != wanted:
                    faults.append(f"{key} is {list(tensor.shape)}, where {base.name} and rank {rank} need {wanted}")
                elif not tensor.isfinite().all():
                    faults.append(f"{key} is not finite")
                found.setdefault(match[1], set()).add(match[2])
    except SafetensorError as error:
        raise AdapterError(f"{file} is not safetensors: {error}", "copy the file again") from error
    faults += [f"{layer} has one half of its pair only" for layer, halves in found.items() if len(halves) == 1]
    if faults or not found:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise AdapterError(f"{file.parent.name}: {'; '.join(faults[:3]) or 'no weights'}{more}", "is it an adapter for this base? name another with --base")
    return set(found)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor of a model folder, read from the files' headers."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def export_adapter(workspace: Workspace, name: str, target: Path, form: Format) -> dict[str, Any]:
    """Write an adapter outside the registry: as PEFT reads it, or merged into its served base, as safetensors or GGUF; the result is the command's JSON.

    Merging is done in float32 and the sum rounded to bfloat16. Raises UsageError where the target is there already, AdapterError where
    the adapter is damaged or its method cannot be merged.
    """
    from train.gguf_export import write_gguf
    from train.methods import METHODS

    manifest, folder = find_adapter(workspace, name)
    verify_adapter(folder)
    if target.exists():
        raise UsageError(f"{target} exists", "name a folder that is not there yet")
    if form != "peft" and not METHODS[manifest.method].can_merge:
        raise AdapterError(f"what {manifest.method} trains cannot be merged into the base", "export it with --format peft")
    with whole_folder(target) as scratch:
        if form == "peft":
            for file in (WEIGHTS, CONFIG, "README.md"):
                if (folder / file).exists():
                    shutil.copy2(folder / file, scratch / file)
        else:
            weights = find_weights(workspace, manifest.served_base_digest)
            model = merged(weights, folder, manifest.method)
        if form == "gguf":
            write_gguf(model, weights, scratch / f"{manifest.name}-{manifest.digest[:12]}.gguf", manifest.served_name)
        elif form == "merged":
            model.save_pretrained(scratch)
            for file_path in weights.iterdir():  # tokenizer and template, byte for byte
                if file_path.suffix in (".json", ".jinja", ".txt", ".model") and file_path.name != CARD and not (scratch / file_path.name).exists():
                    shutil.copy2(file_path, scratch / file_path.name)
        write_json(scratch / "manifest.json", manifest.model_dump())
    return {"adapter": manifest.served_name, "format": form, "path": str(target), "bytes": sum(file.stat().st_size for file in target.iterdir())}


def merged(weights: Path, adapter: Path, method: str) -> PreTrainedModel:
    """The base with an adapter added to its weights, in bfloat16."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from train.methods import add_sparse

    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(weights), dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    if method in ("fishmask", "far"):
        add_sparse(base, adapter)
    else:
        base = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return base.to(torch.bfloat16)


def check_name(name: str) -> None:
    """Raise UsageError where no adapter may be called so."""
    try:
        Recipe(name=name)
    except ValidationError as error:
        raise UsageError("; ".join(explain_fault(fault, Recipe) for fault in error.errors()), "give the adapter another --name") from error


def _base_folder(workspace: Workspace, base: str) -> Path:
    """The model in models/ of this name, or of a path's or hub id's last part."""
    folder = workspace.models / folder_name(base)
    if base and (folder / "config.json").is_file():
        return folder
    raise NotFoundError(
        f"the adapter's base, {base or 'unnamed'}, is not in {workspace.models}",
        "add it with `understudy models add`, or say with --base which model in models/ it is",
    )


def _targets(targets: Any, modules: set[str], base: Path) -> list[str]:
    """The names of the adapted layers, where each is adapted wherever it stands; else the list that the configuration gives. Raises AdapterError."""
    names = {module.rpartition(".")[2] for module in modules}
    if modules == {layer for layer in (name.removesuffix(".weight") for name in weight_shapes(base)) if layer.rpartition(".")[2] in names}:
        return sorted(names)
    if isinstance(targets, list):
        return sorted(targets)
    raise AdapterError(
        f"target_modules = {targets!r} stands for some of the {', '.join(sorted(names))} only", "name the layers in a list in adapter_config.json"
    )


def _check_tokenizer(source: Path, base: Path) -> None:
    """A tokenizer that came with the adapter has the base's words and template. Raises AdapterError."""
    if not (source / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    vocabularies = [Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() for folder in (source, base)]
    if vocabularies[0] != vocabularies[1]:
        raise AdapterError(f"{source.name} was trained with another tokenizer than {base.name}'s", "name its own base with --base")
    rendered = [render_prompt(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), GREETING) for folder in (source, base)]
    if rendered[0] != rendered[1]:
        raise AdapterError(f"{source.name} was trained with another chat template than {base.name}'s", "train with the template of the base in models/")


def _dataset(workspace: Workspace, dataset: str | None) -> dict[str, Any]:
    """The summary of the dataset named, its digest under `dataset`; empty where none is."""
    if dataset is None:
        return {}
    found = [folder for folder in workspace.datasets.glob(f"{dataset}*") if (folder / "dataset.json").exists()]
    if len(found) != 1:
        raise NotFoundError(f"{len(found) or 'no'} datasets begin with {dataset!r}", "`ls datasets` in the workspace names them")
    return {**read_json(found[0] / "dataset.json"), "dataset": found[0].name}


def _manifest(workspace: Workspace, folder: Path, name: str, weights: Path, config: dict[str, Any], summary: dict[str, Any]) -> AdapterManifest:
    from transformers import AutoTokenizer

    served_on, base_id = weights_digest(weights), config["base_model_name_or_path"]
    try:
        base_digest = weights_digest(model_path(workspace, base_id))
    except NotFoundError:
        base_digest = served_on
    return AdapterManifest(
        name=name,
        digest=adapter_digest(folder, served_on),
        base=base_id,
        base_digest=base_digest,
        served_base_digest=served_on,
        quantisation="none" if base_digest == served_on else "nf4",
        tokenizer_digest=digest_of_file(weights / "tokenizer.json"),
        chat_template_digest=template_digest(AutoTokenizer.from_pretrained(str(weights), local_files_only=True)),
        lineage="stated" if summary else "unknown",
        prompt_version=summary.get("prompt_version", ""),
        dataset_digest=summary.get("dataset", ""),
        recipe={"imported": True},
        seed=None,
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=config["target_modules"],
        packages={"peft": str(config["peft_version"])} if config.get("peft_version") else {},
        metrics={},
        tenants=summary.get("tenants", []),
        group_ids=summary.get("group_ids", []),
        question_digests=summary.get("question_digests", []),
        created_at=time.time(),
    )
