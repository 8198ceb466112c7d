"""Conditions: what is refused, and what they let through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.filters import Facts, IndexedDocument, matching, parse_conditions
from understudy.errors import UsageError


def document(name: str, tags: list[str], valid_until: float | None = None) -> IndexedDocument:
    return IndexedDocument(
        id=name * 8, source=f"{name}.pdf", media_type="application/pdf", tags=tags, boost=1.0, valid_from=None, valid_until=valid_until, page_starts=[0]
    )


FACTS = Facts(
    chunk_ids=["a1", "a2", "b1"],
    documents=[document("a", ["law", "'; DROP TABLE chunks; --"]), document("b", ["hr"], valid_until=1_000_000_000.0)],
    document_of=np.array([0, 0, 1], dtype=np.int32),
    pages=np.array([[1, 1], [2, 4], [3, 3]], dtype=np.int32),
)


def allowed(*conditions: str) -> list[str]:
    return [FACTS.chunk_ids[place] for place in np.flatnonzero(matching(FACTS, parse_conditions(conditions)))]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], ["a1", "a2", "b1"]),
        (["tag=law"], ["a1", "a2"]),
        (["tag!=law"], ["b1"]),
        (["document=b.pdf"], ["b1"]),
        (["document=a.pdf", "document=b.pdf"], ["a1", "a2", "b1"]),
        (["document=a.pdf", "page=3"], ["a2"]),
        (["page<=2"], ["a1", "a2"]),
        (["page>3"], ["a2"]),
        (["page!=3"], ["a1"]),
        (["valid=2001-09-01"], ["a1", "a2", "b1"]),
        (["valid=2026-01-01"], ["a1", "a2"]),
        (["tag='; DROP TABLE chunks; --"], ["a1", "a2"]),
        (["tag={'$ne': 1}"], []),
        (["document=*"], []),
    ],
)
def test_conditions_let_through_what_they_say(conditions: list[str], expected: list[str]) -> None:
    assert allowed(*conditions) == expected


@pytest.mark.parametrize(
    "condition",
    [
        "$where=1",
        "tag.$ne=x",
        "tag $ne x",
        "tenant=other",
        "page=1 OR 1=1",
        "page=-1",
        "tag<law",
        "valid>2026-01-01",
        "valid=soon",
        "tag=",
        "=x",
        "id=1; --",
        "",
    ],
)
def test_unknown_keys_operators_and_values_of_another_kind_are_refused(condition: str) -> None:
    with pytest.raises(UsageError):
        parse_conditions([condition])


@given(st.text(min_size=1).filter(lambda value: value.strip() == value))
def test_any_value_is_data(value: str) -> None:
    (condition,) = parse_conditions([f"tag={value}"])
    assert condition.value == value or value.startswith("=")
