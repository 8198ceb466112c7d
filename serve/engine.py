"""The vLLM engine: its command, its adapters, and starting it. Everything it serves is found by digest in the workspace."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from serve.supervise import Engine, spawn, wait_until_healthy
from understudy.adapters import is_served, manifests
from understudy.chat import closed_template
from understudy.config import Serve
from understudy.engines import RunningEngine
from understudy.errors import AdapterError, EngineError, NotFoundError
from understudy.files import read_json, write_json, write_text
from understudy.models import CARD, model_path, weights_digest
from understudy.workspace import Workspace

LOOPBACK = "127.0.0.1"  # where the engine listens, and nowhere else
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
DEFAULT_RANK = 16  # where no adapter says otherwise, so that one can still be loaded at run time
MAX_LOGPROBS = 20
CPU_SEQS, CPU_BATCHED_TOKENS = 16, 1024  # measured on two cores with 135M parameters
CPU_BLOCK = 32  # tokens of a KV block; vLLM's 128 on a CPU would read up to 127 tokens of a shared prefix again
NOT_INHERITED = ("VLLM_CPU_KVCACHE_SPACE", "OMP_WAIT_POLICY")  # the first would win over --kv-cache-memory-bytes; the second is for our own threads
FEW_CORES = 8  # below this, no core is set apart for vLLM's scheduler, and no process for its worker


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter as vLLM is told of it."""

    name: str  # name@digest12, never used for other weights
    path: Path
    rank: int


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is started from."""

    base_path: Path
    base: str  # the base's id, and its model name at the endpoint
    base_digest: str  # of the weights in base_path
    adapters: list[ServedAdapter]
    settings: Serve
    host: str
    port: int
    device: str  # cpu or cuda
    max_lora_rank: int  # at least the adapters' largest
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    openmp: Path | None = field(default_factory=lambda: find_openmp())
    chat_template: Path | None = None  # a file to use in place of the base's own template

    @property
    def url(self) -> str:
        """The OpenAI-compatible base URL."""
        return f"http://{self.host}:{self.port}/v1"


def build_command(spec: EngineSpec) -> list[str]:
    """The engine's argv. `python -m`, because `vllm serve` of the CPU wheel cannot find its own metadata."""
    settings = spec.settings
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spec.base_path.resolve())]
    command += ["--served-model-name", spec.base, "--host", spec.host, "--port", str(spec.port), "--seed", "0"]
    command += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len), "--max-logprobs", str(MAX_LOGPROBS)]
    command += ["--generation-config", "vllm"]  # a model's own sampling defaults (penalties) would make served differ from trained
    command += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": False})]  # as understudy.chat renders for training
    command += ["--chat-template", str(spec.chat_template.resolve())] if spec.chat_template else []
    command += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_parser] if settings.tool_parser else []
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    command += ["--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    command += ["--enable-lora", "--max-lora-rank", str(allowed_rank(spec)), "--max-loras", str(settings.max_loras)]
    command += ["--max-cpu-loras", str(max(settings.max_loras, len(spec.adapters), 16))]
    seqs, batched_tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    if spec.device == "cpu":
        seqs, batched_tokens = seqs or CPU_SEQS, batched_tokens or CPU_BATCHED_TOKENS
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * 2**30)), "--block-size", str(CPU_BLOCK)]
    else:
        command += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    command += ["--max-num-seqs", str(seqs)] if seqs else []
    command += ["--max-num-batched-tokens", str(batched_tokens)] if batched_tokens else []
    if spec.adapters:
        modules = [{"name": each.name, "path": str(each.path.resolve()), "base_model_name": spec.base} for each in spec.adapters]
        command += ["--lora-modules", *(json.dumps(module) for module in modules)]
    return command


def build_environment(spec: EngineSpec) -> dict[str, str]:
    """What the engine's environment has beside ours: no network, no telemetry, adapters at run time, every core."""
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",  # safe because the engine listens on loopback only, and clients go through the gateway
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.device != "cpu":
        return environment
    if spec.cores < FEW_CORES:  # "auto" would keep one core for the scheduler: half of two
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(spec.cores), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if spec.openmp is not None:  # faster than GNU's for many small products; the threads sleep after 5 ms, others may need the cores
        environment |= {"LD_PRELOAD": str(spec.openmp), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    return environment


def allowed_rank(spec: EngineSpec) -> int:
    """The smallest --max-lora-rank that vLLM takes and every adapter fits in. Raises EngineError beyond vLLM's largest."""
    needed = max([spec.max_lora_rank, *(adapter.rank for adapter in spec.adapters)])
    for rank in RANKS:
        if rank >= needed:
            return rank
    raise EngineError(f"vLLM serves adapters up to rank {RANKS[-1]}, not {needed}", "train with a smaller rank, or merge the adapter into its base")


def find_device() -> str:
    """The device that the installed vLLM runs on."""
    try:
        importlib.metadata.version("vllm-cpu")
        return "cpu"
    except importlib.metadata.PackageNotFoundError:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def find_openmp() -> Path | None:
    """Intel's OpenMP runtime, which the CPU wheel of vLLM brings and asks to have preloaded."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so"]
    return next((path for path in found if path.is_file() and not set(" :") & set(str(path))), None)  # LD_PRELOAD has no quoting


def plan_engine(workspace: Workspace, port: int | None = None) -> EngineSpec:
    """The engine that this workspace needs now: its base, and every adapter made for it."""
    settings = workspace.config.serve
    path, base, digest = served_base(workspace)
    adapters = registered_adapters(workspace, digest)
    rank = settings.max_lora_rank or max([DEFAULT_RANK, *(adapter.rank for adapter in adapters)])
    return EngineSpec(path, base, digest, adapters, settings, LOOPBACK, port or settings.port, find_device(), rank)


def with_closed_template(spec: EngineSpec, file: Path) -> EngineSpec:
    """The spec with the chat template of training, written to `file`, where that is not the base's own. Raises EngineError.

    Templates that never speak of thinking are not looked at further: transformers and torch take seconds to import.
    """
    sources = [spec.base_path / name for name in ("chat_template.jinja", "tokenizer_config.json")]  # where transformers keeps a template
    if not any(source.is_file() and b"think" in source.read_bytes() for source in sources):
        return spec
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        template = closed_template(AutoTokenizer.from_pretrained(str(spec.base_path), local_files_only=True))
    except (OSError, ValueError, TemplateError) as error:
        raise EngineError(f"the chat template of {spec.base} cannot be used: {error}", "check it with `understudy models ls`") from error
    if template is None:
        return spec
    write_text(file, template)
    return replace(spec, chat_template=file)


def start_engine(spec: EngineSpec, log_file: Path, on_progress: Callable[[str], None], engine_file: Path | None = None) -> Engine:
    """Start the engine, wait until it is healthy, and announce it in `engine_file`. A context manager that stops it.

    The engine ends with this process, however this process ends. Raises EngineError, with nothing left running.
    """
    spec = with_closed_template(spec, log_file.with_name("chat_template.jinja"))
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    engine = spawn(build_command(spec), {**inherited, **build_environment(spec)}, spec.host, spec.port, log_file)
    try:
        wait_until_healthy(engine, spec.url, spec.settings.start_seconds, on_progress)
        names = served_models(spec.url)
        missing = {spec.base, *(adapter.name for adapter in spec.adapters)} - names.keys()
        if missing:
            raise EngineError(f"the engine came up without {', '.join(sorted(missing))}", f"see {log_file}")
        engine.running = RunningEngine(url=spec.url, pid=engine.pid, base=spec.base, base_digest=spec.base_digest, models=list(names))
        if engine_file is not None:
            write_json(engine_file, engine.running.model_dump())
            engine.engine_file = engine_file
    except BaseException:
        engine.stop()
        raise
    return engine


def served_models(url: str) -> dict[str, tuple[str, str]]:
    """Name → (root, parent) of everything that the endpoint serves; an adapter's root is its folder, its parent the base."""
    answer = httpx.get(f"{url}/models", timeout=10)
    answer.raise_for_status()
    return {row["id"]: (row.get("root") or "", row.get("parent") or "") for row in answer.json()["data"]}


def load_adapter(url: str, adapter: ServedAdapter) -> None:
    """Load an adapter into a running engine and check that it is listed as what it is. One that is there already is left.

    Raises AdapterError when the engine refuses it, or lists something else under its name.
    """
    folder = str(adapter.path.resolve())
    try:
        listed = served_models(url)
        if adapter.name not in listed:
            answer = httpx.post(f"{url}/load_lora_adapter", json={"lora_name": adapter.name, "lora_path": folder}, timeout=300)
            if answer.is_error:
                raise AdapterError(
                    f"the engine refuses {adapter.name}: {_reason(answer)}", "understudy adapters verify; a rank above serve.max_lora_rank needs a restart"
                )
            listed = served_models(url)
    except httpx.HTTPError as error:
        raise AdapterError(f"cannot load {adapter.name} into {url}: {error!r}", "see logs/engine.log") from error
    base = next(iter(listed))  # vLLM lists the base first
    if listed.get(adapter.name) != (folder, base):
        raise AdapterError(f"the engine lists {adapter.name} as {listed.get(adapter.name)}, not as {folder} on {base}", "restart the engine")


def registered_adapters(workspace: Workspace, base_digest: str) -> list[ServedAdapter]:
    """The workspace's adapters that vLLM can apply and that must be served on exactly these weights, oldest first."""
    found = [(m, folder) for m, folder in manifests(workspace) if is_served(m.method) and m.served_base_digest == base_digest]
    return [ServedAdapter(manifest.served_name, folder, manifest.rank) for manifest, folder in found]


def served_base(workspace: Workspace) -> tuple[Path, str, str]:
    """(folder, id, weights digest) of the weights to serve: the ones that the newest adapter of the configured base was trained for.

    A QLoRA run's are its base's dequantised NF4 weights, kept in models/ by `train`. Raises NotFoundError where they are missing.
    """
    path = model_path(workspace, workspace.config.models.base)
    card = read_json(path / CARD) if (path / CARD).exists() else {}
    base = str(card.get("id", path.name))
    ours = [manifest for manifest, _ in manifests(workspace) if is_served(manifest.method) and manifest.base == base]
    digest = weights_digest(path)
    if not ours or ours[-1].served_base_digest == digest:
        return path, base, digest
    wanted = ours[-1].served_base_digest
    for folder in sorted(workspace.models.iterdir()):
        if (folder / "config.json").is_file() and weights_digest(folder) == wanted:
            return folder, base, wanted
    raise NotFoundError(
        f"the weights that {ours[-1].served_name} must be served on ({wanted[:12]}) are not in {workspace.models}", "train again, or restore models/"
    )


def _reason(answer: httpx.Response) -> str:
    """vLLM's error message, shortened."""
    try:
        body = answer.json()
        message = body["error"]["message"] if "error" in body else body["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return " ".join(str(message).split())[:300]
