"""Prove that what is served is what was trained, before an adapter takes traffic (docs: DESIGN.md, mechanism 5).

vLLM can accept an adapter and leave its output unchanged (vllm #18372, #48019), serve other weights than those asked for
(#42125), or compute something else than PEFT (#10798, #47026). So real rows of the adapter's dataset are scored twice, by the
engine over HTTP and here by PEFT over exactly the served weights, and the log-probabilities of the answers' tokens compared.

Every check reads "value ≤ limit". Those that weigh log-probabilities rest on rows, not tokens (a row's tokens are not
independent), and put the burden of proof on the adapter: a bound that the data cannot place below the limit does not pass.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from rag.prompts import ABSTENTION, PROMPT_VERSION, answer_messages
from understudy.adapters import CONFIG, find_adapter, verify_adapter
from understudy.chat import Encoded, encode_example, encode_prompt, template_digest
from understudy.digests import digest_of_file, digest_of_files
from understudy.engines import RunningEngine
from understudy.errors import AdapterError, EngineError, NotFoundError, UnderstudyError
from understudy.files import read_json, read_jsonl, write_json
from understudy.models import weights_digest
from understudy.progress import Progress
from understudy.records import SCHEMA_VERSION, AdapterManifest, Example, Message
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROOF = "proof.json"
TOKEN_ROWS, SCORED_ROWS, CANARIES = 16, 16, 2
CANARY_TOKENS = 32
SIGN_LIMIT = 0.01  # one-sided p
NOISE_LIMIT = 1.5  # the adapter's distance in units of the engine's noise
ENGINE_NOISE_LIMIT = 0.25  # nats a token; bf16 engines measured 0.05–0.14, weights of another quantisation 0.64 (135M)
EPSILON = 0.002  # nats a token: keeps ratios finite where an engine computes exactly as PEFT does
CONFIDENCE, RESAMPLES = 0.95, 10_000
TIMEOUT_SECONDS = 300.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One finding; it passes where `value` ≤ `limit`. `undecided`: there were too few rows to tell."""

    name: str
    value: float
    limit: float
    detail: str
    seconds: float = 0.0
    undecided: bool = False

    @property
    def passed(self) -> bool:
        """Whether the adapter may take traffic, as far as this check goes."""
        return self.value <= self.limit and not self.undecided

    def to_json(self) -> dict[str, Any]:
        """The check as the command's JSON shows it."""
        status = "undecided" if self.undecided else "pass" if self.passed else "fail"
        value = float(f"{self.value:.4g}")
        figures = {"value": int(value) if value.is_integer() else value, "limit": self.limit}
        return {"name": self.name, "passed": self.passed, "status": status, **figures, "detail": self.detail, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class Row:
    """A real answer row: the prompt as inference renders it, and the answer that the dataset gives."""

    messages: list[Message]
    target: str
    split: str

    @property
    def length(self) -> int:
        """Characters of the prompt: orders rows without tokenising a whole dataset."""
        return sum(len(message.content) for message in self.messages)


@dataclass(frozen=True)
class Distances:
    """Mean |difference| of log-probability per answer token, one value a row, in nats."""

    to_adapter: Floats  # served adapter and PEFT with the adapter
    to_base: Floats  # served adapter and PEFT without it
    noise: Floats  # served base and PEFT without the adapter: what the engine's arithmetic alone does
    change: Floats  # served adapter and served base

    def means(self) -> dict[str, float]:
        """Over the rows, for people."""
        return {name: round(float(getattr(self, name).mean()), 4) for name in ("to_adapter", "to_base", "noise", "change")}


def prove(
    workspace: Workspace, adapter_name: str, engine: RunningEngine, report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """Prove an adapter on the engine that serves it; the result is the command's JSON, kept beside it as proof.json.

    Files or base weights that are not the adapter's end the proof before the engine is asked anything.
    Raises NotFoundError where the adapter, its dataset or its weights are missing, EngineError where the engine fails.
    """
    import_torch_patiently()
    began = time.monotonic()
    manifest, folder = find_adapter(workspace, adapter_name)
    report(f"proving {manifest.served_name} at {engine.url}")
    checks = [check_files(manifest, folder)]
    measured: dict[str, Any] = {}
    if checks[0].passed:
        weights = find_weights(workspace, manifest.served_base_digest)
        tokenizer = load_tokenizer(weights)
        checks.append(check_base(manifest, weights, tokenizer, engine))
    if all(check.passed for check in checks):
        rows = read_rows(workspace.datasets / manifest.dataset_digest, manifest.served_name)
        with Server(engine.url, engine.base, manifest.served_name) as server:
            checks.append(check_listing(server, folder))
            checks.append(check_token_ids(server, tokenizer, choose_spread(rows, TOKEN_ROWS)))
            encoded = fitting(choose_scored(rows, SCORED_ROWS), tokenizer, server.max_tokens)
            distances, measured = measure(server, weights, folder, encoded, report, progress)
            checks += weigh(distances, measured["seconds"])
            checks.append(check_canaries(server, choose_scored(rows, CANARIES)))
    result = {
        "schema_version": SCHEMA_VERSION,
        "adapter": manifest.served_name,
        "digest": manifest.digest,
        "passed": all(check.passed for check in checks),
        "checks": [check.to_json() for check in checks],
        "measured": measured,
        "engine": {"base": engine.base, "base_digest": engine.base_digest},
        "seconds": round(time.monotonic() - began, 1),
        "created_at": time.time(),
    }
    write_json(folder / PROOF, result)
    return result


# ── what is on disk ──


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
    return _faults("files", faults, "the files are those of the digest", began)


def find_weights(workspace: Workspace, digest: str) -> Path:
    """The model folder that holds exactly these weights; raises NotFoundError."""
    for folder in sorted(workspace.models.glob("*")):
        if (folder / "config.json").is_file() and weights_digest(folder) == digest:
            return folder
    raise NotFoundError(f"the weights that the adapter must be served on ({digest[:12]}) are not in {workspace.models}", "restore models/, or train again")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer


def check_base(manifest: AdapterManifest, weights: Path, tokenizer: PreTrainedTokenizerBase, engine: RunningEngine) -> Check:
    """The engine's base is the one the adapter was trained for: weights (read anew), tokenizer, chat template, prompts."""
    began = time.monotonic()
    pairs = {
        "base's id": (engine.base, manifest.base),
        "engine's weights": (engine.base_digest, manifest.served_base_digest),
        f"weights in {weights.name}": (digest_of_files(weights.glob("*.safetensors")), manifest.served_base_digest),
        "tokenizer": (digest_of_file(weights / "tokenizer.json"), manifest.tokenizer_digest),
        "chat template": (template_digest(tokenizer), manifest.chat_template_digest),
        "prompts": (PROMPT_VERSION, manifest.prompt_version),
    }
    faults = [f"{name}: {found[:12]}, trained with {wanted[:12]}" for name, (found, wanted) in pairs.items() if found != wanted]
    return _faults("base", faults, "weights, tokenizer, chat template and prompts are those of the training", began)


def read_rows(dataset: Path, adapter: str) -> list[Row]:
    """The distinct answer rows of a dataset, rendered as inference renders them; raises NotFoundError where it is gone."""
    if not (dataset / "examples.jsonl").is_file():
        raise NotFoundError(
            f"the dataset {dataset.name[:12]} of {adapter} is gone, so there are no rows to prove it on",
            "`understudy dataset build` makes it again from the same traces; or restore datasets/",
        )
    passages: dict[str, str] = read_json(dataset / "passages.json")
    rows: dict[str, Row] = {}
    for values in read_jsonl(dataset / "examples.jsonl"):
        example = Example.model_validate(values)
        if example.task == "answer":
            messages = answer_messages(example.question, [passages[chunk_id] for chunk_id in example.passage_ids])
            rows.setdefault(messages[-1].content, Row(messages, example.target, example.split))
    if not rows:
        raise NotFoundError(f"the dataset {dataset.name[:12]} of {adapter} has no answer rows", "import expert answers, build the dataset and train again")
    return list(rows.values())


# ── which rows ──


def preferred(rows: list[Row], count: int) -> list[Row]:
    """Rows the adapter has not seen where there are enough of them, else all; shortest prompt first."""
    unseen = [row for row in rows if row.split == "validation"]
    return sorted(unseen if len(unseen) >= count else rows, key=lambda row: row.length)


def choose_spread(rows: list[Row], count: int) -> list[Row]:
    """`count` rows spread evenly over prompt length, the shortest and the longest included."""
    ordered = preferred(rows, count)
    picked = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[index] for index in picked]


def choose_scored(rows: list[Row], count: int) -> list[Row]:
    """The rows with the shortest prompts, at most a quarter of them abstentions where there are others.

    An abstention is one short sentence, the same in every row: many of them would be little evidence.
    """
    ordered = preferred(rows, count)
    abstentions = [row for row in ordered if row.target == ABSTENTION]
    answers = [row for row in ordered if row.target != ABSTENTION]
    quiet = min(len(abstentions), max(count // 4, count - len(answers)))
    return answers[: count - quiet] + abstentions[:quiet]


def fitting(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Encoded]:
    """The rows as training encodes them, less those that leave the engine no room to answer."""
    encoded = [encode_example(tokenizer, row.messages, row.target) for row in rows]
    return sorted((row for row in encoded if len(row.ids) < max_tokens), key=lambda row: row.ids)  # those that share passages together


# ── what the engine says ──


class Server:
    """The engine's HTTP interface as the proof needs it. Use as a context manager; raises EngineError."""

    def __init__(self, url: str, base: str, adapter: str) -> None:
        self.url, self.base, self.adapter = url, base, adapter
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))  # the server ends idle ones
        self.listed: dict[str, dict[str, Any]] = {row["id"]: row for row in self._ask("GET", f"{url}/models")["data"]}
        if adapter not in self.listed:
            raise EngineError(f"the engine at {url} does not serve {adapter}", "restart it: `understudy serve` loads every registered adapter")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    @property
    def max_tokens(self) -> int:
        """The longest prompt plus completion."""
        return int(self.listed[self.base].get("max_model_len") or 2**31)

    def tokenize(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt as the server builds it for the adapter."""
        body = {"model": self.adapter, "messages": [message.model_dump() for message in messages], "add_generation_prompt": True}
        return [int(token) for token in self._ask("POST", self.url.removesuffix("/v1") + "/tokenize", body)["tokens"]]

    def logprobs(self, model: str, row: Encoded) -> Floats:
        """Log-probability of each token of the row's completion. Raises EngineError where one is missing or not finite."""
        body = {"model": model, "prompt": row.ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = self._ask("POST", f"{self.url}/completions", body)["choices"][0]["prompt_logprobs"][row.completion :]
        scores = np.array([entry[str(token)]["logprob"] for entry, token in zip(entries, row.ids[row.completion :], strict=True)], dtype=float)
        if not np.isfinite(scores).all():
            raise EngineError(f"{model} gives log-probabilities that are not finite", "see logs/engine.log; another serve.dtype may help")
        return scores

    def answer(self, messages: list[Message], salt: str) -> str:
        """A greedy answer of the adapter; `salt` keeps it apart from the prefix cache of others."""
        turns = [message.model_dump() for message in messages]
        body = {"model": self.adapter, "messages": turns, "max_tokens": CANARY_TOKENS, "temperature": 0, "cache_salt": salt}
        return str(self._ask("POST", f"{self.url}/chat/completions", body)["choices"][0]["message"]["content"] or "")

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._http.request(method, url, json=body)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            raise EngineError(f"the engine answered {error.response.status_code} to {url}: {error.response.text[:300]}", "see logs/engine.log") from error
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"the engine at {url} broke off: {error!r}", "is it still running? see logs/engine.log") from error


def check_listing(server: Server, folder: Path) -> Check:
    """The engine says that it loaded the adapter from this folder, onto this base."""
    began = time.monotonic()
    listed = server.listed[server.adapter]
    faults = []
    if Path(listed.get("root") or "").resolve() != folder.resolve():
        faults.append(f"the engine loaded it from {listed.get('root')}")
    if listed.get("parent") != server.base:
        faults.append(f"the engine put it on {listed.get('parent')}")
    return _faults("listed", faults, "the engine loaded it from its folder", began)


def check_token_ids(server: Server, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Check:
    """The server turns real prompts into the same token ids as training; value = rows that differ."""
    began = time.monotonic()
    different = sum(server.tokenize(row.messages) != encode_prompt(tokenizer, row.messages) for row in rows)
    return Check("token_ids", different, 0, f"{len(rows) - different} of {len(rows)} prompts tokenised as in training", time.monotonic() - began)


def check_canaries(server: Server, rows: list[Row]) -> Check:
    """The served adapter answers real prompts, greedily, the same twice; value = prompts where it does not."""
    began = time.monotonic()
    answers = [[server.answer(row.messages, f"proof-{began}-{attempt}") for attempt in range(2)] for row in rows]
    faults = [f"{first!r} then {second!r}" for first, second in answers if first != second or not first.strip()]
    return _faults("canary", faults, "; ".join(repr(first) for first, _ in answers), began)


# ── what PEFT says ──


def import_torch_patiently() -> None:
    """Import torch, if that is still to be done, with threads that sleep while they wait.

    OpenMP reads its policy once, when it loads. Spinning beside a busy engine, two threads on two cores scored 30–130 tokens/s,
    sleeping 310; alone there is no difference. The variable is taken back: an engine started later must not inherit it.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["OMP_WAIT_POLICY"]


def load_reference(weights: Path, adapter: Path) -> PreTrainedModel:
    """The served weights with the adapter by PEFT: in float32 where that fits, on the GPU if the engine left room there.

    Float32, because it is nearest to the engine even where that computes in bf16: on 24 rows of SmolLM2-135M the base served by
    vLLM is 0.025 nats a token from float32 and 0.031 from bf16. Raises AdapterError.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    needed = sum(file.stat().st_size for file in weights.glob("*.safetensors"))  # as bf16
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device, dtype = ("cuda:0" if free > 1.3 * needed else "cpu"), (torch.bfloat16 if 1.3 * needed < free < 2.6 * needed else torch.float32)
    try:
        base = AutoModelForCausalLM.from_pretrained(str(weights), dtype=dtype, local_files_only=True, trust_remote_code=False).to(device)
        model: PreTrainedModel = PeftModel.from_pretrained(base, str(adapter), torch_device=device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot load the adapter: {error}", "`understudy adapters verify` checks its files") from error
    return model


class Scorer:
    """Scores rows by a model; what a row shares with the row before it (the passages) is computed once."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache()
        self.cached: list[int] = []  # the token ids whose keys and values the cache holds

    def logprobs(self, row: Encoded) -> Floats:
        """Log-probability of each token of the row's completion, teacher-forced."""
        import torch

        count = len(row.ids) - row.completion
        shared = min(shared_prefix(self.cached, row.ids), row.completion - 1)  # the prompt's last token predicts the first answer token
        if self.cached:
            self.cache.crop(shared - len(self.cached))  # negative: tokens to drop
        self.cached = row.ids
        with torch.inference_mode():
            fed = torch.tensor([row.ids[shared:]], device=self.model.device)
            output = self.model(input_ids=fed, past_key_values=self.cache, use_cache=True, logits_to_keep=count + 1)
            logprobs = output.logits[0, :-1].float().log_softmax(-1)  # [completion, vocabulary]
            scores = logprobs.gather(1, fed[0, -count:, None])[:, 0]
        return np.asarray(scores.double().cpu().numpy(), dtype=float)


def shared_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def measure(
    server: Server, weights: Path, adapter: Path, rows: list[Encoded], report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> tuple[Distances, dict[str, Any]]:
    """Score the rows by engine and PEFT, with and without the adapter: the distances, and what was measured for the record."""
    began = time.monotonic()
    tokens = sum(len(row.ids) - row.completion for row in rows)
    report(f"scoring {tokens} answer tokens of {len(rows)} rows by the engine and by PEFT")
    with progress("proving", 4 * len(rows)) as bar:

        def scored(score: Callable[[Encoded], Floats]) -> list[Floats]:
            results = []
            for row in rows:
                results.append(score(row))
                bar.advance()
            return results

        served = scored(lambda row: server.logprobs(server.adapter, row))
        served_base = scored(lambda row: server.logprobs(server.base, row))
        model = load_reference(weights, adapter)
        peft = scored(Scorer(model).logprobs)
        with model.disable_adapter():
            peft_base = scored(Scorer(model).logprobs)
    distances = Distances(_apart(served, peft), _apart(served, peft_base), _apart(served_base, peft_base), _apart(served, served_base))
    record = {"rows": len(rows), "answer_tokens": tokens, "reference": str(model.dtype).removeprefix("torch."), "nats_per_token": distances.means()}
    return distances, record | {"seconds": round(time.monotonic() - began, 1)}


def _apart(first: list[Floats], second: list[Floats]) -> Floats:
    """Mean |difference| per token, one value a row."""
    return np.array([np.abs(a - b).mean() for a, b in zip(first, second, strict=True)])


# ── what it means ──


def weigh(distances: Distances, seconds: float = 0.0) -> list[Check]:
    """The four checks over log-probabilities.

    nearer_to_trained    the served adapter is nearer to PEFT with the adapter than to PEFT without it, row by row: the
                         one-sided p of a paired sign test
    within_engine_noise  its distance from PEFT is at most 1.5 times that of the base, which is the engine's arithmetic alone
    engine_noise         that distance of the base is itself what rounding explains: otherwise it would excuse anything
    changes_the_base     served adapter and served base are further apart than that noise

    Values of the last three are 95 % upper bounds of a bootstrap that draws whole rows, both sides of a ratio together.
    Below seven rows the sign test could not reach its limit however right the adapter is, and a bootstrap means nothing.
    """
    rows = len(distances.noise)
    undecided = 0.5**rows > SIGN_LIMIT
    if rows == 0:
        return [Check(name, 1.0, 0.0, "no rows", 0.0, True) for name in ("nearer_to_trained", "within_engine_noise", "engine_noise", "changes_the_base")]
    mean = distances.means()
    nearer = int((distances.to_adapter < distances.to_base).sum())
    ones = np.ones(rows)
    findings = [
        (
            "nearer_to_trained",
            sign_test(distances.to_adapter, distances.to_base),
            SIGN_LIMIT,
            f"{nearer} of {rows} rows nearer to PEFT with the adapter than without",
        ),
        (
            "within_engine_noise",
            ratio_bound(distances.to_adapter + EPSILON, distances.noise + EPSILON),
            NOISE_LIMIT,
            f"{mean['to_adapter']} nats a token from PEFT; the base {mean['noise']}",
        ),
        ("engine_noise", ratio_bound(distances.noise, ones), ENGINE_NOISE_LIMIT, f"{mean['noise']} nats a token between the base served and by PEFT"),
        (
            "changes_the_base",
            ratio_bound(distances.noise + EPSILON, distances.change + EPSILON),
            1.0,
            f"{mean['change']} nats a token from the served base; the engine's noise is {mean['noise']}",
        ),
    ]
    return [Check(name, value, limit, detail, seconds / len(findings), undecided) for name, value, limit, detail in findings]


def sign_test(smaller: Floats, larger: Floats) -> float:
    """One-sided p of the paired sign test that the first is smaller: P(at least as many wins | heads and tails). Ties say nothing."""
    wins, losses = int((smaller < larger).sum()), int((smaller > larger).sum())
    trials = wins + losses
    return sum(math.comb(trials, k) for k in range(wins, trials + 1)) / (1 << trials)


def ratio_bound(numerator: Floats, denominator: Floats) -> float:
    """Upper bound of mean(numerator) ÷ mean(denominator) by a paired percentile bootstrap over rows; the same rows, the same bound."""
    picks = np.random.default_rng(0).integers(0, len(numerator), (RESAMPLES, len(numerator)))
    ratios = numerator[picks].sum(axis=1) / denominator[picks].sum(axis=1)
    return float(np.quantile(ratios, CONFIDENCE))


def _faults(name: str, faults: list[str], otherwise: str, began: float) -> Check:
    """A check that counts faults, none allowed."""
    return Check(name, len(faults), 0, "; ".join(faults) or otherwise, time.monotonic() - began)
