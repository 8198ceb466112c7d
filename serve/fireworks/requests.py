"""The requests of Fireworks' management API that the commands make, as values: built here, sent by api.py, shown by --dry-run.

Shapes: docs.fireworks.ai, "Gateway REST API" 4.259 (November 2026), and the types of fireworks-ai 1.2.30. Every name that a client may
choose is chosen here from the content, so that a request made twice has one effect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from understudy.digests import digest_of, digest_of_file
from understudy.errors import EndpointError, TrainingError, UsageError

Kind = Literal["datasets", "supervisedFineTuningJobs", "models", "deployments", "deployedModels"]
KINDS: tuple[Kind, ...] = ("deployedModels", "deployments", "models", "supervisedFineTuningJobs", "datasets")  # in the order of deletion
PREFIX = "understudy-"  # of every id that is made here: a letter first, 63 characters at most
LARGEST_UPLOAD = 150_000_000  # bytes in one :upload; a larger file goes to a signed URL
FEWEST_ROWS = 3
RANKS = (4, 64)  # of a LoRA addon
SHORTEST_SCALE_TO_ZERO = 300  # seconds


@dataclass(frozen=True)
class Request:
    """One request; `path` is below /v1/accounts/ACCOUNT/."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    query: dict[str, str] = field(default_factory=dict)
    file: Path | None = None  # sent as multipart/form-data
    may_repeat: bool = True  # whether making it twice has one effect

    def shown(self, base: str, account: str) -> dict[str, Any]:
        """For people: what would be sent, the key redacted."""
        result: dict[str, Any] = {"method": self.method, "url": address(base, account, self), "headers": {"Authorization": "Bearer [redacted]"}}
        if self.body is not None:
            result["body"] = self.body
        if self.file is not None:
            result["file"] = {"name": self.file.name, "bytes": self.file.stat().st_size}
        return result


def address(base: str, account: str, request: Request) -> str:
    """The URL of a request."""
    return f"{base.rstrip('/')}/v1/accounts/{account}/{quote(request.path, safe='/:')}" + (f"?{urlencode(request.query)}" if request.query else "")


@dataclass(frozen=True)
class DataFile:
    """A chat JSONL file and what it is called there: by its content, so that the same rows are one dataset."""

    path: Path
    split: str  # train, validation
    rows: int

    @property
    def id(self) -> str:
        """Its dataset's id."""
        return PREFIX + digest_of_file(self.path)[:16]


def data_files(path: Path) -> list[DataFile]:
    """The files to upload of a dataset's folder, or of a file of conversations; a validation file that is too short is left out.

    Raises TrainingError where the training rows are too few.
    """
    paths = {"train": path} if path.is_file() else {split: path / f"{split}.jsonl" for split in ("train", "validation")}
    files = [DataFile(file, split, _rows(file)) for split, file in paths.items() if file.is_file()]
    if not files or files[0].split != "train" or files[0].rows < FEWEST_ROWS:
        raise TrainingError(f"{path} has fewer than {FEWEST_ROWS} training rows, the least that Fireworks takes", "import more answers, then build again")
    return [file for file in files if file.rows >= FEWEST_ROWS]


def _rows(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def get(kind: Kind, identity: str) -> Request:
    """Ask how a resource is."""
    return Request("GET", f"{kind}/{identity}")


def create_dataset(file: DataFile) -> Request:
    """Enter a dataset, without its rows."""
    described = {"displayName": f"{file.split} rows of Understudy", "exampleCount": str(file.rows), "userUploaded": {}}
    return Request("POST", "datasets", {"datasetId": file.id, "dataset": described})


def upload_dataset(file: DataFile) -> Request:
    """Send its rows in one request."""
    return Request("POST", f"datasets/{file.id}:upload", file=file.path)


def upload_endpoint(file: DataFile) -> Request:
    """Ask for a URL to send its rows to."""
    return Request("POST", f"datasets/{file.id}:getUploadEndpoint", {"filenameToSize": {file.path.name: str(file.path.stat().st_size)}})


def validate_upload(file: DataFile) -> Request:
    """Say that its rows are there."""
    return Request("POST", f"datasets/{file.id}:validateUpload", {})


@dataclass(frozen=True)
class Training:
    """A hosted run; what is None is left to Fireworks."""

    name: str  # of the adapter
    dataset: str  # a dataset's id there
    evaluation: str | None = None
    base_model: str = ""  # accounts/fireworks/models/…
    warm_start: str = ""  # a LoRA model there, in place of the base
    epochs: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    max_context: int | None = None  # tokens

    def __post_init__(self) -> None:
        if bool(self.base_model) == bool(self.warm_start):
            raise UsageError(
                "name a base model or a LoRA model to go on from, one of the two", "set fireworks.base_model, or give --base-model or --warm-start"
            )
        low, high = RANKS
        if self.rank is not None and not low <= self.rank <= high:
            raise UsageError(f"rank {self.rank} is not {low} to {high}, what Fireworks serves", "give another --rank")
        if any(value is not None and value <= 0 for value in (self.epochs, self.learning_rate, self.max_context)):
            raise UsageError("--epochs, --learning-rate and --max-context are above 0", "correct them, or leave them out")


@dataclass(frozen=True)
class Job:
    """A run under its own id; another `attempt` at the same training is another job, and paid anew."""

    training: Training
    attempt: int = 1

    @property
    def digest(self) -> str:
        """Of what it is to do."""
        return digest_of([vars(self.training), self.attempt])

    @property
    def id(self) -> str:
        """The job's id."""
        return PREFIX + self.digest[:16]

    @property
    def output_model(self) -> str:
        """The id of the model that it makes: 61 characters at most."""
        return f"{self.training.name}-{self.digest[:12]}"


def create_job(account: str, job: Job) -> Request:
    """Begin to train."""
    training, home = job.training, f"accounts/{account}"
    chosen = {
        "baseModel": training.base_model or None,
        "warmStartFrom": full_name(account, "models", training.warm_start) if training.warm_start else None,
        "evaluationDataset": f"{home}/datasets/{training.evaluation}" if training.evaluation else None,
        "evalAutoCarveout": False,  # the splits are ours: by document, near-duplicate questions on one side
        "epochs": training.epochs,
        "learningRate": training.learning_rate,
        "loraRank": training.rank,
        "maxContextLength": training.max_context,
    }
    body = {"displayName": training.name, "dataset": f"{home}/datasets/{training.dataset}", "outputModel": f"{home}/models/{job.output_model}"}
    given = {key: value for key, value in chosen.items() if value is not None}
    return Request("POST", "supervisedFineTuningJobs", body | given, {"supervisedFineTuningJobId": job.id})


@dataclass(frozen=True)
class Hosting:
    """A deployment of a base that takes LoRA addons, or of one trained model merged into its base."""

    model: str  # its full name
    takes_addons: bool
    accelerator: str = ""  # empty: the shape that Fireworks holds best for the model
    scale_to_zero_seconds: int = SHORTEST_SCALE_TO_ZERO
    attempt: int = 1

    @property
    def id(self) -> str:
        """The deployment's id."""
        return PREFIX + digest_of(vars(self))[:16]


def create_deployment(hosting: Hosting) -> Request:
    """Begin to deploy; idle, it has no replica and costs nothing."""
    body: dict[str, Any] = {
        "displayName": "Understudy",
        "baseModel": hosting.model,
        "minReplicaCount": 0,
        "maxReplicaCount": 1,
        "autoscalingPolicy": {"scaleToZeroWindow": f"{hosting.scale_to_zero_seconds}s"},
    }
    body |= {"enableAddons": True} if hosting.takes_addons else {}
    body |= {"acceleratorType": hosting.accelerator} if hosting.accelerator else {"deploymentShape": "default"}
    query = {"deploymentId": hosting.id} | ({"acceptShapelessRisk": "true"} if hosting.accelerator else {})
    return Request("POST", "deployments", body, query)


def load_lora(model: str, deployment: str) -> Request:
    """Load a LoRA model into a deployment, both by their full names. Fireworks chooses the id, so that it may not be repeated blindly."""
    return Request("POST", "deployedModels", {"model": model, "deployment": deployment}, may_repeat=False)


def list_loaded(model: str, deployment: str) -> Request:
    """Ask whether a model is loaded into a deployment (filter: google.aip.dev/160)."""
    return Request("GET", "deployedModels", query={"filter": f'model="{model}" AND deployment="{deployment}"', "pageSize": "200"})


def download_endpoint(model: str) -> Request:
    """Ask for URLs of a model's files."""
    return Request("GET", f"models/{model}:getDownloadEndpoint")


def delete(kind: Kind, identity: str) -> Request:
    """Remove a resource."""
    return Request("DELETE", f"{kind}/{identity}")


def full_name(account: str, kind: Kind, identity: str) -> str:
    """`accounts/ACCOUNT/KIND/ID`; one that is full already stays as it is."""
    return identity if identity.startswith("accounts/") else f"accounts/{account}/{kind}/{identity}"


def last_part(name: str) -> str:
    """The id in a full name that the server gave; raises EndpointError where it is none, for it becomes part of paths here."""
    identity = name.rpartition("/")[2]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", identity):
        raise EndpointError(f"Fireworks named something {identity[:64]!r}, which is no id", "run the command again; see docs/fireworks.md")
    return identity
