"""Training recipes: typed, said once; a YAML file holds only what differs from the defaults.

docs/training.md tells which keys bear TRL's and PEFT's names, and what the others are called there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from understudy.config import explain_fault, parse_overrides
from understudy.errors import NotFoundError, UsageError
from understudy.releases import RESERVED

FOLDER = Path(__file__).parent / "recipes"
MethodName = Literal["lora", "dora", "ia3", "bitfit", "prompt_tuning", "prefix_tuning", "fishmask", "far"]
LEARNING_RATES = {"ia3": 1e-2, "bitfit": 5e-3, "prompt_tuning": 1e-1, "prefix_tuning": 1e-2}  # where lora's does not do


class Recipe(BaseModel):
    """Everything that decides an adapter, besides its dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("handbooks", pattern=r"^[a-z][a-z0-9-]{0,47}$", description="the adapter's name")
    dataset: str | None = Field(None, description="what to learn from: any chat JSONL file, or a dataset's digest or folder; unset: the dataset built last")
    base: str | None = Field(None, description="base model; unset: the workspace's models.base")
    quantisation: Literal["nf4", "none"] = Field("nf4", description="nf4: double-quantised QLoRA; none: LoRA over bf16 weights")
    method: MethodName = Field("lora", description="what is trained (docs/training.md); vLLM serves lora alone")
    steps: list[Literal["plan", "answer", "validate"]] = Field(
        default=["plan", "answer", "validate"], min_length=1, description="of a dataset built here, the agent's steps whose rows are learnt"
    )
    rank: int = Field(16, ge=1, le=512, description="LoRA rank r")
    alpha: int = Field(32, ge=1, description="LoRA alpha")
    virtual_tokens: int = Field(20, ge=1, le=1000, description="virtual tokens of prompt_tuning and prefix_tuning")
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1, description="layers that get an adapter"
    )
    use_rslora: bool = Field(False, description="scale by alpha/√rank (arXiv:2312.03732) in place of alpha/rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what enters the adapter; rows that share a prefix share its mask")
    layers_to_transform: list[int] | None = Field(None, min_length=1, description="decoder layers that get an adapter, counted from 0; unset: all")
    unfreeze_ratio: float = Field(0.0, ge=0, le=1, description="share of training over which layers thaw, the last first (arXiv:1801.06146)")
    warm_start: str | None = Field(None, description="adapter, NAME or NAME@DIGEST, whose weights training starts from")
    fsdp: bool = Field(False, description="several processes share the base's layers out among them (FSDP2), in place of the whole base in each")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, a third more time")
    optim: Literal["adamw_torch", "paged_adamw_8bit"] = Field("adamw_torch", description="AdamW's moments: float32, or 8 bits in pageable memory")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of training over which the rate rises linearly")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    decision_weight: float = Field(8.0, ge=0, description="loss weight of an answer's first token, which decides between answering and abstaining")
    plan_weight: float = Field(1.0, ge=0, description="loss weight of a token of a search query; an answer's is 1")
    validate_weight: float = Field(4.0, ge=0, description="loss weight of a token of a validation score")
    epochs: int = Field(3, ge=1, description="passes over the dataset")
    max_steps: int | None = Field(None, ge=1, description="end after so many optimiser steps; unset: by epochs alone")
    tokens_per_batch: int = Field(1536, ge=256, description="distinct tokens of one forward pass")
    batches_per_step: int = Field(2, ge=1, description="batches of one optimiser step; on a CPU as many at once as there are cores")
    max_length: int = Field(2048, ge=64, description="rows longer than this, in tokens, are left out and counted")
    max_minutes: float | None = Field(None, gt=0, description="end, rate decayed, when this time is spent; unset: by epochs alone")
    checkpoint_minutes: float = Field(1.0, gt=0, description="time between checkpoints")
    eval_steps: int | None = Field(None, ge=1, description="optimiser steps between validations; unset: one, at the end")
    early_stopping_patience: int | None = Field(None, ge=1, description="end after so many validations without a new best; needs eval_steps")
    load_best_model_at_end: bool = Field(False, description="keep the weights of the best validation; needs eval_steps")
    report_to: list[str] = Field(default=[], description="where metrics go besides metrics.jsonl: tensorboard, or an installed understudy.reporters plugin")
    seed: int = Field(0, description="seed of order, passage order and initialisation")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_method(cls, values: Any) -> Any:
        rate = LEARNING_RATES.get(values.get("method"))
        return {"learning_rate": rate} | values if rate else values

    @model_validator(mode="after")
    def _fits_method(self) -> Recipe:
        lora_only = ("use_rslora", "lora_dropout", "layers_to_transform", "warm_start")
        set_anyway = [key for key in lora_only if getattr(self, key) != type(self).model_fields[key].default]
        if set_anyway and self.method not in ("lora", "dora"):
            raise ValueError(f"{self.method} has no {', '.join(sorted(set_anyway))}")
        if self.method == "prefix_tuning" and self.gradient_checkpointing:
            raise ValueError("prefix_tuning and gradient_checkpointing exclude each other: transformers would drop the prefix")
        if self.fsdp and (self.method, self.quantisation) != ("lora", "none"):
            raise ValueError("fsdp shares out plain weights under lora: set method=lora quantisation=none")
        if self.method in ("fishmask", "far") and self.quantisation != "none":
            raise ValueError(f"{self.method} changes the base's own weights: set quantisation=none")
        return self

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name} is reserved")
        return name

    @field_validator("early_stopping_patience", "load_best_model_at_end")
    @classmethod
    def _validates_in_time(cls, value: object, others: ValidationInfo) -> object:
        if value and others.data.get("eval_steps") is None:
            raise ValueError("needs eval_steps")
        return value


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """A recipe by path, or by name among the shipped ones, with key=value overrides. Raises UsageError with every fault."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise NotFoundError(f"no recipe {name}", f"give a YAML file or one of: {shipped}")
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}", "fix the file") from error
    try:
        digests = dict(each.split("=", 1) for each in overrides if each.startswith("dataset="))  # one of digits alone is no number
        return Recipe.model_validate({**values, **parse_overrides(overrides), **digests})
    except ValidationError as error:
        raise UsageError("; ".join(explain_fault(fault, Recipe) for fault in error.errors()), "docs/settings.md lists every key") from error


class RetrieverRecipe(BaseModel):
    """Everything that decides a tuned embedder, besides its base and its dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("retriever", pattern=r"^[a-z][a-z0-9.-]{0,47}$", description="the new embedder's name in models/")
    epochs: int = Field(2, ge=1, description="passes over the pairs")
    batch: int = Field(16, ge=2, description="pairs of one step: each is the others' negative")
    negative_depth: int = Field(8, ge=1, description="a hard negative is drawn from so many best retrieved passages")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of training over which the rate rises linearly")
    scale: float = Field(20.0, gt=0, description="cosines are multiplied by it: the inverse of a temperature")
    seed: int = Field(0, description="seed of order, negatives and dropout")


def load_retriever_recipe(settings: list[str]) -> RetrieverRecipe:
    """The defaults with key=value settings. Raises UsageError with every fault."""
    try:
        return RetrieverRecipe.model_validate(parse_overrides(settings))
    except ValidationError as error:
        raise UsageError("; ".join(explain_fault(fault, RetrieverRecipe) for fault in error.errors()), "docs/settings.md lists every key") from error
