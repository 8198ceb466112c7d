"""N-gram speculative decoding, taken only where it changes no answer and is faster (vLLM's has had bugs with LoRA, FACTS.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve.arguments import EngineSpec
from serve.load import CONCURRENCY, Load, Prompt, measure, read_prompts
from serve.measured import fingerprint, recall, remember, trial_engine
from understudy.errors import EngineError
from understudy.workspace import Workspace

PROMPTS = 16
MIN_GAIN = 1.05  # one request at a time: what speculation is for
MAX_LOSS = 0.95  # of the throughput under load, where it tends to lose


@dataclass(frozen=True)
class Verdict:
    """What the probe found: answers that differ, and how much faster the same answers came."""

    prompts: int
    different: int
    alone: float  # seconds a request without ÷ with, one at a time
    loaded: float  # tokens/s with ÷ without, under load

    @property
    def use(self) -> bool:
        """Whether speculation is taken."""
        return self.different == 0 and self.alone >= MIN_GAIN and self.loaded >= MAX_LOSS

    def __str__(self) -> str:
        taken = "taken" if self.use else "left off"
        differ = f"{self.different} of {self.prompts} greedy answers differ, " if self.different else "greedy answers equal, "
        return f"speculative decoding is {taken}: {differ}{self.alone:.2f} × the speed alone, {self.loaded:.2f} × under load"


def decide_speculation(
    workspace: Workspace, spec: EngineSpec, report: Callable[[str], None], open_trial: Callable[..., Any] = trial_engine, may_measure: bool = True
) -> EngineSpec:
    """The spec with speculative decoding where the settings wish for it and a probe is for it; the probe's finding is kept.

    Starts up to three engines, one after the other, the first time. Raises EngineError where the plain one cannot run.
    """
    wished = spec.settings.speculative_tokens
    if not wished:
        return spec
    key = fingerprint(spec, wished)
    kept = recall(workspace, "speculation", key)
    if kept is None and not may_measure:
        return spec
    if kept is None:
        report(f"probing speculative decoding ({wished} tokens) against plain decoding, once for these settings and adapters")
        kept = asdict(_probe(workspace, spec, wished, report, open_trial))
        remember(workspace, "speculation", key, kept)
    verdict = Verdict(**kept)
    report(str(verdict))
    return replace(spec, speculative_tokens=wished) if verdict.use else spec


def _probe(workspace: Workspace, spec: EngineSpec, wished: int, report: Callable[[str], None], open_trial: Callable[..., Any]) -> Verdict:
    prompts, log = read_prompts(workspace, PROMPTS), workspace.logs / "engine.log"
    models = [spec.merged or spec.base, *(adapter.name for adapter in spec.adapters[-1:])]
    with open_trial(spec, log, report) as engine:
        plain = _answers(engine.url, models, prompts)
    try:
        with open_trial(replace(spec, speculative_tokens=wished), log, report) as engine:
            speculating = _answers(engine.url, models, prompts)
    except EngineError as error:
        report(f"the engine cannot speculate: {error.message}")
        return Verdict(len(prompts), len(prompts), 0.0, 0.0)
    first = compare(plain, speculating)
    if not first.use:
        return first
    with open_trial(spec, log, report) as engine:  # once more: the machine may have been busy the first time
        second = compare(_answers(engine.url, models, prompts), speculating)
    return Verdict(first.prompts, max(first.different, second.different), min(first.alone, second.alone), min(first.loaded, second.loaded))


def compare(plain: tuple[Load, Load], speculating: tuple[Load, Load]) -> Verdict:
    """The verdict over (alone, loaded) of both; a request that failed counts as a different answer."""
    (alone, loaded), (fast_alone, fast_loaded) = plain, speculating
    pairs = zip(alone.replies, fast_alone.replies, strict=True)
    different = sum(a.text != b.text or bool(a.fault or b.fault) for a, b in pairs) + len(loaded.faults) + len(fast_loaded.faults)
    return Verdict(len(alone.replies), different, alone.seconds / fast_alone.seconds, fast_loaded.tokens_per_second / loaded.tokens_per_second)


def _answers(url: str, models: list[str], prompts: list[Prompt]) -> tuple[Load, Load]:
    measure(url, models, prompts[:2], to_the_end=True)  # the first look-up compiles
    return measure(url, models, prompts, 1, to_the_end=True), measure(url, models, prompts, CONCURRENCY, to_the_end=True)
