"""The engine's argv and environment, from what it is to serve: pure functions, checked against vLLM's own parser by a test.

What the CPU backend of vLLM 0.32 was seen to refuse or to die of is refused here, before anything is started.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from understudy.errors import EngineError, UsageError
from understudy.settings.serving import Serve

LOOPBACK = "127.0.0.1"  # where the engine listens, and nowhere else
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
DEFAULT_RANK = 16  # where no adapter says otherwise, so that one can still be loaded at run time
MAX_LOGPROBS = 20
CPU_SEQS, CPU_BATCHED_TOKENS = 16, 1024  # measured on two cores with 135M parameters
CPU_BLOCK = 32  # tokens of a KV block; vLLM's 128 on a CPU would read up to 127 tokens of a shared prefix again
NOT_INHERITED = ("VLLM_CPU_KVCACHE_SPACE", "OMP_WAIT_POLICY")  # the first would win over --kv-cache-memory-bytes; the second is for our own threads
QUANTIZATIONS = {"fp8": "fp8", "nf4": "bitsandbytes"}  # ours → vLLM's; what a checkpoint is quantised to (AWQ, GPTQ), vLLM reads from it
NF4_PLUGIN = "vllm-bnb-plugin"
NGRAM_MIN, NGRAM_MAX = 2, 4  # tokens of the n-grams that speculative decoding looks for in the prompt
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
    speculative_tokens: int = 0  # what a probe found worth while, not what the settings wish for
    merged: str = ""  # the served name of the adapter that base_path has in its weights: then it is served alone, without LoRA
    numa_nodes: int = field(default_factory=lambda: max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))))

    @property
    def url(self) -> str:
        """The OpenAI-compatible base URL."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def precision(self) -> str:
        """What the weights are computed in: part of what a proof is about."""
        return self.settings.dtype if self.settings.quantization == "none" else self.settings.quantization

    @property
    def processes(self) -> int:
        """Model processes, one a device (on a CPU: one a NUMA node)."""
        return self.settings.tensor_parallel * self.settings.pipeline_parallel * self.settings.data_parallel

    @property
    def batched_tokens(self) -> int | None:
        """Tokens of one engine step; None: vLLM's choice."""
        return self.settings.max_num_batched_tokens or (CPU_BATCHED_TOKENS if self.device == "cpu" else None)


def build_command(spec: EngineSpec, packages: frozenset[str] | None = None) -> list[str]:
    """The engine's argv; raises UsageError where this machine's vLLM cannot do what the settings ask for (`find_faults`).

    `python -m`, because `vllm serve` of the CPU wheel cannot find its own metadata.
    """
    if faults := find_faults(spec, packages):
        raise UsageError("; ".join(faults), "`understudy config show` lists the settings of the section serve and where they come from")
    settings = spec.settings
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spec.base_path.resolve())]
    command += ["--served-model-name", spec.merged or spec.base, "--host", spec.host, "--port", str(spec.port), "--seed", "0"]
    command += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len), "--max-logprobs", str(MAX_LOGPROBS)]
    command += ["--generation-config", "vllm"]  # a model's own sampling defaults (penalties) would make served differ from trained
    command += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": False})]  # as understudy.chat renders for training
    command += ["--chat-template", str(spec.chat_template.resolve())] if spec.chat_template else []
    command += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_parser] if settings.tool_parser else []
    command += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching", "--enable-prompt-tokens-details"]
    command += ["--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    return [*command, *_device_options(spec), *_optional(spec), *([] if spec.merged else _lora_options(spec))]


def _device_options(spec: EngineSpec) -> list[str]:
    settings, seqs = spec.settings, spec.settings.max_num_seqs
    options = ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    if spec.device == "cpu":
        seqs = seqs or CPU_SEQS
        options = ["--enforce-eager", "--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * 2**30)), "--block-size", str(CPU_BLOCK)]
    options += ["--max-num-seqs", str(seqs)] if seqs else []
    return options + (["--max-num-batched-tokens", str(spec.batched_tokens)] if spec.batched_tokens else [])


def _optional(spec: EngineSpec) -> list[str]:
    """What is said to vLLM only where it is not its default."""
    settings = spec.settings
    options = ["--quantization", QUANTIZATIONS[settings.quantization]] if settings.quantization != "none" else []
    sizes = {"tensor": settings.tensor_parallel, "pipeline": settings.pipeline_parallel, "data": settings.data_parallel}
    for kind, size in sizes.items():
        options += [f"--{kind}-parallel-size", str(size)] if size > 1 else []
    options += [] if settings.chunked_prefill else ["--no-enable-chunked-prefill"]
    if settings.structured_outputs != "auto":
        options += ["--structured-outputs-config", json.dumps({"backend": settings.structured_outputs})]
    if spec.speculative_tokens:
        lookup = {"prompt_lookup_min": NGRAM_MIN, "prompt_lookup_max": NGRAM_MAX}
        options += ["--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": spec.speculative_tokens, **lookup})]
    return options + (["--enable-sleep-mode"] if settings.sleep else [])


def _lora_options(spec: EngineSpec) -> list[str]:
    settings = spec.settings
    options = ["--enable-lora", "--max-lora-rank", str(allowed_rank(spec)), "--max-loras", str(settings.max_loras)]
    options += ["--max-cpu-loras", str(max(settings.max_loras, len(spec.adapters), 16))]
    modules = [{"name": each.name, "path": str(each.path.resolve()), "base_model_name": spec.base} for each in spec.adapters]
    return options + (["--lora-modules", *(json.dumps(module) for module in modules)] if modules else [])


def find_faults(spec: EngineSpec, packages: frozenset[str] | None = None) -> list[str]:
    """Why vLLM 0.32 could not run these settings on this device; `packages`: the installed distributions, looked up where not given."""
    settings, faults = spec.settings, []
    if spec.device == "cpu":
        faults += _cpu_faults(spec)
    elif settings.quantization == "nf4" and NF4_PLUGIN not in (packages if packages is not None else _installed(NF4_PLUGIN)):
        faults.append(
            f"serve.quantization=nf4 needs the package {NF4_PLUGIN}: vLLM has no bitsandbytes of its own since 0.28"
            " (quantization=none serves a QLoRA adapter on the same values, dequantised)"
        )
    if not settings.chunked_prefill and (spec.batched_tokens or settings.max_model_len) < settings.max_model_len:
        faults.append(f"serve.chunked_prefill=false needs serve.max_num_batched_tokens ≥ serve.max_model_len ({settings.max_model_len})")
    return faults


def _cpu_faults(spec: EngineSpec) -> list[str]:
    settings, faults = spec.settings, []
    if settings.quantization != "none":
        why = {"fp8": "its kernels for it are stubs", "nf4": "bitsandbytes' plugin for vLLM needs CUDA"}[settings.quantization]
        faults.append(f"serve.quantization={settings.quantization} cannot run on vLLM's CPU backend: {why}")
    if spec.processes > spec.numa_nodes:
        faults.append(
            f"serve.tensor_parallel, pipeline_parallel and data_parallel ask for {spec.processes} processes, one a NUMA node; here are {spec.numa_nodes}"
        )
    if settings.sleep:
        faults.append("serve.sleep cannot run on vLLM's CPU backend; `serve pause` stops the engine there")
    return faults


def _installed(name: str) -> frozenset[str]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return frozenset()
    return frozenset({name})


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
    if spec.settings.sleep:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up are of this mode; it listens on loopback only
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
