"""Which rows of an adapter's dataset a proof rests on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag.prompts import ABSTENTION, example_messages
from understudy.adapters import AdapterManifest
from understudy.chat import Encoded, encode_example
from understudy.errors import NotFoundError
from understudy.files import read_json, read_jsonl
from understudy.records import Example, Message
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """A real row: the prompt as inference renders it, and the completion that the dataset gives."""

    messages: list[Message]
    target: str
    split: str

    @property
    def length(self) -> int:
        """Characters of the prompt: orders rows without tokenising a whole dataset."""
        return sum(len(message.content) for message in self.messages)


def dataset_of(workspace: Workspace, manifest: AdapterManifest) -> Path:
    """The folder of the dataset to prove an adapter on: its own, or the newest where its own is unknown. Raises NotFoundError."""
    if manifest.dataset_digest:
        return workspace.datasets / manifest.dataset_digest
    built = sorted(workspace.datasets.glob("*/dataset.json"), key=lambda file: file.stat().st_mtime)
    if not built:
        raise NotFoundError(f"there is no dataset to prove {manifest.served_name} on", "run `understudy dataset build`")
    return built[-1].parent


def steps_shown(manifest: AdapterManifest) -> frozenset[str]:
    """The steps whose rows show what an adapter learnt: the answer if it learnt it, else the others. On rows of a step that it never
    saw its completions are unlikely, and what rounding does to them is large."""
    steps = manifest.recipe.get("steps")
    return frozenset(map(str, steps)) if isinstance(steps, list) and "answer" not in steps else frozenset(["answer"])


def read_rows(dataset: Path, adapter: str, steps: frozenset[str] = frozenset(["answer"])) -> list[Row]:
    """The distinct rows of a dataset that are of these steps, and a chat file's, rendered as inference renders them; raises NotFoundError where
    there are none."""
    if not (dataset / "examples.jsonl").is_file():
        raise NotFoundError(
            f"the dataset {dataset.name[:12]} of {adapter} is gone, so there are no rows to prove it on",
            "`understudy dataset build` makes it again from the same traces; or restore datasets/",
        )
    passages: dict[str, str] = read_json(dataset / "passages.json")
    rows: dict[str, Row] = {}
    for values in read_jsonl(dataset / "examples.jsonl"):
        example = Example.model_validate(values)
        if example.task in steps or example.task == "chat":
            messages = example_messages(example, passages)
            rows.setdefault(messages[-1].content, Row(messages, example.target, example.split))
    if not rows:
        raise NotFoundError(
            f"the dataset {dataset.name[:12]} of {adapter} has no {' or '.join(sorted(steps))} rows", "import expert answers, build the dataset and train again"
        )
    return list(rows.values())


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
