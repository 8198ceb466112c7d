"""How models are compared, and what a turn of the whole loop takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from understudy.settings.section import Section


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
