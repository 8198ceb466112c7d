"""What `dataset build` leaves on disk, and how it is found, shown and read by others."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rag.eval.questions import read_questions
from rag.prompts import ABSTENTION, example_messages
from train.batches import Batcher
from train.chat_file import read_conversations
from train.dataset import build_dataset, find_dataset, newest_dataset, read_dataset, read_ledger, rows_to_learn
from train.examples import draw_passages
from train.lint_folder import lint
from train.recipe import Recipe
from understudy.cli import build_parser, main
from understudy.commands.datasets import dataset_show
from understudy.errors import NotFoundError, StorageError, TrainingError, UnderstudyError
from understudy.files import read_json, read_jsonl, write_json
from understudy.records import Example, Trace
from understudy.workspace import Workspace, create_workspace

CREATURES = ("otter", "heron", "badger", "weasel", "falcon", "marten", "beaver", "salmon")


@pytest.fixture
def workspace(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    make_document: Callable[..., Any],
    make_trace: Callable[..., Trace],
) -> Workspace:
    """Eight documents with three answered questions each and one that none answers, and three traces that may not teach; made once, copied."""
    template = tmp_path_factory.getbasetemp() / "dataset-workspace"
    if not template.exists():
        fill(create_workspace(str(template), "models: {base: tiny}\nretrieval: {k: 3}\n"), tokenizer, make_document, make_trace)
    shutil.copytree(template, tmp_path / "workspace")
    return create_workspace(str(tmp_path / "workspace"))


def fill(made: Workspace, tokenizer: PreTrainedTokenizerFast, make_document: Callable[..., Any], make_trace: Callable[..., Trace]) -> None:
    """Put the tokenizer, the documents and the traces into a workspace."""
    tokenizer.save_pretrained(str(made.models / "tiny"))
    write_json(made.models / "tiny" / "config.json", {"model_type": "llama"})
    traces = []
    for place, creature in enumerate(CREATURES):
        days = [place * 3 + i + 2 for i in range(3)]
        document, chunks = made_of = make_document(
            f"{creature}.txt", [f"The {creature} keeper of house {n} waits {n} days before the gate opens." for n in days]
        )
        made.store.add_document(*made_of)
        for n, chunk in zip(days, chunks, strict=True):
            traces.append(make_trace(f"{creature} house {creature} {n * 1111}?", f"The keeper waits {n} days.", chunk, f"waits {n} days", chunks))
        traces.append(make_trace(f"{creature} {creature} payer?", None, None, "", chunks, metadata={"document": document.source}))
    last = traces[0]
    traces.append(last.model_copy(update={"id": "cut", "question": "Was it cut?", "complete": False}))
    traces.append(last.model_copy(update={"id": "own", "question": "Whose is it?", "source": "model", "model": "base"}))
    traces.append(last.model_copy(update={"id": "odd", "question": "And this one?", "answer": "The keeper waits 99 days."}))
    for trace in traces:
        plan = trace.steps[0].model_copy(update={"text": f"words of {trace.question}"})
        made.store.put_trace(trace.model_copy(update={"steps": [plan, *trace.steps[1:]]}))
    made.store.close()


def run(workspace: Workspace, *words: str) -> Namespace:
    return build_parser().parse_args([*words, "--workspace", str(workspace.root), "--json", "--set", "retrieval.k=3"])


def test_a_build_keeps_rows_ledger_and_held_out_questions_apart(workspace: Workspace) -> None:
    result = build_dataset(workspace, held_out=0.1)
    folder = workspace.root / result["path"]
    assert result["traces"] == {"kept": 28, "held_out": 4, "rejected": 3}
    assert result["rejected"] == {"the student's own unreviewed answer": 1, "incomplete": 1, "states a number that its quotes do not": 1}
    assert {r.trace_id: r.detail for r in read_ledger(folder)} == {"cut": "", "own": "base", "odd": "99"}
    held_out = read_questions(folder / "held-out.jsonl")
    assert [question.answerable for question in held_out].count(False) == 1
    [document] = {name for question in held_out for name in question.documents}
    examples, passages, summary = read_dataset(folder)
    assert not any(document.removesuffix(".txt") in text for text in passages.values())
    assert not {question.question for question in held_out} & {example.question for example in examples}
    assert result["examples"]["validation"] > 0
    assert summary["bad_share"] >= 0.3 and 0 < summary["abstention_share"] < 1
    assert read_json(folder / "dataset.json") == {k: v for k, v in result.items() if k not in ("dataset", "path")}


def test_the_chat_rows_are_the_first_epoch_of_training(workspace: Workspace, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = workspace.root / build_dataset(workspace, seed=7)["path"]
    examples, passages, _ = read_dataset(folder)
    chosen = [example for example in examples if example.split == "train"]
    texts = {tokenizer.decode(row.encoded.ids) for batch in Batcher(chosen, passages, tokenizer, Recipe()).epoch(7, 0) for row in batch}
    rows = read_jsonl(folder / "train.jsonl")
    assert all(list(row) == ["messages"] for row in rows)
    assert {str(tokenizer.apply_chat_template(row["messages"], tokenize=False)).rstrip("\n") for row in rows} == texts
    assert any(draw_passages(example, 7, 0) != example.passage_ids for example in chosen)


def test_the_rows_load_with_datasets_and_are_of_fireworks_form(workspace: Workspace, tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = workspace.root / build_dataset(workspace)["path"]
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}
    loaded = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == read_json(folder / "dataset.json")["examples"]
    for row in loaded["train"]:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(isinstance(message["content"], str) and message["content"] for message in row["messages"])
    assert lint(workspace, None)["findings"] == []


def test_building_again_gives_the_same_dataset_with_the_ledger_of_now(workspace: Workspace) -> None:
    first = build_dataset(workspace)
    other = build_dataset(workspace, seed=1)
    assert other["dataset"] != first["dataset"]
    os.utime(workspace.root / first["path"] / "dataset.json", (0, 0))
    [trace] = [trace for trace in workspace.store.traces("default") if trace.id == "cut"]
    workspace.store.put_trace(trace.model_copy(update={"id": "cut2"}))
    again = build_dataset(workspace)
    assert again["dataset"] == first["dataset"] and again["rejected"]["incomplete"] == 2
    assert newest_dataset(workspace).name == first["dataset"]  # it was built last, though it was there
    assert len(read_ledger(workspace.root / again["path"])) == 4
    assert build_dataset(workspace, dose=0)["dataset"] not in (first["dataset"], other["dataset"])


def test_no_trace_that_may_teach_is_an_error_with_the_reasons(workspace: Workspace, tmp_path: Path) -> None:
    empty = create_workspace(str(tmp_path / "empty"), "models: {base: tiny}\n")
    with pytest.raises(NotFoundError, match="no expert traces"):
        build_dataset(empty)
    [trace] = [trace for trace in workspace.store.traces("default") if trace.id == "own"]
    empty.store.put_trace(trace)
    with pytest.raises(UnderstudyError, match="own unreviewed answer"):
        build_dataset(empty)


def test_a_dataset_of_other_prompts_is_refused(workspace: Workspace) -> None:
    folder = workspace.root / build_dataset(workspace)["path"]
    summary = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", {**summary, "prompt_version": "before"})
    with pytest.raises(TrainingError, match="built for prompts before"):
        read_dataset(folder)
    assert [finding["rule"] for finding in lint(workspace, None)["findings"]] == ["prompts"]


def test_a_damaged_dataset_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    build_dataset(workspace)
    for file, text in (("dataset.json", "{}"), ("passages.json", "{}"), ("passages.json", "[]"), ("examples.jsonl", '{"task": "sing"}\n')):
        folder = shutil.copytree(newest_dataset(workspace), tmp_path / "damaged", dirs_exist_ok=True)
        (folder / file).write_text(text)
        with pytest.raises(StorageError, match="the dataset damaged is damaged"):
            read_dataset(folder)


def test_rows_and_rejections_are_shown_a_page_at_a_time(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    built = build_dataset(workspace)
    total = sum(built["examples"].values())
    seen = []
    for page in range(1, -(-(total + 3) // 10) + 1):
        result = dataset_show(run(workspace, "dataset", "show", "--limit", "10", "--page", str(page))).result
        seen += result["rows"]
    assert len(seen) == result["total"] == total + 3
    assert [row["row"] for row in seen if row["status"] == "kept"] == list(range(1, total + 1))
    assert {row["trace_id"] for row in seen if row["status"] == "rejected"} == {"cut", "own", "odd"}
    abstaining = dataset_show(run(workspace, "dataset", "show", "--kind", "unanswerable", "--split", "train")).result
    assert abstaining["rows"] and all(row["target"] == ABSTENTION for row in abstaining["rows"])
    only = dataset_show(run(workspace, "dataset", "show", built["dataset"][:8], "--only", "rejected", "--reason", "number")).result
    assert [row["trace_id"] for row in only["rows"]] == ["odd"]
    whole = dataset_show(run(workspace, "dataset", "show", "--row", "2"))
    examples, passages, _ = read_dataset(newest_dataset(workspace))
    assert whole.result["messages"][:-1] == [message.model_dump() for message in example_messages(examples[1], passages)]
    assert main(["--workspace", str(workspace.root), "dataset", "show", "--row", "99999"]) == 1
    assert main(["--workspace", str(workspace.root), "dataset", "show", "--contains", "And this one"]) == 0
    assert "states a number that its quotes do not (99): And this one?" in capsys.readouterr().out


def test_any_chat_file_is_a_dataset(workspace: Workspace, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    build_dataset(workspace)
    built = newest_dataset(workspace)
    turns = [("user", "Hello?"), ("assistant", "Yes."), ("user", "Who?"), ("assistant", "Me."), ("user", "And now?"), ("assistant", "Nothing.")]
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    messages[3]["weight"] = 0
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    asked = [{"type": "text", "text": "Why?"}]
    elsewhere = [{"from": "developer", "value": "Be brief."}, {"from": "human", "value": asked}, {"from": "gpt", "value": "Because."}]
    rows: list[dict[str, Any]] = [{"messages": messages}, {"messages": other}, {"conversations": elsewhere}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    folder = find_dataset(workspace, str(file))
    assert find_dataset(workspace, str(file)) == find_dataset(workspace, folder.name[:10]) == folder
    assert newest_dataset(workspace) == built  # an imported file is trained on only where it is named
    examples, passages, summary = read_dataset(folder)
    assert [(example.target, len(example.messages)) for example in examples] == [("Yes.", 1), ("Nothing.", 5), ("Because.", 2)]
    assert (summary["lineage"], summary["source"], summary["examples"]) == ("imported file", "chat.jsonl", {"train": 3, "validation": 0})
    dealt = [row for batch in Batcher(examples, passages, tokenizer, Recipe()).epoch(0, 0) for row in batch]
    assert sorted(tokenizer.decode(row.encoded.ids[row.encoded.completion :]) for row in dealt) == ["Because.<|end|>", "Nothing.<|end|>", "Yes.<|end|>"]
    assert all(row.weight == 1.0 and row.first_weight is None for row in dealt)
    file.write_text('{"messages": [{"role": "user", "content": "Who?"}]}\n')
    with pytest.raises(TrainingError, match="line 1: the last message is not the assistant's"):
        find_dataset(workspace, str(file))
    assert main(["--workspace", str(workspace.root), "dataset", "lint", str(file)]) == 3
    assert "chat.jsonl row 1: error: roles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no conversation"),
        ('{"prompt": "Who?", "completion": "Me."}', "line 1: it has no `messages`, but completion, prompt"),
        ('{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "tool_calls": [{}]}]}', "line 1: message 2 calls a tool"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('[{"messages": []}]', "line 1 is not a JSON object"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused_with_its_line(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(text)
    with pytest.raises(UnderstudyError, match=fault):
        read_conversations(tmp_path / "chat.jsonl")


def test_conversations_are_split_by_near_duplicates(workspace: Workspace, tmp_path: Path) -> None:
    rows = []
    for n in range(200):
        question = f"What is the {'first' if n % 2 else 'final'} word of report number {(n // 2) * 7919} of the {CREATURES[n // 2 % 8]}?"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"Word {n}."}]})
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = read_json(find_dataset(workspace, str(file)) / "dataset.json")
    assert sum(summary["examples"].values()) == 200


def test_the_rows_of_some_steps_are_learnt_and_those_of_a_chat_file_by_every_recipe() -> None:
    row = {"question": "Why?", "target": "x", "passage_ids": [], "kind": "good", "group_ids": [], "trace_id": "t"}
    splits = ("train", "validation")
    made = [Example.model_validate(row | {"task": task, "split": split}) for task in ("plan", "answer", "validate", "chat") for split in splits]
    train, validation = rows_to_learn(made, ["validate"])
    assert [(row.task, row.split) for row in (*train, *validation)] == [
        ("validate", "train"),
        ("chat", "train"),
        ("validate", "validation"),
        ("chat", "validation"),
    ]
    assert len(rows_to_learn(made, Recipe().steps)[0]) == 4
