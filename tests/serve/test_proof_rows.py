"""Which rows a proof rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.prompts import ABSTENTION, example_messages
from serve.proof_rows import Row, choose_scored, choose_spread, read_rows, steps_shown
from understudy.adapters import AdapterManifest
from understudy.errors import NotFoundError
from understudy.files import write_json, write_jsonl
from understudy.records import Example, Message


def row(prompt: int, target: str = "Answer: yes", split: str = "train") -> Row:
    return Row([Message(role="user", content="x" * prompt)], target, split)


rows_strategy = st.lists(
    st.builds(row, st.integers(1, 500), st.sampled_from([ABSTENTION, "Answer: yes"]), st.sampled_from(["train", "validation"])), min_size=1, max_size=80
)


@given(rows_strategy, st.integers(1, 30))
def test_spread_rows_hold_the_shortest_and_the_longest_once_each(rows: list[Row], count: int) -> None:
    chosen = choose_spread(rows, count)
    unseen = [each for each in rows if each.split == "validation"]
    pool = unseen if len(unseen) >= count else rows
    assert len(chosen) == min(count, len(pool))
    assert len({id(each) for each in chosen}) == len(chosen)
    assert chosen[0].length == min(each.length for each in pool)
    assert count == 1 or chosen[-1].length == max(each.length for each in pool)


@given(rows_strategy, st.integers(1, 30))
def test_scored_rows_are_the_shortest_of_their_kind_and_mostly_answers(rows: list[Row], count: int) -> None:
    chosen = choose_scored(rows, count)
    unseen = [each for each in rows if each.split == "validation"]
    pool = unseen if len(unseen) >= count else rows
    assert len({id(each) for each in chosen}) == len(chosen) == min(count, len(pool))
    for kind in (True, False):
        kept = sorted(each.length for each in chosen if (each.target == ABSTENTION) is kind)
        there = sorted(each.length for each in pool if (each.target == ABSTENTION) is kind)
        assert kept == there[: len(kept)]
    answers = sum(each.target != ABSTENTION for each in pool)
    abstaining = sum(each.target == ABSTENTION for each in chosen)
    assert abstaining <= max(count // 4, count - answers)


def test_rows_are_rendered_from_the_dataset_and_counted_once(tmp_path: Path) -> None:
    example = Example(task="answer", question="Who?", passage_ids=["c"], target="Answer: me", split="train", kind="answerable", trace_id="t", group_ids=[])
    others = [example.model_copy(update={"task": "plan"}), example.model_copy(update={"task": "validate"}), example]
    write_jsonl(tmp_path / "examples.jsonl", [each.model_dump() for each in [example, *others]])
    write_json(tmp_path / "passages.json", {"c": "It was me."})
    [only] = read_rows(tmp_path, "a@1")
    assert "It was me." in only.messages[-1].content and only.target == "Answer: me"


def test_an_adapter_is_proven_on_rows_of_a_step_that_it_learnt(tmp_path: Path) -> None:
    shared = {"question": "Who?", "passage_ids": ["c"], "split": "train", "kind": "any", "trace_id": "t", "group_ids": []}
    targets = {"plan": "who", "answer": "Answer: me", "validate": "1"}
    examples = [Example.model_validate(shared | {"task": task, "target": target, "proposal": "me"}) for task, target in targets.items()]
    write_jsonl(tmp_path / "examples.jsonl", [each.model_dump() for each in examples])
    write_json(tmp_path / "passages.json", {"c": "It was me."})
    for example in examples:
        [only] = read_rows(tmp_path, "a@1", frozenset([example.task]))
        assert only == Row(example_messages(example, {"c": "It was me."}), example.target, "train")
    with pytest.raises(NotFoundError, match="has no chat rows"):
        read_rows(tmp_path, "a@1", frozenset(["chat"]))


@pytest.mark.parametrize(
    ("recipe", "steps"), [({}, {"answer"}), ({"steps": ["plan", "answer"]}, {"answer"}), ({"steps": ["validate", "plan"]}, {"validate", "plan"})]
)
def test_what_an_adapter_learnt_decides_its_rows(recipe: dict[str, object], steps: set[str]) -> None:
    assert steps_shown(AdapterManifest.model_construct(recipe=recipe)) == steps


def test_an_imported_conversation_is_proven_as_it_is(tmp_path: Path) -> None:
    turns = [Message(role="system", content="Be brief."), Message(role="user", content="Who?")]
    values = {"task": "chat", "question": "Who?", "passage_ids": [], "messages": turns, "target": "Me."}
    example = Example.model_validate(values | {"split": "train", "kind": "imported", "trace_id": "t", "group_ids": []})
    write_jsonl(tmp_path / "examples.jsonl", [example.model_dump(exclude_defaults=True)])
    write_json(tmp_path / "passages.json", {})
    assert [(row.messages, row.target) for row in read_rows(tmp_path, "a@1")] == [(turns, "Me.")]


def test_a_deleted_dataset_is_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="dataset gone of a@1") as caught:
        read_rows(tmp_path / "gone", "a@1")
    assert "dataset build" in caught.value.remedy
