"""A proof repeated on load: an engine that was started since is asked one row of it again before its adapters take traffic.

A proof is about an adapter, weights and a precision, not about a process: an engine that comes up later may list the adapter and not
apply it, or apply another's weights (vllm #18372, #42125). So a proof keeps the row that the adapter changes most, and what served
adapter and base gave the tokens of its answer; a new engine must be nearer to the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from serve.served import Server
from serve.weigh import Floats
from understudy.chat import Encoded
from understudy.engines import RunningEngine
from understudy.errors import EngineError
from understudy.files import read_json

if TYPE_CHECKING:
    from serve.gateway.observe import Log


SECONDS = 30.0  # for one answer: requests wait for this


def keep_sample(rows: list[Encoded], adapter: list[Floats], base: list[Floats]) -> dict[str, Any]:
    """What a proof keeps to be repeated: the row on which log-probabilities with the adapter and without it are furthest apart."""
    widest = max(range(len(rows)), key=lambda place: float(np.abs(adapter[place] - base[place]).mean()))
    row = rows[widest]
    scores = {"adapter": adapter[widest].round(4).tolist(), "base": base[widest].round(4).tolist()}
    return {"ids": row.ids, "completion": row.completion, **scores}


def ask_again(engine: RunningEngine, adapter: str, sample: dict[str, Any]) -> str:
    """Why an engine does not repeat an adapter's proof; empty where it does. Raises EngineError where it cannot be asked."""
    with Server(engine.url, engine.merged or engine.base, adapter, engine.api_key, SECONDS) as server:
        now = server.logprobs(adapter, Encoded(sample["ids"], sample["completion"]))
    to_adapter, to_base = (float(np.abs(now - np.array(sample[name])).mean()) for name in ("adapter", "base"))
    figures = f"{to_adapter:.2f} nats a token from its proof, {to_base:.2f} from the base"
    return "" if to_adapter < to_base else f"the engine does not repeat its proof ({figures}); restart `understudy serve`, then prove it again"


class Repeated:
    """What the running engine said when the proofs of its adapters were repeated: once for each engine and proof."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._engine: RunningEngine | None = None
        self._said: dict[str, tuple[int, str]] = {}  # by adapter: when its proof was written, and the fault

    def fault(self, engine: RunningEngine, adapter: str, proof: Path) -> str:
        """Why an adapter takes no traffic by this engine; empty where nothing does, or its proof is older than samples are.

        Raises TimeoutError where the engine does not answer; an adapter that was taking traffic goes on.
        """
        if engine is not self._engine:
            self._engine, self._said = engine, {}
        written = proof.stat().st_mtime_ns
        before = self._said.get(adapter)
        if before is None or before[0] != written:
            try:
                sample = read_json(proof).get("measured", {}).get("sample")
                found = ask_again(engine, adapter, sample) if sample else ""
            except EngineError as error:
                if not _is_refusal(error):
                    if before:
                        return before[1]
                    raise TimeoutError from error
                found = f"the engine cannot repeat its proof: {error.message}"
            self._said[adapter] = (written, found)
            if found:
                self._log.write("proof_not_repeated", adapter=adapter, message=found)
        return self._said[adapter][1]


def _is_refusal(error: EngineError) -> bool:
    """Whether the engine answered, and will answer the same again: the row may be longer than its context is now."""
    return isinstance(error.__cause__, httpx.HTTPStatusError) and error.__cause__.response.is_client_error
