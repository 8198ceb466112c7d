"""What would fail, or be lost without a word, when a dataset is trained on here, by TRL or on Fireworks, and served by vLLM."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from train.chat_file import as_messages, faults_of, is_learnt
from understudy.chat import encode_example, render_prompt
from understudy.digests import digest_of
from understudy.errors import NotFoundError
from understudy.records import Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIREWORKS_ROWS = (3, 3_000_000)  # docs.fireworks.ai, Supervised Fine Tuning - Text, November 2026
FIREWORKS_UPLOAD = 150 * 2**20  # bytes in one request; a larger file goes by a signed URL
FEWEST_ROWS = 2  # that training takes
Fault = tuple[str, Literal["error", "warning"], str]  # rule, level, message
SHAPE: Fault = ("shape", "warning", 'training here reads it as {"messages": [{"role", "content"}, …]}; Fireworks, and TRL for some of it, want it written so')


class Finding(Record):
    """One fault of a dataset. An error would fail or spoil a run; a warning costs rows or quality."""

    file: str
    row: int | None = None  # 1-based line; None: the file as a whole
    rule: str
    level: Literal["error", "warning"] = "error"
    message: str


@dataclass(frozen=True)
class Limits:
    """What a row must fit in, in tokens."""

    max_length: int  # of a training row
    max_model_len: int  # of a prompt with its completion, as served


def lint_file(path: Path, tokenizer: PreTrainedTokenizerBase, limits: Limits, is_validation: bool = False) -> list[Finding]:
    """The findings of a chat JSONL file, in the order of its rows; one for validation may be short. Raises NotFoundError where there is no file."""
    findings: list[Finding] = []
    seen: dict[str, tuple[int, str]] = {}
    count = 0
    for line, text in _lines(path):
        count += 1
        row = _object(text)
        if row is None:
            findings.append(Finding(file=path.name, row=line, rule="json", message="it is not one JSON object in UTF-8"))
            continue
        row, written = as_messages(row), row
        found = [SHAPE] if row != written else []
        found += row_findings(row, tokenizer, limits)
        if not any(rule == "roles" for rule, _, _ in found):
            found += _repeated(row, line, seen)
        findings += [Finding(file=path.name, row=line, rule=rule, level=level, message=message) for rule, level, message in found]
    return [*findings, *_file_findings(path, count, is_validation)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line that is not empty."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", "check the path") from error


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def row_findings(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Iterator[Fault]:
    """The faults of one row: its shape, then each turn that is learnt, as training and serving would see it."""
    faults = faults_of(row)
    yield from (("roles", "error", fault) for fault in faults)
    others = row.keys() - {"messages", "tools"}
    if not faults:
        others |= {key for message in row["messages"] for key in message.keys() - {"role", "content", "weight"}}
    if others:
        yield "keys", "warning", f"the keys {', '.join(sorted(others))} are not in Fireworks' documented format"
    if faults:
        return
    messages = [Message(role=message["role"], content=message["content"]) for message in row["messages"]]
    if held := sorted({token for token in tokenizer.all_special_tokens for message in messages if token in message.content}):
        yield "special", "warning", f"a text holds the template's own {', '.join(held)}, which the model reads as a control token"
    for number, message in enumerate(row["messages"]):
        if is_learnt(message):
            yield from _turn_findings(messages[:number], message["content"], tokenizer, limits)


def _turn_findings(before: list[Message], target: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Iterator[Fault]:
    try:
        encoded = encode_example(tokenizer, before, target)
        yield from _template_findings(before, target, tokenizer)
    except TemplateError as error:
        yield "template", "error", f"the chat template refuses the conversation: {error}"
        return
    length, prompt = len(encoded.ids), encoded.completion
    if length - prompt < 2:
        yield "mask", "error", "nothing of it is learnt: the answer has no tokens"
    if prompt >= limits.max_length:
        yield "mask", "error", f"its prompt alone has {prompt} tokens: cut at max_length = {limits.max_length}, every label is lost"
    elif length > limits.max_length:
        yield "length", "warning", f"{length} tokens: longer than max_length = {limits.max_length}, so it is left out here, and cut by TRL"
    if length > limits.max_model_len:
        yield "length", "error", f"{length} tokens: vLLM would refuse it at serve.max_model_len = {limits.max_model_len}"
    completion = tokenizer.decode(encoded.ids[prompt:-1], clean_up_tokenization_spaces=False)
    if completion != target:
        yield "tokens", "warning", "the answer's tokens do not decode to the answer"


def _template_findings(before: list[Message], target: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Fault]:
    """Whether the template, which TRL and a server apply to the whole conversation, gives prompt, answer and end of turn in this order."""
    turns = [message.model_dump() for message in before]
    prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": target}], tokenize=False))
    if not whole.startswith(prompt):
        yield "template", "error", "the template renders the conversation otherwise than its prompt: TRL would train on what inference never shows"
        return
    answer = whole[len(prompt) :]
    if not answer.startswith(target):
        yield "template", "error", "the template changes or drops a part of the answer"
    elif tokenizer.eos_token not in answer[len(target) :]:
        yield "eos", "error", f"the template does not end the answer with {tokenizer.eos_token}: trained by TRL, the model would not stop"
    if render_prompt(tokenizer, before) != prompt:
        yield "template", "warning", "training here closes the template's think block, and TRL does not: train it here, or give TRL the closed template"


def _repeated(row: dict[str, Any], line: int, seen: dict[str, tuple[int, str]]) -> list[Fault]:
    """Whether a row says again, or otherwise, what an earlier one said; `seen` is (line, answer) by digest of the prompt, and grows."""
    *prompt, last = ([m["role"], m["content"]] for m in row["messages"])
    first, answer = seen.setdefault(digest_of(prompt), (line, last[1]))
    if first == line:
        return []
    return (
        [("duplicate", "warning", f"the same as row {first}")]
        if answer == last[1]
        else [("contradiction", "warning", f"answers row {first}'s prompt otherwise")]
    )


def _file_findings(path: Path, count: int, is_validation: bool) -> Iterator[Finding]:
    if count < FEWEST_ROWS and not is_validation:
        yield Finding(file=path.name, rule="rows", message=f"{count} rows are too few to train on")
    if not FIREWORKS_ROWS[0] <= count <= FIREWORKS_ROWS[1] and (count or not is_validation):
        level: Literal["error", "warning"] = "warning" if is_validation else "error"
        yield Finding(file=path.name, rule="rows", level=level, message=f"{count} rows: Fireworks takes {FIREWORKS_ROWS[0]} to {FIREWORKS_ROWS[1]:,}")
    if path.stat().st_size > FIREWORKS_UPLOAD:
        yield Finding(file=path.name, rule="size", level="warning", message="over 150 MB: Fireworks takes it by a signed URL only (:getUploadEndpoint)")


def counted(findings: list[Finding]) -> dict[str, int]:
    """How many findings each level has."""
    levels = Counter(finding.level for finding in findings)
    return {"errors": levels["error"], "warnings": levels["warning"]}
