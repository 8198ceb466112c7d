"""Metrics: SQuAD's values by hand from its official script's rules, properties, and DESIGN.md's definitions on real records."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.eval.metrics import METRICS, aggregate, exact_match, gold_recall, normalize_answer, score_trace, token_f1, validator_auroc
from rag.prompts import ABSTENTION
from understudy.errors import NotFoundError

TEXTS = st.text(alphabet="abcthe .,!é12\n", max_size=40)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat, a dog & an owl!", "cat dog owl"),
        ("  spaces \t and\nlines ", "spaces and lines"),
        ("U.S.A.", "usa"),  # punctuation goes before articles are looked for
        ("theatre another", "theatre another"),
        ("a-the", "athe"),
        ("“Curly” marks stay", "“curly” marks stay"),
        ("", ""),
    ],
)
def test_normal_form_is_squads(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "exact"),
    [
        ("The cat sat.", "cat sat", 1.0, 1.0),
        ("the cat sat on the mat", "a cat sat", 2 * (2 / 4) * 1 / (2 / 4 + 1), 0.0),  # cat sat on mat / cat sat
        ("dog dog dog", "dog", 0.5, 0.0),  # one of three shared, all of one: bags, not sets
        ("owl", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # both empty in normal form
        ("", "", 1.0, 1.0),
        ("four euro", ["five euro", "Four euro.", "none"], 1.0, 1.0),
        ("four euro", ["five euro", "four"], 2 / 3, 0.0),
        ("cat", ["the", "cat"], 1.0, 1.0),  # an accepted answer that is empty in normal form is passed over
        ("", [], 1.0, 1.0),  # nothing accepted: the empty answer is right
    ],
)
def test_squad_scores_by_hand(prediction: str, answer: str | list[str], f1: float, exact: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(f1)
    assert exact_match(prediction, answer) == exact


def test_gold_recall_counts_the_gold_words_only() -> None:
    assert gold_recall("up to six books and more", "six books") == 1.0
    assert gold_recall("six", "six six books") == pytest.approx(1 / 3)
    assert gold_recall("six", ["nine", "six"]) == 1.0


@given(TEXTS, TEXTS)
def test_f1_is_bounded_symmetric_and_blind_to_order(left: str, right: str) -> None:
    value = token_f1(left, right)
    assert 0 <= value <= 1
    if normalize_answer(left) and normalize_answer(right):  # else an accepted answer is empty, which SQuAD passes over
        assert value == pytest.approx(token_f1(right, left))
    assert token_f1(" ".join(reversed(left.split())), right) == pytest.approx(value)
    assert exact_match(left, right) <= value + 1e-12
    assert token_f1(left, left) == exact_match(left, left) == 1.0


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(items: list[tuple[float, bool]]) -> None:
    right, wrong = [s for s, ok in items if ok], [s for s, ok in items if not ok]
    value = validator_auroc([s for s, _ in items], [ok for _, ok in items])
    if not right or not wrong:
        assert value is None
        return
    expected = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))
    assert value == pytest.approx(expected)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=20), st.randoms())
def test_aggregate_leaves_out_none_and_ignores_order(values, random) -> None:  # type: ignore[no-untyped-def]
    rows = [{"token_f1": value} for value in values]
    known = [value for value in values if value is not None]
    found = aggregate(rows)["token_f1"]
    assert found is None if not known else found == pytest.approx(math.fsum(known) / len(known))
    random.shuffle(rows)
    assert aggregate(rows)["token_f1"] == (None if not known else pytest.approx(found))


def test_a_right_answer_scores_on_everything(ask, reply, corpus) -> None:
    row = score_trace(reply(), ask(), corpus, prices=(2.0, 10.0))
    assert row["token_f1"] == pytest.approx(2 * 4 / (7 + 4))  # visitor may borrow up to six books; up to six books
    assert row["gold_recall"] == row["abstention_accuracy"] == row["is_right"] == 1.0
    assert row["citation_precision"] == row["citation_recall"] == row["recall_at_k"] == 1.0
    assert row["unsupported_rate"] == 0.0 and row["false_abstention_rate"] == 0.0 and row["valid_score_rate"] == 1.0
    assert row["seconds"] == 2.0 and row["prompt_tokens"] == 300 and row["cached_tokens"] == 120 and row["completion_tokens"] == 30
    assert row["cost"] == pytest.approx((300 * 2 + 30 * 10) / 1e6)


def test_quotes_must_be_verbatim_in_a_passage_shown_and_the_gold_ones(ask, reply, corpus) -> None:
    quotes = [
        "Visitors may  borrow\nup to six books",  # white space may differ
        "Visitors can borrow up to six books",  # not verbatim
        "The reading room opens at nine",  # verbatim, other evidence
        "A member pays 1,200 crowns a year",  # verbatim, but not in the passages shown
    ]
    row = score_trace(reply(passages=["library.pdf-0", "library.pdf-80"], quotes=quotes), ask(), corpus)
    assert row["citation_precision"] == 0.25
    assert row["citation_recall"] == 1.0


def test_quotes_overlap_by_document_spans_where_both_are_found(ask, reply, corpus) -> None:
    # "for three weeks. Lost cards are" shares 16 of its 31 characters with the gold quote; one word more is too much
    near = reply(passages=["library.pdf-80"], quotes=["for three weeks. Lost cards are"])
    far = reply(passages=["library.pdf-80"], quotes=["for three weeks. Lost cards are replaced at the front"])
    assert score_trace(near, ask(), corpus)["citation_precision"] == 1.0
    assert score_trace(far, ask(), corpus)["citation_precision"] == 0.0


def test_quotes_overlap_by_words_where_the_gold_one_is_not_found(ask, reply, corpus) -> None:
    question = ask(quotes=["visitors MAY borrow, up to six novels"])  # not verbatim in the document
    assert score_trace(reply(), question, corpus)["citation_precision"] == 1.0
    assert score_trace(reply(quotes=["The reading room opens at nine"]), question, corpus)["citation_precision"] == 0.0


def test_a_gold_quote_cut_by_a_chunk_boundary_is_still_found(ask, reply, corpus) -> None:
    question = ask(quotes=["on weekdays. Visitors may borrow up to six books for three weeks. Lost cards are replaced at the front desk"])
    row = score_trace(reply(), question, corpus)
    assert not any(question.quotes[0] in chunk.text for chunk in corpus.values())
    assert row["citation_precision"] == 1.0
    assert row["recall_at_k"] == 0.0  # no single passage holds it


def test_recall_is_over_gold_quotes(ask, reply, corpus) -> None:
    question = ask(quotes=["Visitors may borrow up to six books", "A member pays 1,200 crowns a year"], documents=["library.pdf"] * 2)
    row = score_trace(reply(), question, corpus)
    assert row["citation_precision"] == 1.0 and row["citation_recall"] == 0.5 and row["recall_at_k"] == 0.5


def test_only_the_first_retrieval_counts_for_recall(ask, reply, corpus) -> None:
    trace = reply(passages=["other.pdf-0"])
    second = trace.steps[1].model_copy(update={"passage_ids": ["library.pdf-0", "library.pdf-80"]})
    row = score_trace(trace.model_copy(update={"steps": [*trace.steps, second]}), ask(), corpus)
    assert row["recall_at_k"] == 0.0


def test_a_recorded_answer_retrieved_nothing_here(ask, reply, corpus) -> None:
    row = score_trace(reply().model_copy(update={"source": "imported"}), ask(), corpus)
    assert row["citation_precision"] == 1.0 and row["recall_at_k"] is row["precision_at_k"] is row["mrr"] is row["ndcg_at_k"] is None


def test_no_quote_counts_nothing_and_no_gold_quote_is_undefined(ask, reply, corpus) -> None:
    assert score_trace(reply(quotes=[]), ask(), corpus)["citation_precision"] == 0.0
    without = score_trace(reply(), ask(quotes=[]), corpus)
    assert without["citation_precision"] is without["citation_recall"] is without["recall_at_k"] is None


def test_unsupported_sentences(ask, reply, corpus) -> None:
    def rate(answer: str) -> float | None:
        return score_trace(reply(answer=answer, passages=list(corpus)), ask(), corpus)["unsupported_rate"]

    assert rate("Visitors borrow books. Dragons guard golden treasure.") == 0.5
    assert rate("Visitors may borrow 7 books.") == 1.0  # the number is nowhere
    assert rate("A member pays 1200 crowns.") == 0.0  # 1,200 in the passage
    assert rate("Visitors borrowed a book for a week.") == 0.0  # stems
    assert rate("") is None


def test_abstaining(ask, reply, abstain, corpus) -> None:
    unanswerable = ask(id="q2", answers=None, quotes=[])
    rows = [score_trace(trace, q, corpus) for q in (ask(), unanswerable) for trace in (reply(), abstain())]
    assert [row["abstention_accuracy"] for row in rows] == [1.0, 0.0, 0.0, 1.0]
    assert [row["false_abstention_rate"] for row in rows] == [0.0, 1.0, None, None]
    assert [row["is_right"] for row in rows] == [1.0, 0.0, 0.0, 1.0]
    assert rows[1]["token_f1"] == 0.0 and rows[1]["citation_precision"] == 0.0 and rows[1]["unsupported_rate"] is None
    assert all(rows[place][name] is None for place in (2, 3) for name in ("token_f1", "exact_match", "citation_precision", "recall_at_k"))


def test_abstention_accuracy_is_the_mean_of_the_two_kinds(ask, reply, abstain, corpus) -> None:
    unanswerable = ask(answers=None, quotes=[])
    rows = [score_trace(reply(), ask(), corpus)] * 9 + [score_trace(abstain(), ask(), corpus)] + [score_trace(reply(), unanswerable, corpus)] * 2
    assert aggregate(rows)["abstention_accuracy"] == pytest.approx((0.9 + 0.0) / 2)
    assert aggregate(rows)["false_abstention_rate"] == pytest.approx(0.1)
    assert aggregate(rows[:10])["abstention_accuracy"] is None


def test_a_failed_run_is_a_wrong_answer(ask, reply, corpus) -> None:
    failed = reply(complete=False)
    row = score_trace(failed.model_copy(update={"steps": []}), ask(), corpus)
    wrong = (
        "token_f1",
        "exact_match",
        "gold_recall",
        "citation_precision",
        "citation_recall",
        "abstention_accuracy",
        "recall_at_k",
        "is_right",
    )
    assert all(row[name] == 0.0 for name in wrong)
    assert row["score"] is None and row["seconds"] is None
    assert score_trace(failed, ask(answers=None, quotes=[]), corpus)["abstention_accuracy"] == 0.0


def test_without_an_answer_key_nothing_about_the_answer_is_measured(ask, reply, corpus) -> None:
    row = score_trace(reply(), ask(answers=None, has_answer_key=False), corpus)
    assert row["token_f1"] is row["abstention_accuracy"] is row["is_right"] is None
    assert row["citation_precision"] == 1.0


def test_valid_scores_are_counted_over_validations(ask, reply, corpus) -> None:
    rows = [score_trace(reply(validation=text), ask(), corpus) for text in ("0.5", "Score: 1", "2", "quite right")]
    twice = reply(validation="no")
    rows.append(score_trace(twice.model_copy(update={"steps": [*twice.steps, twice.steps[-1]]}), ask(), corpus))
    assert aggregate(rows)["valid_score_rate"] == pytest.approx(2 / 6)


def test_answers_have_the_form_asked_for_or_are_left_out(ask, reply, corpus) -> None:  # type: ignore[no-untyped-def]
    def rate(text: str, finish: str = "stop", **fields: object) -> float | None:
        trace = reply(**fields)
        steps = [step.model_copy(update={"text": text, "finish_reason": finish}) if step.name == "answer" else step for step in trace.steps]
        return score_trace(trace.model_copy(update={"steps": steps}), ask(), corpus)["answer_format_rate"]

    assert rate("Quote: six books\nAnswer: six") == rate(ABSTENTION, abstained=True) == 1.0
    assert rate("Sentences near it:\n- six books") == rate("Quote: six books") == rate("Quote: six books", "length") == 0.0
    assert rate("Quote: six bo", "length", abstained=True) is rate("Six.", metadata={"mode": "closed-book"}) is rate("") is None


def test_model_steps_and_escalations_are_counted(ask, reply, corpus) -> None:
    traces = [reply(), reply().model_copy(update={"metadata": {"low_score": "true"}}), reply().model_copy(update={"metadata": {"escalated": "true"}})]
    rows = [score_trace(trace, ask(), corpus) for trace in traces]
    assert aggregate(rows)["escalation_rate"] == pytest.approx(2 / 3)
    assert aggregate(rows)["model_steps"] == sum(step.name != "retrieve" for step in traces[0].steps)


def test_latency_is_the_nearest_rank() -> None:
    found = aggregate([{"seconds": float(value)} for value in range(1, 21)] + [{"seconds": None}])
    assert found["latency_p50"] == 10.0 and found["latency_p95"] == 19.0


def test_every_metric_is_none_for_no_rows() -> None:
    assert aggregate([]) == dict.fromkeys(METRICS)


def test_a_passage_that_left_the_corpus_is_an_error_not_a_wrong_answer(ask, reply, corpus) -> None:
    with pytest.raises(NotFoundError, match="no longer in the corpus"):
        score_trace(reply(passages=["gone"]), ask(), corpus)
