"""Typed configuration, said once: understudy.yaml < UNDERSTUDY_… environment < key=value on the command line."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from understudy.errors import NotFoundError, UsageError
from understudy.store.urls import refuse_secret

FILE_NAME = "understudy.yaml"


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(Section):
    """Which weights the workspace uses: a name in models/, a path, or a hub id."""

    base: str = Field("smollm2-135m-instruct", description="the small model that learns the job")
    embedder: str = Field("all-minilm-l6-v2", description="the sentence-transformers model that embeds chunks and questions")
    embedder_precision: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto: bfloat16 where it is native and measured equal to float32")


class Ingest(Section):
    """How documents become chunks."""

    chunk_tokens: int = Field(96, ge=32, le=2048, description="longest chunk, in the embedder's tokens")
    overlap_tokens: int = Field(16, ge=0, le=512, description="tokens shared by neighbouring chunks")
    parser: Literal["auto", "docling"] = Field("auto", description="docling: the optional extra reads everything but text, Markdown and JSONL")
    parse_seconds: float = Field(120, gt=0, description="time limit for parsing one file, and its limit of processor time")
    parse_memory_gib: float = Field(2, gt=0, description="memory limit for parsing one file")
    parse_processes: int | None = Field(None, ge=1, le=64, description="files parsed at once; unset: the number of cores, at most 8")


class Retrieval(Section):
    """What is shown to the model."""

    k: int = Field(2, ge=1, le=50, description="passages shown to the model")
    candidates: int = Field(20, ge=1, le=1000, description="taken from each ranking before fusion")
    rrf_k: int = Field(60, ge=1, description="the constant of reciprocal rank fusion")
    k_min: int | None = Field(None, ge=1, description="with k_max: fewest passages; the widest gap between scores decides how many, instead of k")
    k_max: int | None = Field(None, ge=1, le=50, description="with k_min: most passages")
    mmr: float | None = Field(None, ge=0, le=1, description="maximal marginal relevance: weight of relevance against novelty; unset: off")
    reranker: str | None = Field(None, description="a cross-encoder in models/ that orders the candidates again; unset: none")
    server_search: bool = Field(True, description="search by MongoDB's search nodes where the store's server has them; false: always by the local index")
    aggregate: Literal["concat", "sequential", "summarise"] = Field(
        "concat", description="all in one prompt; one after another; their sentences that bear on the question"
    )
    stale: Literal["keep", "downrank", "exclude"] = Field("downrank", description="documents before valid_from or from valid_until on")

    @model_validator(mode="after")
    def _bounds(self) -> Retrieval:
        if (self.k_min is None) != (self.k_max is None) or (self.k_min or 0) > (self.k_max or 0):
            raise ValueError("k_min and k_max are set together, k_min being the smaller")
        return self


class Agent(Section):
    """How a question is answered, and the bounds of one run."""

    mode: Literal["agentic", "fast", "closed-book"] = Field(
        "agentic", description="fast: one pass, scored without a validation call; closed-book: without passages, for comparison"
    )
    max_rounds: int = Field(2, ge=1, le=10, description="plan-to-validate rounds before the best answer so far is taken")
    accept_score: float = Field(0.5, ge=0, le=1, description="a validation score from here on is accepted at once")
    max_plan_tokens: int = Field(32, ge=1, description="completion limit of the plan step")
    max_answer_tokens: int = Field(128, ge=8, description="completion limit of the answer step")
    max_tokens: int = Field(50_000, ge=100, description="prompt and completion tokens of one run, all calls together")
    max_seconds: float = Field(180, gt=0, description="time limit of one run")
    max_false_abstentions: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the answerable questions on which a calibration may abstain, whatever wrong answers that avoids",
    )
    worked_example: bool | None = Field(None, description="show a worked example in the prompt; unset: only to models without an adapter")
    escalate_to: str = Field("", description="the remote that answers in the model's place where its score is too low; unset: none")
    escalate_below: float = Field(0.5, ge=0, le=1, description="a final score below this is too low")


class Cache(Section):
    """Answers given again (`ask`; an evaluation never uses it)."""

    enabled: bool = Field(True, description="answer from the cache where it may")
    error_bound: float = Field(0.01, gt=0, lt=0.5, description="the highest probability of a wrong answer at which a semantic hit is allowed")
    audit: float = Field(0.02, ge=0, le=1, description="share of semantic hits that run anyway, to check the entry")
    ttl_days: float = Field(30, gt=0, description="how long an answer is kept")
    max_entries: int = Field(100_000, ge=1, description="entries of one tenant; the least recently used goes first")


class Endpoint(Section):
    """An OpenAI-compatible server."""

    base_url: str = Field(description="with /v1; for example http://127.0.0.1:8000/v1")
    model: str = Field(description="the model's name there")
    api_key_env: str = Field("", description="the environment variable that holds the key")
    price_in: float = Field(0.0, ge=0, description="money per million prompt tokens")
    price_out: float = Field(0.0, ge=0, description="money per million completion tokens")


class Serve(Section):
    """The vLLM engine. It listens on loopback only: who can reach it can load adapters into it."""

    url: str = Field(
        "", pattern=r"^(https?://[^\s]+/v1)?$", description="an engine that runs elsewhere (vLLM, Ollama, llama.cpp, a cluster), with /v1; empty: our own vLLM"
    )
    model: str = Field("", description="with url: the base's name there; empty: the first that it lists")
    api_key_env: str = Field("", description="with url: the environment variable that holds its key")
    port: int = Field(8300, ge=1, le=65535, description="the engine's port on loopback; clients go to gateway.port")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the weights in the engine; auto: the checkpoint's")
    quantization: Literal["none", "fp8", "nf4"] = Field(
        "none", description="of the weights while they are loaded, on a GPU; none: as they are in models/ (an AWQ or GPTQ checkpoint stays one)"
    )
    max_model_len: int = Field(2048, ge=128, description="longest prompt plus completion, in tokens")
    max_num_seqs: int | None = Field(None, ge=1, description="sequences run at once; unset: 16 on a CPU, the choice of vLLM on a GPU")
    max_num_batched_tokens: int | None = Field(None, ge=64, description="tokens of one engine step; unset: 1024 on a CPU, the choice of vLLM on a GPU")
    kv_cache_gib: float = Field(2.0, gt=0, description="KV cache of the CPU engine")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="share of GPU memory the engine may take")
    tensor_parallel: int = Field(1, ge=1, description="devices that share each layer")
    pipeline_parallel: int = Field(1, ge=1, description="devices that each hold some of the layers")
    data_parallel: int = Field(1, ge=1, description="copies of the model, each with devices of its own")
    prefix_caching: bool = Field(True, description="compute what prompts have in common once")
    chunked_prefill: bool = Field(True, description="mix pieces of long prompts with running answers")
    structured_outputs: Literal["auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer"] = Field("auto", description="what keeps output to a schema")
    speculative_tokens: int = Field(
        0, ge=0, le=16, description="proposed at once by n-gram look-up in the prompt, where a probe at the start shows equal greedy answers and a gain; 0: off"
    )
    max_loras: int = Field(4, ge=1, description="adapters resident at once")
    max_lora_rank: int | None = Field(None, ge=1, description="unset: the largest rank among the adapters served")
    tool_parser: str = Field("", description="vLLM's parser of the base's tool calls, such as hermes for Qwen2.5; unset: requests with tools are refused")
    merge: Literal["never", "auto"] = Field(
        "never", description="auto: a lone adapter is served merged into its base, alone, where that is measured to be faster and proven"
    )
    sleep: bool = Field(False, description="`serve pause` puts vLLM to sleep and keeps its process; GPU only. It opens vLLM's development routes on loopback")
    start_seconds: float = Field(600, gt=0, description="how long to wait for the engine to become healthy")


class Gate(Section):
    """A limit on a model's paired difference in one metric, to another model; set one of min_gain and max_loss."""

    against: str = Field(
        "base", description="a model among those compared: base, teacher, a name; live: the live release of the candidate's alias, before there is one the base"
    )
    min_gain: float | None = Field(None, ge=0, description="the difference must be better by more than this")
    max_loss: float | None = Field(None, ge=0, description="the difference may be worse by no more than this")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the two-sided interval that must clear the limit")

    @model_validator(mode="after")
    def _has_one_limit(self) -> Gate:
        if (self.min_gain is None) == (self.max_loss is None):
            raise ValueError("a gate has either min_gain or max_loss")
        return self


class Gateway(Section):
    """The door that clients go to."""

    host: str = Field("127.0.0.1", description="address to listen on; one beyond loopback needs a key (`understudy keys create`)")
    port: int = Field(8400, ge=1, le=65535, description="port to listen on")
    tls_certificate: str = Field("", description="PEM file with the certificate chain; empty: plain HTTP")
    tls_key: str = Field("", description="PEM file with its private key")
    max_body_mib: float = Field(2, gt=0, description="largest request")
    max_connections: int = Field(4096, ge=1, description="open connections; more are answered 503")
    max_running: int | None = Field(
        None, ge=1, description="requests at a model server at once, the others wait, fairly between tenants; unset: twice what the engine runs at once"
    )
    max_waiting: int = Field(256, ge=0, description="requests of one tenant that wait; more are answered 429")
    wait_seconds: float = Field(60, gt=0, description="how long a request waits for its turn before it is answered 429")
    request_seconds: float = Field(600, gt=0, description="time limit of a reply, first byte to last")
    silence_seconds: float = Field(120, gt=0, description="how long a model server may send nothing")
    drain_seconds: int = Field(20, ge=0, description="how long running requests may take to end when the gateway stops")


class Releases(Section):
    """What `rag` answers with, and when a release on trial is stopped (docs/releases.md)."""

    default: str = Field("", description="the alias whose live release answers `rag` and `ask`; unset: the newest proven adapter")
    tenants: dict[str, str] = Field(default_factory=dict, description="by tenant, the alias that answers it instead")
    false_alarm: float = Field(0.05, gt=0, lt=0.5, description="the highest probability that a trial ever stops a release that is no worse than allowed below")
    max_score_loss: float = Field(0.05, ge=0, lt=1, description="how much lower the mean validation score may be")
    max_abstention_rise: float = Field(0.1, ge=0, lt=1, description="how much higher the share of abstentions may be")
    max_error_rise: float = Field(0.02, ge=0, lt=1, description="how much higher the share of failed runs may be")
    max_slowdown: float = Field(1.5, ge=1, description="at least half of its runs take no more than this many times as long")

    def alias_of(self, tenant: str) -> str:
        """The alias that answers a tenant; empty where none is configured."""
        return self.tenants.get(tenant, self.default)


class Fireworks(Section):
    """The hosted path: datasets, runs and deployments at Fireworks, by its management API. Chat with what it serves is one of `remotes`."""

    account: str = Field("", pattern=r"^([a-z][a-z0-9-]{0,62})?$", description="the account's id")
    url: str = Field("https://api.fireworks.ai", description="the management API")
    api_key_env: str = Field("FIREWORKS_API_KEY", description="the environment variable that holds the key")
    base_model: str = Field("", description="what is trained and deployed there, such as accounts/fireworks/models/qwen2p5-1p5b-instruct")
    accelerator: str = Field("", description="of a deployment, such as NVIDIA_H100_80GB; empty: the shape that Fireworks keeps for the model")
    scale_to_zero_seconds: int = Field(300, ge=300, description="idle time after which a deployment has no replica, and costs nothing")
    poll_seconds: float = Field(10, gt=0, description="between two looks at what is under way")
    wait_seconds: float = Field(21_600, gt=0, description="how long a command waits for what is under way; the next one goes on waiting")


class Evaluate(Section):
    """How models are compared."""

    concurrency: int = Field(8, ge=1, description="questions in flight at once")
    resamples: int = Field(10_000, ge=100, description="bootstrap resamples")
    seed: int = Field(0, description="seed of the bootstrap")
    leaks: Literal["refuse", "set-apart", "allow-documents"] = Field(
        "refuse",
        description="what an adapter trained on: set-apart leaves it out and lists it; allow-documents lets new questions about seen documents take part",
    )
    nli: str = Field("", description="a cross-encoder for NLI in models/ that also judges whether passages entail an answer's sentences; unset: none")
    gates: dict[str, Gate] = Field(default_factory=dict, description="by metric: {against, min_gain or max_loss, confidence}; a failed one is exit code 3")


class Cycle(Section):
    """One turn of the whole loop by `understudy cycle` (docs/cycle.md). Paths are relative to the workspace."""

    documents: str = Field("", description="folder whose new and changed files are ingested; empty: none")
    regression: str = Field("", description="question file that every candidate is measured on, frozen at the first cycle")
    teacher: str = Field("", description="the remote that writes and answers questions about new documents; empty: people's traces alone")
    teacher_questions: int = Field(100, ge=1, description="the teacher's traces to keep, in one cycle")
    teacher_calls: int = Field(1000, ge=1, description="calls of the teacher in one cycle, at most")
    teacher_tokens: int | None = Field(None, ge=1, description="the teacher's prompt and completion tokens after which no call is begun; unset: no limit")
    fewest_traces: int = Field(20, ge=1, description="new traces from which on a cycle trains; fewer do where drift says that answers got worse")
    warm_start: bool = Field(True, description="train from the live release's answering adapter; false: from the base, on every trace")
    replay: float = Field(
        0.5, ge=0, le=1, description="with a warm start: share of the training rows that repeat what that adapter learnt already; 1: all of it"
    )
    recipe: str = Field("", description="a recipe's name or YAML file; empty: the one of `train`")
    canary: float = Field(0.1, gt=0, le=1, description="share of the conversations on which a candidate that passes is tried")


class Redaction(Section):
    """What is taken out of traces before they are stored; a placeholder such as [email] takes its place."""

    email: bool = Field(False, description="e-mail addresses")
    phone: bool = Field(False, description="telephone numbers")
    patterns: dict[str, str] = Field(default_factory=dict, description="regular expressions of your own, by the name of their placeholder")

    @field_validator("patterns")
    @classmethod
    def _are_usable(cls, patterns: dict[str, str]) -> dict[str, str]:
        import regex

        for name, pattern in patterns.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name) or name in ("email", "phone"):
                raise ValueError(f"{name!r} cannot name a pattern: use small letters, digits, - and _; email and phone are taken")
            try:
                if regex.compile(pattern).search("", timeout=1):
                    raise ValueError(f"the pattern {name} matches nothing at all, so it would match everywhere")
            except regex.error as error:
                raise ValueError(f"the pattern {name} is not a regular expression: {error}") from error
        return patterns


class Telemetry(Section):
    """OpenTelemetry spans of finished runs."""

    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s]+)?$", description="where spans go, for example http://127.0.0.1:4318; empty: nowhere")
    content: bool = Field(False, description="send questions, prompts and answers too")


class Config(Section):
    """Everything a workspace can set."""

    store: str = Field(
        "sqlite:///store.db",
        description="where records live: sqlite:///PATH inside the workspace, mongodb://HOST/DATABASE, or env:NAME, a variable that holds the URL",
    )
    tenant: str = Field("default", description="whose documents and traces commands work on")
    offline: bool = Field(False, description="refuse every one of `remotes`, and Fireworks, whatever asks for it")
    recipe: str = Field("default", description="the training recipe `train` takes when none is named")
    models: Models = Models()
    ingest: Ingest = Ingest()
    retrieval: Retrieval = Retrieval()
    agent: Agent = Agent()
    cache: Cache = Cache()
    serve: Serve = Serve()
    gateway: Gateway = Gateway()
    releases: Releases = Releases()
    fireworks: Fireworks = Fireworks()
    evaluate: Evaluate = Evaluate()
    cycle: Cycle = Cycle()
    redaction: Redaction = Redaction()
    telemetry: Telemetry = Telemetry()
    remotes: dict[str, Endpoint] = Field(default_factory=dict, description="named OpenAI-compatible endpoints, for --models and teachers")


def load_config(workspace: Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The configuration in force and where each value that is not a default came from.

    Raises UsageError with every fault at once.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in (
        (FILE_NAME, _flatten(_read_file(workspace / FILE_NAME))),
        ("environment", _from_environment()),
        ("command line", _from_arguments(overrides or [])),
    ):
        for key, value in values.items():
            if key == "store" and origin != "environment" and isinstance(value, str):
                refuse_secret(value, origin)
            _assign(merged, key, value)
            origins[key] = origin
    try:
        return Config.model_validate(merged), origins
    except ValidationError as error:
        raise UsageError(
            "; ".join(explain_fault(fault, Config) for fault in error.errors()), "docs/settings.md lists every key, `understudy config show` what is in force"
        ) from error


def explain_fault(fault: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a sentence, with the nearest right name for an unknown key."""
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] != "extra_forbidden":
        return f"{key}: {fault['msg']}"
    near = difflib.get_close_matches(key, known_keys(model), n=1, cutoff=0.4)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a settings model."""
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`a.b=1` arguments as {"a.b": 1}; values are YAML."""
    values = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise UsageError(f"{argument!r} is not key=value", "write for example retrieval.k=4")
        values[key] = yaml.safe_load(value)
    return values


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}", "fix the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a mapping of settings", "write `key: value` lines")
    return content


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "remotes":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _from_environment() -> dict[str, Any]:
    """`UNDERSTUDY_RETRIEVAL__K=4` sets retrieval.k; variables that name no setting are other tools' business."""
    names = {f"UNDERSTUDY_{key.replace('.', '__').upper()}": key for key in known_keys(Config)}
    return {names[name]: yaml.safe_load(value) for name, value in os.environ.items() if name in names}


def _from_arguments(arguments: list[str]) -> dict[str, Any]:
    return parse_overrides(arguments)


def _assign(target: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UsageError(f"{parent} is not a section, in {key}", "docs/settings.md lists every key, `understudy config show` what is in force")
    target[last] = value


def require_file(path: Path) -> Path:
    """The path, if a file is there; raises NotFoundError otherwise."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", "check the path")
    return path
