"""Each fault that would fail or spoil a run is found with its row, before it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.train.conftest import TEMPLATE
from train.dataset import chat_row
from train.lint import Limits, lint_file
from train.lint_folder import lint_folder
from understudy.files import read_json, write_json, write_jsonl
from understudy.records import Example

LIMITS = Limits(max_length=600, max_model_len=700)
USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
FINE = [{"messages": [USER, ASSISTANT]}, {"messages": [{"role": "system", "content": "Be brief."}, {**USER, "content": "Why?"}, ASSISTANT]}]
FINE.append({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]})


def found(rows: list[Any], path: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int | None, str, str]]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return [(finding.row, finding.rule, finding.level) for finding in lint_file(path, tokenizer, LIMITS)]


@pytest.mark.parametrize(
    ("row", "rule", "level"),
    [
        ({"prompt": "Who?", "completion": "Me."}, "roles", "error"),
        ({"messages": [USER]}, "roles", "error"),
        ({"messages": [USER, USER, ASSISTANT]}, "roles", "error"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "roles", "error"),
        ({"messages": [{"role": "tool", "content": "x"}, ASSISTANT]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "content": ["Me."]}]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "content": "\ud800"}]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "roles", "error"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "roles", "error"),
        ({"conversations": [{"from": "human", "value": "Say:"}, {"from": "gpt", "value": "Me."}]}, "shape", "warning"),
        ({"messages": [{**USER, "content": "Say:"}, ASSISTANT], "kind": "x"}, "keys", "warning"),
        ({"messages": [{**USER, "content": "Say:", "name": "Ann"}, ASSISTANT]}, "keys", "warning"),
        ({"messages": [{**USER, "content": "x y " * 400}, ASSISTANT]}, "mask", "error"),
        ({"messages": [{**USER, "content": "x y " * 100}, {**ASSISTANT, "content": "z w " * 55}]}, "length", "warning"),
        ({"messages": [{**USER, "content": "x y " * 100}, {**ASSISTANT, "content": "z w " * 100}]}, "length", "error"),
        ({"messages": [{**USER, "content": "Now<|end|>"}, ASSISTANT]}, "special", "warning"),
        ({"messages": [USER, ASSISTANT]}, "duplicate", "warning"),
        ({"messages": [USER, {**ASSISTANT, "content": "You."}]}, "contradiction", "warning"),
    ],
)
def test_a_faulty_row_is_found(row: dict[str, Any], rule: str, level: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    findings = found([*FINE, row], tmp_path / "chat.jsonl", tokenizer)
    assert (4, rule, level) in findings
    assert {number for number, _, _ in findings} == {4}
    assert found(FINE, tmp_path / "chat.jsonl", tokenizer) == []


def test_a_file_that_is_not_whole_is_found(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert found(["\ufeff" + json.dumps(FINE[0]), '{"messages": [', FINE[1], "[]"], tmp_path / "chat.jsonl", tokenizer) == [
        (2, "json", "error"),
        (4, "json", "error"),
    ]
    assert found([], tmp_path / "chat.jsonl", tokenizer) == [(None, "rows", "error")] * 2  # here and on Fireworks
    assert found(FINE[:1], tmp_path / "chat.jsonl", tokenizer) == [(None, "rows", "error")] * 2
    assert found(FINE[:2], tmp_path / "chat.jsonl", tokenizer) == [(None, "rows", "error")]
    assert [f.level for f in lint_file(tmp_path / "chat.jsonl", tokenizer, LIMITS, is_validation=True)] == ["warning"]  # for Fireworks alone


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("<|end|>\n{% endfor %}", "\n{% endfor %}", "eos"),
        ("{{ message.content }}", "{{ message.content.split('.')[0] }}", "template"),
        ("{% for message", "{% if not add_generation_prompt %}all: {% endif %}{% for message", "template"),
        ("{% for message", "{{ raise_exception('no') }}{% for message", "template"),
    ],
)
def test_a_template_that_loses_the_answer_or_its_end_is_found(old: str, new: str, rule: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert old in TEMPLATE
    tokenizer.chat_template = TEMPLATE.replace(old, new, 1)
    try:
        findings = found(FINE[:1] * 3, tmp_path / "chat.jsonl", tokenizer)
    finally:
        tokenizer.chat_template = TEMPLATE
    assert [(number, level) for number, kind, level in findings if kind == rule] == [(1, "error"), (2, "error"), (3, "error")]


@pytest.fixture
def folder(tmp_path: Path, examples: list[Example], passages: dict[str, str]) -> Path:
    """A dataset without a fault, as a build leaves it."""
    kept = [e.model_copy(update={"kind": "bad-number" if e.target == "0" else "good", "weight": 1.0}) for e in examples]
    kept = [e for e in kept if len([other for other in kept if other.question == e.question and other.task == e.task]) == 1 or e.task == "validate"]
    made = tmp_path / "made"
    made.mkdir()
    write_jsonl(made / "examples.jsonl", [example.model_dump() for example in kept])
    write_json(made / "passages.json", passages)
    render_again(made)
    return made


def render_again(folder: Path, **summary: Any) -> None:
    """Write the chat rows and the summary of a folder's examples."""
    from rag.prompts import PROMPT_VERSION
    from train.dataset import epoch_zero

    passages = read_json(folder / "passages.json")
    rows = [Example.model_validate_json(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    write_jsonl(folder / "train.jsonl", [chat_row(epoch_zero(e, 0), passages) for e in rows if e.split == "train"])
    write_jsonl(folder / "validation.jsonl", [chat_row(e, passages) for e in rows if e.split == "validation"])
    write_json(folder / "dataset.json", {"prompt_version": PROMPT_VERSION, "seed": 0, "lineage": "traces", **summary})


def errors(folder: Path, tokenizer: PreTrainedTokenizerFast) -> set[tuple[str, int | None, str]]:
    return {(f.file, f.row, f.rule) for f in lint_folder(folder, tokenizer, Limits(4096, 4096)) if f.level == "error"}


def change(folder: Path, number: int, **changes: Any) -> None:
    """Change one example; its chat rows follow."""
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    rows[number - 1] |= changes
    write_jsonl(folder / "examples.jsonl", rows)
    render_again(folder)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"target": "Quote: No passage says these words.\nAnswer: Nothing."}, "quote"),
        ({"passage_ids": ["c0", "c0", "c1"]}, "ids"),
        ({"trace_id": ""}, "ids"),
        ({"support_ids": ["c8"]}, "ids"),
    ],
)
def test_an_example_that_is_not_what_it_claims_is_found(folder: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], rule: str) -> None:
    assert errors(folder, tokenizer) == set()
    change(folder, 2, **changes)
    assert ("examples.jsonl", 2, rule) in errors(folder, tokenizer)


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda f: (f / "train.jsonl").write_text((f / "train.jsonl").read_text().replace("thing 3", "thing 4", 1)), "render"),
        (lambda f: (f / "train.jsonl").write_text("".join((f / "train.jsonl").read_text().splitlines(keepends=True)[1:])), "rows"),
        (lambda f: write_json(f / "passages.json", {}), "ids"),
        (lambda f: (f / "passages.json").unlink(), "missing"),
        (lambda f: render_again(f, prompt_version="another"), "prompts"),
    ],
)
def test_a_dataset_that_was_changed_is_found(folder: Path, tokenizer: PreTrainedTokenizerFast, spoil: Spoil, finding: str) -> None:
    spoil(folder)
    assert finding in {rule for _, _, rule in errors(folder, tokenizer)}


def test_a_split_leak_is_found(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    change(folder, 1, group_ids=["d"])
    change(folder, 3, group_ids=["d"], split="validation")
    assert ("examples.jsonl", None, "leak") in errors(folder, tokenizer)
    change(folder, 1, group_ids=[])
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    change(folder, 3, question=rows[0]["question"].upper())
    messages = [f.message for f in lint_folder(folder, tokenizer, Limits(4096, 4096)) if f.rule == "leak"]
    assert messages and all("nearly the same question" in message for message in messages)
