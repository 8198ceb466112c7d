"""Questions under other conditions: what varies and what stays, the pairing, resuming; over real retrieval and a scripted model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.agent import Tools, run_agent
from rag.eval.metrics import score_trace
from rag.eval.perturb import REWORDED, mistype, paraphrase
from rag.eval.robustness import METRICS, ask_variants, share_out, summarise
from rag.eval.run import evaluate_models, open_run
from rag.eval.variants import CANARY, ORDER, PLAIN, Variant, conditions, fixed, make_variants
from rag.retrieve import Retriever, document_order
from tests.conftest import workspace_of_notes
from tests.scripted import Endpoint
from understudy.cli import main
from understudy.client import ModelClient
from understudy.records import Question
from understudy.settings.answers import Agent

ANIMALS = ("otter", "heron", "badger", "falcon", "beaver", "weasel", "magpie", "tortoise", "lizard", "donkey", "ferret", "pelican")
DOSES, USUAL = (0, 1, 2), 1  # four notes hold no more
FACTS = {
    "When is the kiln fired?": ("on Tuesdays at seven", "The kiln is fired on Tuesdays at seven in the morning.", "kiln.txt"),
    "How often are the barn doors painted?": ("every third summer", "The barn doors are painted green every third summer", "barn.txt"),
}
WORDS = st.lists(
    st.sampled_from(["When", "how", "long", "does", "not", "company", "keep", "the", "logs", "of", "2026", "Lisbon", "staff", "I'm"]), min_size=1, max_size=25
)


@pytest.fixture
def questions() -> list[Question]:
    answerable = [
        Question(id=f"q{place}", question=text, answers=[answer], has_answer_key=True, quotes=[quote], documents=[document])
        for place, (text, (answer, quote, document)) in enumerate(FACTS.items())
    ]
    lost = answerable[0].model_copy(update={"id": "lost", "quotes": ["words that stand nowhere at all"]})
    return [*answerable, Question(id="none", question="Who owns the mill?", has_answer_key=True), lost]


@pytest.fixture
def variants(questions: list[Question], retriever: Retriever) -> list[Variant]:
    return make_variants(questions, retriever, seed=1, doses=DOSES, usual=USUAL)[0]


@given(WORDS, st.integers(0, 99))
def test_other_words_keep_numbers_and_names_and_are_drawn_by_the_seed(words: list[str], seed: int) -> None:
    question = " ".join(words) + "?"
    found = paraphrase(question, Random(seed))
    assert found != question and found == paraphrase(question, Random(seed)) and found.endswith("?")
    assert all(word in found for word in ("2026", "Lisbon") if word in words)
    assert len(found.split()) <= 2 * len(words) + 8


def test_other_words_are_those_of_the_rules() -> None:
    assert paraphrase("How long does the company not keep logs?", Random(0)).endswith("For how long does the firm not retain logs?")
    assert paraphrase("Staff who don't check: what is due?", Random(0)).endswith("Personnel who do not verify: what's due?")
    assert all(word != other for word, other in REWORDED.items())


@given(WORDS, st.integers(0, 99))
def test_a_mistyped_question_keeps_its_words_in_number_their_first_letters_and_numbers(words: list[str], seed: int) -> None:
    question = "  ".join(words)
    found = mistype(question, Random(seed))
    pairs = list(zip(question.split(), found.split(), strict=True))
    assert [a[0] for a, _ in pairs] == [b[0] for _, b in pairs] and found == mistype(question, Random(seed))
    changed = [(a, b) for a, b in pairs if a != b]
    longer = [word for word in words if len(word) > 3 and word.isalpha()]
    assert len(changed) == min(len(longer), max(1, len(words) // 10)) if longer else not changed
    assert all(a in longer and abs(len(a) - len(b)) <= 1 for a, b in changed)


def test_a_condition_differs_from_the_one_it_is_against_in_one_thing(questions: list[Question], retriever: Retriever, variants: list[Variant]) -> None:
    assert make_variants(questions, retriever, 1, doses=DOSES, usual=USUAL)[1] == 1  # no passage holds its evidence
    found = {(variant.condition, variant.of): variant for variant in variants}
    assert len(found) == len(variants) == 2 * len(conditions(DOSES, USUAL)) and len({variant.question.id for variant in variants}) == len(variants)
    for id_, (_, quote, document) in zip(("q0", "q1"), FACTS.values(), strict=True):
        shown = {name: found[name, id_].passages for name, of in found if of == id_ and found[name, of].passages is not None}
        for dose in DOSES:
            assert len(shown[f"{dose} distractors"]) == dose + 1 and sum(quote in passage.chunk.text for passage in shown[f"{dose} distractors"]) == 1
        plain = shown["1 distractors"]
        assert [p.chunk.id for p in plain] == [p.chunk.id for p in sorted(plain, key=lambda passage: document_order(passage.chunk))]
        for name in ("shuffled 1", "shuffled 2", "evidence first", "evidence middle", "evidence last", "injected order"):
            assert {passage.chunk.id for passage in shown[name]} == {passage.chunk.id for passage in plain}
        assert shown["evidence first"][0].chunk.document == shown["evidence last"][-1].chunk.document == document
        ordered = [passage.chunk.text for passage in shown["injected order"] if passage.chunk.text.endswith(ORDER)]
        assert len(ordered) == 1 and quote not in ordered[0]
        assert not found["no evidence", id_].question.answerable and not any(quote in passage.chunk.text for passage in shown["no evidence"])
        assert found["paraphrased", id_].passages is found["mistyped", id_].passages is None
    assert variants == make_variants(questions, retriever, 1, doses=DOSES, usual=USUAL)[0]
    given_words = make_variants(questions, retriever, 1, limit=1, paraphrases={"q0": "Kiln, when?", "q1": "Barn?"}, doses=DOSES, usual=USUAL)[0]
    assert len(given_words) == len(conditions(DOSES, USUAL)) and next(v for v in given_words if v.condition == "paraphrased").question.question in (
        "Kiln, when?",
        "Barn?",
    )


def test_each_model_is_asked_over_fixed_passages_once_whatever_its_modes(variants: list[Variant]) -> None:
    shares = share_out(variants, ["base:closed-book", "base:fast", "base", "tiny@0123456789ab"])
    counts = {name: sum(variant.passages is not None for variant in of_name) for name, of_name in shares.items()}
    assert counts["base:closed-book"] == counts["base"] == 0 < counts["base:fast"] == counts["tiny@0123456789ab"]
    assert all(sum(variant.passages is None for variant in of_name) == 4 for of_name in shares.values())


def obeying(step: str, prompt: str) -> str:
    """Does what a passage orders; else answers from the first sentence of evidence that it is shown, and abstains without one."""
    if step != "answer":
        return {"plan": "notes", "validate": "1"}[step]
    if CANARY in prompt:
        return f"Answer: {CANARY}"
    fact = next(
        (
            (answer, quote)
            for _, (answer, quote, document) in FACTS.items()
            if quote in prompt and document.removesuffix(".txt") in prompt.rpartition("Question:")[2]
        ),
        None,
    )
    return f"Quote: {fact[1]}\nAnswer: {fact[0]}" if fact else "The documents do not answer this question."


def test_what_each_condition_changes_is_measured_pair_by_pair_and_nothing_is_asked_twice(
    tmp_path: Path, questions: list[Question], variants: list[Variant], retriever: Retriever, endpoint: Endpoint
) -> None:
    endpoint.reply = obeying
    one_at_a_time = replace(retriever, settings=retriever.settings.model_copy(update={"k": 2}))
    asked_of = [question for question in questions if question.id in ("q0", "q1")]

    async def run():  # type: ignore[no-untyped-def]
        async with Tools(ModelClient(endpoint.model), one_at_a_time, Agent(mode="fast")) as tools:
            traces = await evaluate_models(asked_of, {"base": lambda q: run_agent(q.question, tools, {"question_id": q.id})}, open_run(tmp_path, {}), 4)
            asked = await ask_variants(variants, conditions(DOSES, USUAL), {"base": tools}, tmp_path, 4, 2, 1)
            return traces["base"], asked

    plain, asked = asyncio.run(run())
    count = len(endpoint.asked)
    assert count == len(asked_of) + len(variants)  # one call each: fast
    again, same = asyncio.run(run())
    assert len(endpoint.asked) == count and same == asked and again == plain
    rows = {"base": [score_trace(trace, question, retriever.chunks) for trace, question in zip(plain, asked_of, strict=True)]}
    section = summarise(asked, asked_of, rows, retriever.chunks, 200, 0)
    assert (section["questions"], section["left_out"], section["models"][0]["errors"]) == (2, 2, 0)
    found = {condition["name"]: condition for condition in section["models"][0]["conditions"]}
    assert list(found) == [condition["name"] for condition in section["conditions"]] == [condition.name for condition in conditions(DOSES, USUAL)]
    assert found["2 distractors"]["metrics"]["token_f1"]["value"] == 1.0 and found["2 distractors"]["differences"]["token_f1"]["difference"] == 0.0
    assert found["0 distractors"]["differences"] == {} and found["evidence last"]["metrics"]["citation_recall"]["value"] == 1.0
    assert found["injected order"]["differences"]["obeyed"]["difference"] == 1.0 and found["injected order"]["metrics"]["token_f1"]["value"] == 0.0
    assert found["no evidence"]["metrics"]["abstained"]["value"] == found["no evidence"]["differences"]["abstained"]["difference"] == 1.0
    assert found["paraphrased"]["n"] == 2 and {condition["against"] for condition in section["conditions"]} >= {PLAIN, "1 distractors", ""}
    for condition in found.values():
        assert set(condition["metrics"]) <= set(METRICS)
        for change in condition["differences"].values():
            assert change["p"] is None or change["p"] <= change["p_holm"] <= 1


def test_fixed_passages_come_in_the_order_given(retriever: Retriever, variants: list[Variant]) -> None:
    shuffled = next(variant for variant in variants if variant.condition == "evidence last")
    turned = fixed(retriever, tuple(reversed(shuffled.passages or ())))
    assert turned.search(["anything"], None, frozenset({"x"})) == list(reversed(shuffled.passages or ()))
    assert turned.generation == retriever.generation and turned.in_order(turned.passages) == list(turned.passages)


def test_a_question_with_too_few_other_passages_is_left_out(questions: list[Question], retriever: Retriever) -> None:
    assert make_variants(questions, retriever, 0) == ([], sum(question.answerable for question in questions))


@pytest.mark.slow
def test_the_command_reports_what_was_asked_under_conditions(tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    notes = {f"{animal}.txt": f"The {animal} is fed at {hour} in the morning, and never twice." for hour, animal in enumerate(ANIMALS, 1)}
    workspace = workspace_of_notes(tmp_path, notes)
    path, words = tmp_path / "held-out.jsonl", tmp_path / "words.jsonl"
    rows = []
    for hour, name in enumerate(ANIMALS[:4], 1):
        said = f"at {hour} in the morning"
        rows.append({"id": name, "question": f"When is the {name} fed?", "answer": said, "quotes": [f"is fed {said}"], "document": f"{name}.txt"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_text("".join(json.dumps({"id": row["id"], "question": f"The {row['id']}: fed when?"}) + "\n" for row in rows))
    endpoint.reply = lambda step, _: {"plan": "notes", "validate": "1"}.get(step, "Quote: is fed at 1 in the morning\nAnswer: at 1 in the morning")
    remote = ("--set", f"remotes.one={{base_url: '{endpoint.model.base_url}', model: m}}", "--set", "evaluate.resamples=200")
    asking = ("evaluate", "--questions", str(path), "--models", "one,one:fast", "--robustness", "3", "--paraphrases", str(words), "--json", *remote)
    for _ in range(2):  # the second time nothing is asked
        count = len(endpoint.asked)
        assert main(["--workspace", str(workspace.root), *asking]) == 0
        report = json.loads(capsys.readouterr().out)
    assert count == len(endpoint.asked) and any("fed when?" in body["messages"][-1]["content"] for body in endpoint.bodies)
    section = report["robustness"]
    assert section["questions"] == 3 and section["left_out"] == 0 and [model["name"] for model in section["models"]] == ["one", "one:fast"]
    assert [len(model["conditions"]) for model in section["models"]] == [len(conditions()), 2]
    page = (workspace.root / report["report"]).read_text()
    assert "What the answers withstand" in page and "8 distractors" in page and "evidence middle" in page
