"""What is wrong with a built dataset as a whole: identities, prompts, quotes, splits, balance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rag.prompts import ABSTENTION, PROMPT_VERSION, parse_answer
from train.dataset import IMPORTED, chat_row, epoch_zero, find_dataset
from train.examples import BAD_SHARE
from train.lint import Finding, Limits, counted, lint_file
from train.near_duplicates import near_duplicate_pairs
from train.recipe import load_recipe
from understudy.errors import NotFoundError, StorageError
from understudy.files import numbered_rows, read_json, read_jsonl
from understudy.models import model_path
from understudy.records import Example
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("train", "validation")


def lint(workspace: Workspace, name: str | None) -> dict[str, Any]:
    """Lint a dataset's folder or a chat JSONL file, by default the newest dataset; the result is the command's JSON. Raises NotFoundError."""
    from transformers import AutoTokenizer

    recipe = load_recipe(workspace.config.recipe, [])
    base = model_path(workspace, recipe.base or workspace.config.models.base)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    limits = Limits(recipe.max_length, workspace.config.serve.max_model_len)
    path = Path(name) if name and Path(name).is_file() else find_dataset(workspace, name)
    findings = lint_file(path, tokenizer, limits) if path.is_file() else lint_folder(path, tokenizer, limits)
    return {"path": workspace.relative(path), **counted(findings), "findings": [finding.model_dump() for finding in findings]}


def lint_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[Finding]:
    """The findings of a dataset's folder: of its chat rows, then of the rows they were rendered from, then of the whole."""
    findings = [finding for name in FILES for finding in lint_file(folder / f"{name}.jsonl", tokenizer, limits, is_validation=name == "validation")]
    try:
        summary, passages = read_json(folder / "dataset.json"), read_json(folder / "passages.json")
        examples = []
        for line, row in numbered_rows(folder / "examples.jsonl"):
            try:
                examples.append((line, Example.model_validate(row)))
            except ValidationError as error:
                findings.append(_fault(line, "ids", f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"))
        findings += [finding for line, example in examples for finding in _example_findings(line, example, passages)]
        if not counted(findings)["errors"]:
            findings += _round_trip(folder, [example for _, example in examples], passages, summary)
        findings += _whole_findings(folder, [example for _, example in examples], summary)
    except (NotFoundError, StorageError) as error:
        findings.append(Finding(file=folder.name, rule="missing" if isinstance(error, NotFoundError) else "json", message=error.message))
    return findings


def _fault(line: int, rule: str, message: str) -> Finding:
    return Finding(file="examples.jsonl", row=line, rule=rule, message=message)


def _example_findings(line: int, example: Example, passages: dict[str, str]) -> Iterator[Finding]:
    """Identities that point at nothing, and targets that say what the row does not show."""
    unknown = [chunk_id for chunk_id in example.passage_ids if chunk_id not in passages]
    if unknown:
        yield _fault(line, "ids", f"passage {unknown[0][:12]} is not in passages.json")
        return
    if len(set(example.passage_ids)) < len(example.passage_ids):
        yield _fault(line, "ids", "it shows a passage twice")
    if example.task == "answer" and example.target != ABSTENTION and set(example.support_ids) - (set(example.passage_ids) - set(example.optional_ids)):
        yield _fault(line, "ids", "a passage that it rests on is not shown in every epoch")
    if not example.trace_id:
        yield _fault(line, "ids", "it names no trace")
    if not example.target.strip():
        yield _fault(line, "mask", "its target is empty")
    if example.task == "answer":
        texts = [" ".join(passages[chunk_id].split()) for chunk_id in example.passage_ids]
        missing = [quote for quote in parse_answer(example.target).quotes if not any(quote in text for text in texts)]
        if missing:
            yield _fault(line, "quote", f"its target quotes what no passage of it says: {missing[0][:80]}")
    if example.task == "validate" and (example.target == "1") != (example.kind == "good"):
        yield _fault(line, "quote", f"its target is {example.target} and its kind {example.kind}")


def _round_trip(folder: Path, examples: list[Example], passages: dict[str, str], summary: dict[str, Any]) -> list[Finding]:
    """The chat rows that are not what the renderer of inference makes of the examples."""
    findings = []
    for name in FILES:
        chosen = [example for example in examples if example.split == name]
        rows = read_jsonl(folder / f"{name}.jsonl")
        if len(rows) != len(chosen):
            findings.append(Finding(file=f"{name}.jsonl", rule="rows", message=f"{len(rows)} rows, and {len(chosen)} examples that they were made of"))
            continue
        for line, (row, example) in enumerate(zip(rows, chosen, strict=True), 1):
            shown = epoch_zero(example, summary.get("seed", 0)) if name == "train" else example
            if row != chat_row(shown, passages):
                findings.append(Finding(file=f"{name}.jsonl", row=line, rule="render", message="it is not what inference's renderer makes of its example"))
    return findings


def _whole_findings(folder: Path, examples: list[Example], summary: dict[str, Any]) -> Iterator[Finding]:
    """Prompts of another version, what is on both sides of a split, and the balance of the validator's rows."""
    if summary.get("prompt_version") not in (PROMPT_VERSION, IMPORTED):
        yield Finding(file="dataset.json", rule="prompts", message=f"built for prompts {summary.get('prompt_version')}, and these are {PROMPT_VERSION}")
    groups = [{group for example in examples if example.split == name for group in example.group_ids} for name in FILES]
    for group in sorted(groups[0] & groups[1]):
        yield Finding(file="examples.jsonl", rule="leak", message=f"document {group[:12]} is learnt from and validated on")
    rows = read_jsonl(folder / "held-out.jsonl") if (folder / "held-out.jsonl").exists() else []
    sides: dict[str, str] = {str(row["question"]): "held-out" for row in rows} | {e.question: e.split for e in examples}
    questions = list(sides)
    for pair in near_duplicate_pairs(questions) if summary.get("lineage") != IMPORTED else []:
        first, second = (f"{questions[place]} ({sides[questions[place]]})" for place in pair)
        if sides[questions[pair[0]]] != sides[questions[pair[1]]]:
            yield Finding(file="examples.jsonl", rule="leak", message=f"nearly the same question on two sides: {first} / {second}")
    validations = [example for example in examples if example.task == "validate"]
    bad = sum(example.target == "0" for example in validations)
    if bad < BAD_SHARE * len(validations):
        yield Finding(file="examples.jsonl", rule="balance", level="warning", message=f"{bad} of {len(validations)} validations are of wrong answers")
