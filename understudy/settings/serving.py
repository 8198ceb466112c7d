"""Where models are served: the engine, the gateway before it, releases, other endpoints, Fireworks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from understudy.settings.section import Section


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
