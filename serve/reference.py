"""What PEFT says: log-probabilities of rows by the served weights with the trained adapter, and without it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from understudy.chat import Encoded
from understudy.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    from peft import PeftModel

    try:
        base = load_plain(weights)
        model: PreTrainedModel = PeftModel.from_pretrained(base, str(adapter), torch_device=str(base.device)).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot load the adapter: {error}", "`understudy adapters verify` checks its files") from error
    return model


def load_plain(weights: Path) -> PreTrainedModel:
    """Weights without an adapter, as `load_reference` has them. Raises AdapterError."""
    import torch
    from transformers import AutoModelForCausalLM

    needed = sum(file.stat().st_size for file in weights.glob("*.safetensors"))  # as bf16
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device, dtype = ("cuda:0" if free > 1.3 * needed else "cpu"), (torch.bfloat16 if 1.3 * needed < free < 2.6 * needed else torch.float32)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(weights), dtype=dtype, local_files_only=True, trust_remote_code=False)
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"the weights in {weights.name} cannot be loaded: {error}", "`understudy models ls` lists what is there") from error


class Scorer:
    """Scores rows by a model; what a row shares with the row before it (the passages) is computed once."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache()
        self.cached: list[int] = []  # the token ids whose keys and values the cache holds

    def logprobs(self, row: Encoded) -> NDArray[np.float64]:
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
