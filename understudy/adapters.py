"""The adapter registry: adapters/NAME/DIGEST/, each verified against its own digest."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from understudy.digests import digest_of, digest_of_file
from understudy.errors import AdapterError, NotFoundError
from understudy.files import read_json
from understudy.records import SCHEMA_VERSION, Record
from understudy.workspace import Workspace

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SERVED_METHODS = ("lora",)  # what vLLM applies


class AdapterManifest(Record):
    """What an adapter is and where it came from; immutable, beside the weights."""

    schema_version: int = SCHEMA_VERSION
    name: str
    digest: str  # sha256 over weights, canonical adapter_config and the base's digest
    base: str  # the base's id, never a path
    base_digest: str  # weights as trained on
    served_base_digest: str  # weights the adapter must be served on (dequantised NF4 for a QLoRA run)
    quantisation: Literal["nf4", "none"]
    tokenizer_digest: str
    chat_template_digest: str
    prompt_version: str  # empty: unknown
    dataset_digest: str  # empty: unknown
    lineage: Literal["trained", "stated", "unknown"] = "trained"  # trained here; imported, its dataset stated or not
    recipe: dict[str, object]
    seed: int | None  # None: imported
    method: str = "lora"  # train/methods.py
    rank: int
    alpha: int
    targets: list[str]
    packages: dict[str, str]
    metrics: dict[str, float | None]
    tenants: list[str]
    group_ids: list[str]
    question_digests: list[str]
    created_at: float

    @property
    def served_name(self) -> str:
        """The immutable name it is served under."""
        return f"{self.name}@{self.digest[:12]}"


def is_served(method: str) -> bool:
    """Whether vLLM can apply what a method trains."""
    return method in SERVED_METHODS


def require_served(manifest: AdapterManifest) -> None:
    """Raise AdapterError for an adapter that vLLM cannot apply."""
    if not is_served(manifest.method):
        raise AdapterError(
            f"{manifest.served_name} was trained by {manifest.method}, and vLLM serves LoRA adapters only",
            "train with method=lora; or, where the method can be merged, `understudy adapters export --format merged` makes a base of its own of it",
        )


def adapter_digest(folder: Path, served_base_digest: str) -> str:
    """Sha256 over the weights, the canonical adapter_config and the digest of the base they are served on."""
    return digest_of([digest_of_file(folder / WEIGHTS), read_json(folder / CONFIG), served_base_digest])


def manifests(workspace: Workspace) -> list[tuple[AdapterManifest, Path]]:
    """Every registered adapter and its folder, oldest first."""
    found = []
    for file in workspace.adapters.glob("*/*/manifest.json"):
        if file.parent.name.startswith("."):  # being written
            continue
        try:
            found.append((AdapterManifest.model_validate(read_json(file)), file.parent))
        except ValidationError as error:
            raise AdapterError(f"{file} is not an adapter's manifest: {error.errors()[0]['msg']}", "remove that adapter's folder, or restore it") from error
    return sorted(found, key=lambda each: (each[0].created_at, each[0].digest))


def find_adapter(workspace: Workspace, name: str) -> tuple[AdapterManifest, Path]:
    """The adapter called NAME (its newest) or NAME@DIGEST12; raises NotFoundError listing what there is."""
    wanted, _, digest = name.partition("@")
    known = manifests(workspace)
    matching = [pair for pair in known if pair[0].name == wanted and pair[0].digest.startswith(digest)]
    if not matching:
        names = ", ".join(sorted({manifest.served_name for manifest, _ in known})) or "none yet: run `understudy train`"
        raise NotFoundError(f"no adapter {name}", f"registered adapters: {names}")
    return matching[-1]


def verify_adapter(folder: Path) -> AdapterManifest:
    """Check an adapter's files against its manifest; raises AdapterError naming what differs."""
    manifest = AdapterManifest.model_validate(read_json(folder / "manifest.json"))
    foreign = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]
    if foreign:
        raise AdapterError(f"{manifest.served_name} carries {', '.join(foreign)}, which is never loaded", "remove the adapter; keep safetensors only")
    if adapter_digest(folder, manifest.served_base_digest) != manifest.digest:
        raise AdapterError(f"{manifest.served_name}: its files are not those of its digest", "restore the folder from a backup, or train it again")
    return manifest
