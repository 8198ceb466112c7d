"""The model client against a server that refuses, fails, drips, breaks off, echoes keys and redirects."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripted import HASTY, Endpoint, Handler, cut_off, drip, reset, scripted, status
from understudy.client import ModelClient
from understudy.completions import Completion, Draft, answer_start
from understudy.errors import EndpointError
from understudy.patience import Patience, pause_before, seconds_asked
from understudy.records import Message

ASKED = [Message(role="user", content="Why?")]
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with scripted(api_key=KEY) as made:
        made.reply = lambda _step, _prompt: "Because it is so."
        yield made


def complete(endpoint: Endpoint, patience: Patience = HASTY, stream: bool = False, times: int = 1) -> Completion:
    async def run() -> Completion:
        async with ModelClient(endpoint.model, patience) as client:
            for _ in range(times):
                completion = await client.complete(ASKED, 16, on_progress=(lambda _: None) if stream else None)
            return completion

    return asyncio.run(run())


def failure(endpoint: Endpoint, patience: Patience = HASTY, stream: bool = False) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        complete(endpoint, patience, stream)
    assert KEY not in f"{caught.value.message} {caught.value.remedy}"
    return caught.value


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_comes_with_usage_finish_reason_and_logprobs(endpoint: Endpoint, stream: bool) -> None:
    completion = complete(endpoint, stream=stream)
    assert completion.text == "Because it is so."
    assert completion.finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 4)
    assert completion.mean_logprob == pytest.approx(-0.1)
    assert completion.first_alternatives == {"B": -0.1}
    assert endpoint.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("fault", [status(429), status(500), status(503), status(408), reset], ids=["429", "500", "503", "408", "reset"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_may_pass_is_asked_again(endpoint: Endpoint, fault: Callable[[Handler], None], stream: bool) -> None:
    endpoint.faults = [fault, fault]
    assert complete(endpoint, stream=stream).text == "Because it is so."
    assert len(endpoint.asked) == 3


def test_attempts_are_bounded(endpoint: Endpoint) -> None:
    endpoint.faults = [status(503)] * 9
    assert "answered 503: not now" in failure(endpoint).message
    assert len(endpoint.asked) == HASTY.attempts


def test_a_slow_drip_is_a_time_out(endpoint: Endpoint) -> None:
    endpoint.faults = [drip, drip]
    assert "did not answer within 0.3 s" in failure(endpoint, Patience(seconds=0.3, attempts=2, first_pause=0.01)).message
    assert len(endpoint.asked) == 2
    assert endpoint.gone.wait(5)  # its connection was closed


def test_retry_after_is_honoured(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("understudy.client.asyncio.sleep", recorded)
    endpoint.faults = [status(429, Retry_After="30")]
    assert complete(endpoint).text == "Because it is so."
    assert [30 <= pause <= 33 for pause in pauses] == [True]


def test_a_server_that_asks_for_a_long_wait_is_not_asked_again(endpoint: Endpoint) -> None:
    endpoint.faults = [status(429, Retry_After="3600")]
    assert "429" in failure(endpoint).message
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("code", [401, 403, 404, 413])
def test_what_will_not_pass_is_asked_once(endpoint: Endpoint, code: int) -> None:
    endpoint.faults = [status(code, "no")]
    assert f"answered {code}: no" in failure(endpoint).message
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("drop", [False, True])
def test_a_stream_without_a_finish_reason_is_an_error_and_is_not_asked_again(endpoint: Endpoint, drop: bool) -> None:
    """CASE 17. Text was passed on: a second attempt would contradict it."""
    endpoint.faults = [cut_off("Because it", drop)]
    message = failure(endpoint, stream=True).message
    assert "without a finish reason" in message or "broke the connection" in message
    assert len(endpoint.asked) == 1


def test_an_error_inside_a_stream_is_an_error(endpoint: Endpoint) -> None:
    def fail(handler: Handler) -> None:
        handler.start_stream()
        handler.event({"error": {"message": "engine died", "code": 500}})

    endpoint.faults = [fail]
    assert "engine died" in failure(endpoint, stream=True).message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"<html>", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"choices": 3}', b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}'],
    ids=["html", "no text", "deep", "list", "empty", "choices", "content"],
)
def test_a_reply_that_is_no_completion_is_an_error(endpoint: Endpoint, content: bytes, stream: bool) -> None:
    def fail(handler: Handler) -> None:
        if stream:
            handler.start_stream()
            handler.wfile.write(b"data: " + content + b"\n\n")
        else:
            handler.send(200, content)

    endpoint.faults = [fail]
    assert "answered with something that is not" in failure(endpoint, stream=stream).message


def test_refused_logprobs_are_left_out_and_that_is_remembered(endpoint: Endpoint) -> None:
    endpoint.refuses_logprobs = True
    completion = complete(endpoint, times=2)
    assert ["logprobs" in body for body in endpoint.bodies] == [True, False, False]
    assert (completion.text, completion.mean_logprob, completion.first_alternatives) == ("Because it is so.", None, {})


def test_ignored_logprobs_are_not_asked_for_again(endpoint: Endpoint) -> None:
    endpoint.faults = [lambda handler: handler.answer("Because.", {})]
    complete(endpoint, times=2)
    assert ["logprobs" in body for body in endpoint.bodies] == [True, False]


def test_a_request_that_is_refused_for_another_reason_is_not_held_against_logprobs(endpoint: Endpoint) -> None:
    endpoint.faults = [status(400, "too long"), status(400, "too long")]
    assert "too long" in failure(endpoint).message
    complete(endpoint)
    assert "logprobs" in endpoint.bodies[-1]


def test_refused_stream_options_are_left_out_and_that_is_remembered(endpoint: Endpoint) -> None:
    """Fireworks answers so for some models; tokens are then estimated."""
    endpoint.faults = [status(400, "Extra inputs are not permitted, field: 'stream_options'")]
    completion = complete(endpoint, stream=True, times=2)
    assert [("stream_options" in body, "logprobs" in body) for body in endpoint.bodies] == [(True, True), (False, True), (False, True)]
    assert completion.mean_logprob == pytest.approx(-0.1)


@pytest.mark.parametrize(("wake_seconds", "is_answered"), [(5.0, True), (0.0, False)])
def test_a_deployment_that_wakes_is_waited_for(endpoint: Endpoint, wake_seconds: float, is_answered: bool) -> None:
    """Fireworks' answer while a deployment without a replica starts: minutes, more than the attempts cover."""

    def waking(handler: Handler) -> None:
        handler.send(503, {"error": {"message": "scaling up from zero", "code": "DEPLOYMENT_SCALING_UP", "type": "error"}})

    endpoint.faults = [waking] * 6
    patience = Patience(seconds=5, attempts=2, first_pause=0.001, wake_seconds=wake_seconds)
    if is_answered:
        assert complete(endpoint, patience).text == "Because it is so."
    else:
        assert "scaling up from zero" in failure(endpoint, patience).message
    assert len(endpoint.asked) == (7 if is_answered else 2)


def test_a_key_follows_no_redirect_and_stands_in_no_message(endpoint: Endpoint) -> None:
    with scripted() as elsewhere:
        endpoint.faults = [status(307, "moved", Location=f"{elsewhere.model.base_url}/chat/completions")]
        assert "redirect" in failure(endpoint).message
        assert elsewhere.asked == []
    endpoint.faults = [status(401, f"bad key Bearer {KEY}")]
    assert "bad key" in failure(endpoint).message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dots", [0, 370])
def test_a_key_in_an_error_that_came_with_status_200_is_blotted_out(endpoint: Endpoint, stream: bool, dots: int) -> None:
    """Also where a long message would be cut in the middle of it."""
    error = {"error": {"message": f"bad key {'.' * dots}{KEY}"}}

    def fail(handler: Handler) -> None:
        if stream:
            handler.start_stream()
            handler.event(error)
        else:
            handler.send(200, error)

    endpoint.faults = [fail]
    message = failure(endpoint, stream=stream).message
    assert "bad key" in message and KEY[:8] not in message


def test_no_header_from_the_environment_and_no_empty_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK reads these for any base URL."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "ambient")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer ambient\nX-Gateway: ambient")
    with scripted() as keyless, scripted(api_key=KEY) as keyed:
        for endpoint in (keyless, keyed):
            endpoint.reply = lambda _step, _prompt: "Because."
            complete(endpoint)
            assert "ambient" not in str(endpoint.headers[0])
        assert (keyless.keys, keyed.keys) == ([None], [f"Bearer {KEY}"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", [200, 400])
def test_the_size_of_a_reply_is_bounded(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, stream: bool, code: int) -> None:
    monkeypatch.setattr("understudy.client.MAX_REPLY_BYTES", 2**20)
    endpoint.faults = [lambda handler: handler.send(code, b"x" * (2**20 + 1))]
    assert "longer than 1 MiB" in failure(endpoint, stream=stream).message


def test_a_compressed_reply_is_not_unpacked(endpoint: Endpoint) -> None:
    endpoint.faults = [lambda handler: handler.send(200, gzip.compress(b" " * 2**20), Content_Encoding="gzip")]
    assert "compressed" in failure(endpoint).message


def test_an_endpoint_that_ignores_the_limit_is_cut(endpoint: Endpoint) -> None:
    endpoint.reply = lambda _step, _prompt: "word " * 100_000
    completion = complete(endpoint)
    assert (len(completion.text), completion.finish_reason) == (16 * 32, "length")


def test_reasoning_comes_as_a_think_block_and_its_log_probabilities_do_not_count() -> None:
    draft = Draft("m", 16)
    for tokens in (["<think>", "hm", "</think>"], ["\n\n", "1"]):
        content = [
            {"token": token, "logprob": -5.0 if token in ("hm", "\n\n") else -0.2, "top_logprobs": [{"token": token, "logprob": -0.2}]} for token in tokens
        ]
        draft.add({"choices": [{"delta": {"content": "".join(tokens)}, "logprobs": {"content": content}, "finish_reason": "stop"}]})
    completion = draft.finish()
    assert (completion.mean_logprob, completion.first_alternatives) == (-0.2, {"1": -0.2})
    apart = Draft("m", 16)
    apart.add({"choices": [{"message": {"reasoning_content": "hm", "content": "1"}, "finish_reason": "stop"}]})
    assert apart.finish().text == "<think>hm</think>1"


@given(thought=st.lists(st.sampled_from(["a", " b", "\n"])), answer=st.lists(st.sampled_from(["x", " y", "\n"])))
def test_the_answer_starts_after_the_think_block(thought: list[str], answer: list[str]) -> None:
    tokens = ["<think>", *thought, "</", "think>", *answer]
    assert "".join(tokens[answer_start(tokens) :]).strip() == "".join(answer).strip()
    assert answer_start(answer) == 0
    assert answer_start(["<think>", *thought]) == 1 + len(thought)


@given(attempt=st.integers(1, 30), asked=st.none() | st.floats(0, 60))
def test_pauses_are_bounded_jittered_and_never_less_than_asked(attempt: int, asked: float | None) -> None:
    patience = Patience()
    pause = pause_before(attempt, patience, asked)
    assert pause is not None
    assert max(patience.first_pause / 2, asked or 0) <= pause <= max(patience.longest_pause, 1.1 * (asked or 0))


def test_retry_after_may_be_seconds_or_a_date() -> None:
    assert seconds_asked("7") == 7
    assert seconds_asked(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=3)
    assert seconds_asked(formatdate(time.time() - 30, usegmt=True)) == 0
    assert [seconds_asked(value) for value in (None, "", "soon", "nan", "-5")] == [None] * 5


@given(payload=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(
    ["choices", "message", "delta", "content", "usage", "logprobs", "finish_reason", "error", "token"]), inner)))  # fmt: skip
def test_any_json_is_a_completion_or_our_error(payload: object) -> None:
    draft = Draft("m", 16)
    try:
        draft.add(json.loads(json.dumps(payload)))
        draft.finish()
    except EndpointError:
        pass
