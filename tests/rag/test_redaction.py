"""Redaction: what is taken out, what stays, and patterns that would never end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.redaction import redactor_of
from rag.traces import keep_trace
from understudy.config import load_config
from understudy.errors import UsageError
from understudy.records import Chunk, Document, Message, Step, Trace
from understudy.settings.answers import Redaction
from understudy.workspace import create_workspace

BOTH = redactor_of(Redaction(email=True, phone=True))
PERSONAL = "Ask ada@example.org or +49 30 1234567."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Write to ada.lovelace+x@mail.example.co.uk, please.", "Write to [email], please."),
        ("<ada@example.org>;bob@example.org", "<[email]>;[email]"),
        ("Jörg: jörg@müller.example", "Jörg: [email]"),
        ("Call +49 30 1234567 or 0049-30-1234567", "Call [phone] or [phone]"),
        ("Call (030) 123 45 67 now", "Call [phone] now"),
        ("Call 555-123-4567.", "Call [phone]."),
        ("an @ sign, a@b, me @ home", "an @ sign, a@b, me @ home"),
        ("On 2026-11-21 or 21.11.2026, 10 000 of 1,250,000 at 0.75, §12.3.4", "On 2026-11-21 or 21.11.2026, 10 000 of 1,250,000 at 0.75, §12.3.4"),
        ("id 6b01c1e733d92f74b255fe31 and 20261121", "id 6b01c1e733d92f74b255fe31 and 20261121"),
    ],
)
def test_what_is_personal_and_what_is_not(text: str, left: str) -> None:
    assert BOTH.text(text) == left


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_an_address_never_stays(before: str, after: str) -> None:
    redacted = BOTH.text(f"{before} ada@example.org {after}")
    assert "ada@example.org" not in redacted
    assert BOTH.text(redacted) == redacted


def test_nothing_of_a_stored_trace_holds_it(
    tmp_path: Path, make_document: Callable[..., tuple[Document, list[Chunk]]], make_trace: Callable[..., Trace]
) -> None:
    workspace = create_workspace(str(tmp_path / "w"), "redaction: {email: true, phone: true, patterns: {case-number: 'AZ-\\d+'}}\n")
    _, [chunk] = make_document("a.txt", [f"{PERSONAL} Case AZ-1234 is closed."])
    step = Step(
        name="answer",
        messages=[Message(role="user", content=PERSONAL)],
        text=f"Quote: {PERSONAL}",
        parsed={"quotes": [PERSONAL, {"deep": "AZ-77"}], "score": 0.5},
        error=PERSONAL,
    )
    asked = f"Who is ada@example.org in AZ-1234? {PERSONAL}"
    trace = make_trace(asked, PERSONAL, chunk, PERSONAL, [chunk], steps=[step], metadata={"question_id": "555-123-4567", "error": PERSONAL})
    keep_trace(workspace, trace)
    stored = workspace.store.trace(trace.id)
    assert stored is not None
    written = stored.model_copy(update={"metadata": {}}).model_dump_json()
    assert not any(secret in written for secret in ("ada@", "1234567", "AZ-"))
    assert stored.question == "Who is [email] in [case-number]? Ask [email] or [phone]."
    assert stored.citations[0].quote == stored.answer == "Ask [email] or [phone]."
    assert stored.steps[0].parsed == {"quotes": ["Ask [email] or [phone].", {"deep": "[case-number]"}], "score": 0.5}
    assert stored.metadata == {"question_id": "555-123-4567", "error": "Ask [email] or [phone]."}


def test_without_patterns_a_trace_is_stored_as_it_is(tmp_path: Path, make_trace: Callable[..., Trace]) -> None:
    workspace = create_workspace(str(tmp_path / "w"))
    trace = make_trace(PERSONAL, None, None, "", [])
    keep_trace(workspace, trace)
    assert workspace.store.trace(trace.id) == trace


def test_a_pattern_that_would_never_end_withholds_the_text() -> None:
    redactor = redactor_of(Redaction(patterns={"slow": "(x|xx)+$"}))
    assert redactor.text("x" * 60 + "!") == "[slow: withheld]"
    assert redactor.text("more xx") == "more [slow]"


@pytest.mark.parametrize("patterns", ["{a: '('}", "{a: 'x*'}", "{Email: x}", "{email: x}", "{'a b': x}"])
def test_a_pattern_that_cannot_work_is_refused_with_the_configuration(tmp_path: Path, patterns: str) -> None:
    (tmp_path / "understudy.yaml").write_text(f"redaction: {{patterns: {patterns}}}\n")
    with pytest.raises(UsageError, match=r"redaction\.patterns"):
        load_config(tmp_path)
