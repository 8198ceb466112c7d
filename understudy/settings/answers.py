"""How a question is answered, when an answer is given again, and what is kept and told of a run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from understudy.settings.section import Section


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
