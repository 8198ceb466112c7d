"""A model client that pays for every call once: each completion is on disk before it is used, and is read from there ever after.

What runs over it can be killed anywhere and run again from its beginning: it takes the same way and repeats no call but those
that were in flight. The budget counts what the file holds, over all runs together.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.client import Model, ModelClient
from understudy.completions import Completion
from understudy.digests import digest_of
from understudy.errors import StorageError, UnderstudyError
from understudy.files import append_jsonl
from understudy.records import Message, Usage


class BudgetReached(UnderstudyError):
    """The next call would go beyond the budget; its message says of what."""

    code = "budget"


@dataclass(frozen=True)
class Budget:
    """Bounds over all runs; None is none."""

    calls: int | None = None
    tokens: int | None = None  # prompt and completion together; the calls in flight when it is reached still count


class CallLog:
    """Completions by key in a JSONL file; a line that a kill cut off is removed when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._completions: dict[str, Completion] = {}
        self.prompt_tokens = self.completion_tokens = 0  # of all calls together
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._count(row.pop("key"), Completion(**{**row, "usage": Usage.model_validate(row["usage"])}))
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(f"{path} line {number} is not a call", f"remove {path} and repeat") from error

    def __len__(self) -> int:
        return len(self._completions)

    def get(self, key: str) -> Completion | None:
        """The completion that was paid for already, or None."""
        return self._completions.get(key)

    def add(self, key: str, completion: Completion) -> None:
        """Keep a completion; it is on disk when this returns. Raises StorageError."""
        append_jsonl(self._path, {"key": key, **asdict(completion), "usage": completion.usage.model_dump()})
        self._count(key, completion)

    def _count(self, key: str, completion: Completion) -> None:
        self._completions[key] = completion
        self.prompt_tokens += completion.usage.prompt_tokens
        self.completion_tokens += completion.usage.completion_tokens


class RecordedClient(ModelClient):
    """A ModelClient over a CallLog, within a Budget; raises BudgetReached in place of the call that would go beyond it."""

    def __init__(self, model: Model, log: CallLog, budget: Budget) -> None:
        super().__init__(model)
        self._log, self._budget = log, budget
        self._in_flight = 0
        self._asked: Counter[str] = Counter()  # how often each request was made: the same request again is another sample

    async def complete(self, messages: list[Message], max_tokens: int, temperature: float = 0.0, on_progress: Any = None) -> Completion:  # noqa: ARG002 - nobody watches
        """See ModelClient."""
        request = digest_of([[message.model_dump() for message in messages], temperature])  # a limit may depend on what the endpoint was found to offer
        self._asked[request] += 1
        key = digest_of([request, self._asked[request]])
        known = self._log.get(key)
        if known:
            return known
        self._check_budget()
        self._in_flight += 1
        try:
            completion = await super().complete(messages, max_tokens, temperature)
        except BaseException:
            self._asked[request] -= 1  # not answered, so not asked
            raise
        finally:
            self._in_flight -= 1
        self._log.add(key, completion)
        return completion

    def _check_budget(self) -> None:
        calls, tokens = self._budget.calls, self._budget.tokens
        if calls is not None and len(self._log) + self._in_flight >= calls:
            raise BudgetReached("calls")
        if tokens is not None and self._log.prompt_tokens + self._log.completion_tokens >= tokens:
            raise BudgetReached("tokens")
