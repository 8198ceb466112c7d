"""Any chat JSONL as a dataset to train on: {"messages": […]} rows, as OpenAI, Fireworks and TRL write them, or ShareGPT's.

Every assistant's turn that is not weighed 0 is a row, after all that was said before it: the rows of a conversation share their prefix.
Nothing of such a file is verified against the corpus. Its lineage is the file, by digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.dataset import BUILDER_VERSION, IMPORTED, write_dataset
from train.near_duplicates import joined, near_duplicate_pairs
from understudy.digests import digest_of, digest_of_file
from understudy.errors import TrainingError
from understudy.files import numbered_rows
from understudy.records import Example, Message
from understudy.workspace import Workspace

VALIDATION_SHARE = 0.05  # of the conversations, near-duplicates on one side
FEWEST = 40  # conversations, below which none is spared for validation
SHOWN_FAULTS = 5
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # ShareGPT's, and OpenAI's newer one


def import_chat_file(workspace: Workspace, path: Path) -> Path:
    """The dataset folder of a file of conversations, written unless it is there; raises TrainingError naming the rows that cannot be learnt."""
    examples = examples_of(read_conversations(path))
    digest = digest_of([BUILDER_VERSION, IMPORTED, [example.model_dump() for example in examples]])
    folder = workspace.datasets / digest
    if not (folder / "dataset.json").exists():
        facts = {"lineage": IMPORTED, "prompt_version": IMPORTED, "source": path.name, "source_digest": digest_of_file(path)}
        write_dataset(workspace, folder, examples, {}, facts)
    return folder


def read_conversations(path: Path) -> list[list[tuple[Message, bool]]]:
    """The messages of each row, with whether they are to be learnt. Raises TrainingError with the first faults and their lines."""
    conversations, faults = [], []
    for line, written in numbered_rows(path):
        row = as_messages(written)
        if found := faults_of(row):
            faults.append(f"line {line}: {found[0]}")
        else:
            conversations.append([(Message(role=m["role"], content=m["content"]), is_learnt(m)) for m in row["messages"]])
    if faults:
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise TrainingError(f"{path}: {'; '.join(faults[:SHOWN_FAULTS])}{more}", f"correct these rows; `understudy dataset lint {path}` lists every fault")
    if not conversations:
        raise TrainingError(f"{path} holds no conversation", 'write one JSON object a line: {"messages": [{"role": "user", "content": "…"}, …]}')
    return conversations


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the form that is read here: ShareGPT's names replaced, a developer called system, parts of text joined by lines, as vLLM joins them."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    return {key: value for key, value in row.items() if key != "conversations"} | {"messages": [_as_message(turn) for turn in turns]}


def _as_message(turn: dict[str, Any]) -> dict[str, Any]:
    message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
    if isinstance(message.get("role"), str):
        message["role"] = ROLES.get(message["role"], message["role"])
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        message["content"] = "\n".join(part["text"] for part in parts)
    return message


def faults_of(row: dict[str, Any]) -> list[str]:
    """Why a row is no conversation that can be learnt; empty for one that can."""
    messages = row.get("messages")
    if "messages" not in row:
        return [f"it has no `messages`, but {', '.join(sorted(row)) or 'nothing'}"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return ["`messages` is not a list of messages"]
    faults = [fault for number, message in enumerate(messages, 1) for fault in _message_faults(number, message)]
    roles = [message.get("role") for message in messages]
    if "system" in roles[1:]:
        faults.append("a system message is not the first")
    turns = [role for role in roles if role != "system"]
    if turns != [("user", "assistant")[place % 2] for place in range(len(turns))]:
        faults.append("user and assistant do not take turns")
    if not turns or turns[-1] != "assistant":
        faults.append("the last message is not the assistant's")
    elif not any(is_learnt(message) for message in messages):
        faults.append("every turn of the assistant has the weight 0")
    return faults


def _message_faults(number: int, message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if message.get("role") not in ("system", "user", "assistant"):
        yield f"message {number} has the role {message.get('role')!r}: system, user or assistant"
    if message.get("tool_calls"):
        yield f"message {number} calls a tool, which is not learnt here"
    elif not isinstance(content, str) or not content.strip():
        yield f"message {number} has no text"
    elif content.encode("utf-8", "replace").decode() != content:
        yield f"message {number} holds half a surrogate pair, which UTF-8 cannot"
    if message.get("weight", 1) not in (0, 1):
        yield f"message {number} has a weight other than 0 or 1"


def is_learnt(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's and not weighed 0."""
    return message.get("role") == "assistant" and message.get("weight", 1) == 1


def examples_of(conversations: list[list[tuple[Message, bool]]]) -> list[Example]:
    """A row for each learnt turn; equal conversations once, and about VALIDATION_SHARE of them for validation."""
    distinct = list({digest_of([[message.model_dump(), learnt] for message, learnt in turns]): turns for turns in conversations}.items())
    asked = [" ".join(message.content for message, _ in turns if message.role == "user") for _, turns in distinct]
    classes = joined(len(distinct), near_duplicate_pairs(asked))
    examples = []
    for place, (digest, turns) in zip(classes, distinct, strict=True):
        drawn = int(hashlib.sha256(asked[place].encode()).hexdigest(), 16) % 1000 < 1000 * VALIDATION_SHARE
        for number, (message, learnt) in enumerate(turns):
            if learnt:
                before = [said for said, _ in turns[:number]]
                examples.append(
                    Example(
                        task="chat",
                        question=before[-1].content,
                        passage_ids=[],
                        messages=before,
                        target=message.content,
                        split="validation" if drawn and len(distinct) >= FEWEST else "train",
                        kind="imported",
                        trace_id=digest[:32],
                        group_ids=[],
                    )
                )
    return examples
