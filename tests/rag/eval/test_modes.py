"""NAME:MODE among the models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.eval.metrics import score_trace
from rag.eval.modes import in_mode, split_mode, without_digest
from understudy.errors import UsageError


@given(st.from_regex(r"[a-z][a-z0-9-]{0,10}(@[0-9a-f]{12})?", fullmatch=True).filter(lambda name: name != "teacher"))
def test_a_name_and_its_mode_come_back(name: str) -> None:
    assert split_mode(name) == split_mode(f" {name}:agentic") == (name, "agentic") and in_mode(name, "agentic") == name
    for mode in ("fast", "closed-book"):
        assert split_mode(in_mode(name, mode)) == (name, mode)
        assert without_digest(in_mode(name, mode)) == f"{name.partition('@')[0]}:{mode}"


@pytest.mark.parametrize("spec", ["base:slow", "base:", "teacher:fast", "base:fast:closed-book"])
def test_a_mode_that_there_is_not_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="no mode"):
        split_mode(spec)


def test_what_was_asked_without_passages_has_no_retrieval_and_cites_nothing(ask, reply, corpus) -> None:  # type: ignore[no-untyped-def]
    asked = reply(quotes=[], metadata={"mode": "closed-book"})
    closed = asked.model_copy(update={"steps": [asked.steps[2].model_copy(update={"passage_ids": []})]})
    row = score_trace(closed, ask(), corpus)
    assert row["recall_at_k"] is row["mrr"] is row["unsupported_rate"] is None and row["citation_precision"] == row["citation_recall"] == 0.0
    assert row["token_f1"] is not None and row["tokens_per_second"] == pytest.approx(10.0)  # ten tokens in a second
