"""The proof without an engine: its statistics, its choice of rows, its checks of files, its reference and its HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rag.prompts import ABSTENTION
from serve.prove import (
    SCORED_ROWS,
    SIGN_LIMIT,
    Distances,
    Row,
    Scorer,
    Server,
    check_files,
    choose_scored,
    choose_spread,
    find_weights,
    ratio_bound,
    read_rows,
    shared_prefix,
    sign_test,
    weigh,
)
from understudy.adapters import adapter_digest, verify_adapter
from understudy.chat import Encoded
from understudy.errors import EngineError, NotFoundError
from understudy.files import read_json, write_json, write_jsonl
from understudy.records import AdapterManifest, Example, Message
from understudy.workspace import create_workspace

NAMES = ["nearer_to_trained", "within_engine_noise", "engine_noise", "changes_the_base"]
distances = st.floats(0, 3, allow_nan=False)


def passed(checks: list[Any]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


def distances_of(to_adapter: Any, to_base: Any, noise: Any, change: Any, rows: int = SCORED_ROWS, seed: int = 0) -> Distances:
    """Rows that scatter by a fifth around each mean."""
    rng = np.random.default_rng(seed)
    return Distances(*(mean * rng.uniform(0.8, 1.2, rows) for mean in (to_adapter, to_base, noise, change)))


# ── statistics ──


@given(st.lists(st.tuples(distances, distances), min_size=1, max_size=60))
def test_sign_test_is_scipys_binomial_test_without_ties(pairs: list[tuple[float, float]]) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    wins, trials = int((first < second).sum()), int((first != second).sum())
    expected = scipy.stats.binomtest(wins, trials, alternative="greater").pvalue if trials else 1.0
    assert sign_test(first, second) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(distances, distances), min_size=7, max_size=40), st.floats(0.1, 10))
def test_ratio_bound_has_no_unit_and_lies_among_the_rows_ratios(pairs: list[tuple[float, float]], scale: float) -> None:
    numerator, denominator = (np.array(side) + 0.01 for side in zip(*pairs, strict=True))
    bound = ratio_bound(numerator, denominator)
    assert bound == pytest.approx(ratio_bound(numerator * scale, denominator * scale))
    assert (numerator / denominator).min() - 1e-9 <= bound <= (numerator / denominator).max() + 1e-9
    assert ratio_bound(denominator, denominator) == pytest.approx(1.0)


def test_ratio_bound_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(3)
    numerator, denominator = rng.gamma(4, 0.01, 16), rng.gamma(4, 0.01, 16)

    def statistic(a: Any, b: Any, axis: int = -1) -> Any:
        return a.mean(axis=axis) / b.mean(axis=axis)

    theirs = scipy.stats.bootstrap(
        (numerator, denominator), statistic, paired=True, vectorized=True, confidence_level=0.95, alternative="less", method="percentile", rng=1
    )
    assert ratio_bound(numerator, denominator) == pytest.approx(theirs.confidence_interval.high, rel=0.02)


def test_ratio_bound_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = sum(ratio_bound(rng.gamma(4, 0.01, SCORED_ROWS), rng.gamma(4, 0.01, SCORED_ROWS)) >= 1.0 for _ in range(100))
    assert covered >= 85


# ── what the figures mean: the first four are those measured with SmolLM2-135M on vLLM (see the module's docstring) ──


@pytest.mark.parametrize(
    ("figures", "failing"),
    [
        ((0.024, 0.416, 0.025, 0.418), set()),  # the adapter as trained
        ((0.297, 0.223, 0.025, 0.226), {"nearer_to_trained", "within_engine_noise"}),  # another adapter under its name
        ((0.426, 0.025, 0.025, 0.0), {"nearer_to_trained", "within_engine_noise", "changes_the_base"}),  # accepted, not applied
        ((0.120, 0.416, 0.025, 0.300), {"within_engine_noise"}),  # applied in part
        ((0.640, 0.900, 0.640, 0.900), {"engine_noise"}),  # a base of another quantisation explains everything away
        ((0.0, 0.4, 0.0, 0.4), set()),  # an engine that computes exactly as PEFT does
    ],
)
def test_the_right_adapter_passes_and_each_wrong_one_fails_where_it_is_wrong(figures: tuple[float, ...], failing: set[str]) -> None:
    results = passed(weigh(distances_of(*figures)))
    assert {name for name, good in results.items() if not good} == failing
    assert list(results) == NAMES


def test_an_adapter_of_zeros_changes_nothing() -> None:
    same = distances_of(0.025, 0.025, 0.025, 0.0).noise
    results = passed(weigh(Distances(same, same, same, np.zeros_like(same))))
    assert not results["nearer_to_trained"]
    assert not results["changes_the_base"]


@pytest.mark.parametrize("rows", range(10))
def test_too_few_rows_decide_nothing(rows: int) -> None:
    checks = weigh(distances_of(0.024, 0.416, 0.025, 0.418, rows=rows))
    reachable = 0.5**rows <= SIGN_LIMIT
    assert [check.name for check in checks] == NAMES
    assert all(check.passed == reachable for check in checks)
    assert {check.to_json()["status"] for check in checks} == {"pass" if reachable else "undecided"}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.data())
def test_checks_are_json_and_pass_only_below_their_limit(rows: int, data: st.DataObject) -> None:
    columns = [np.array(data.draw(st.lists(distances, min_size=rows, max_size=rows))) for _ in range(4)]
    for check in weigh(Distances(*columns)):
        shown = json.loads(json.dumps(check.to_json(), allow_nan=False))
        assert shown["passed"] == (check.value <= check.limit and not check.undecided)


# ── which rows ──


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


def test_a_deleted_dataset_is_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="dataset gone of a@1") as caught:
        read_rows(tmp_path / "gone", "a@1")
    assert "dataset build" in caught.value.remedy


# ── files ──


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A registered adapter of two small matrices."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    save_file({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}, scratch / "adapter_model.safetensors")
    write_json(scratch / "adapter_config.json", {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "base-id", "target_modules": ["q_proj"]})
    digest = adapter_digest(scratch, "b" * 64)
    manifest = AdapterManifest(
        name="tiny", digest=digest, base="base-id", base_digest="b" * 64, served_base_digest="b" * 64, quantisation="none", tokenizer_digest="",
        chat_template_digest="", prompt_version="", dataset_digest="", recipe={}, seed=0, rank=2, alpha=4, targets=["q_proj"], packages={},
        metrics={}, tenants=[], group_ids=[], question_digests=[], created_at=0.0,
    )  # fmt: skip
    write_json(scratch / "manifest.json", manifest.model_dump())
    folder = tmp_path / "adapters" / "tiny" / digest
    folder.parent.mkdir(parents=True)
    return scratch.rename(folder)


def manifest_of(folder: Path) -> AdapterManifest:
    return AdapterManifest.model_validate(read_json(folder / "manifest.json"))


def test_an_untouched_adapter_passes_the_files_check(adapter: Path) -> None:
    assert check_files(manifest_of(adapter), adapter).passed


def _zero(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "adapter_model.safetensors")


def _change_manifest(**values: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "manifest.json", read_json(folder / "manifest.json") | values)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_zero, "not those of its digest"),
        (lambda folder: write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | {"lora_alpha": 8}), "not those of its digest"),
        (_change_manifest(digest="0" * 64), "not those of its digest"),
        (_change_manifest(served_base_digest="0" * 64), "not those of its digest"),
        (_change_manifest(name="other"), "is of other@"),
        (_change_manifest(rank=4), "rank is 4"),
        (_change_manifest(base="another"), "base is another"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"pickle"), "adapter_model.bin"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
)
def test_a_damaged_adapter_fails_the_files_check(adapter: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(adapter)
    check = check_files(manifest_of(adapter), adapter)
    assert not check.passed and check.value >= 1
    assert named in check.detail


def test_a_zeroed_copy_under_its_own_digest_is_no_fault_of_files(adapter: Path) -> None:
    """What the log-probabilities are for."""
    _zero(adapter)
    digest = adapter_digest(adapter, "b" * 64)
    _change_manifest(digest=digest)(adapter)
    moved = adapter.rename(adapter.with_name(digest))
    assert verify_adapter(moved).digest == digest
    assert check_files(manifest_of(moved), moved).passed


def test_weights_that_are_not_there_are_missed(tmp_path: Path) -> None:
    workspace = create_workspace(str(tmp_path / "workspace"))
    with pytest.raises(NotFoundError, match="bbbbbbbbbbbb"):
        find_weights(workspace, "b" * 64)


# ── the reference ──


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_shared_prefix_is_the_longest_common_one(first: list[int], second: list[int]) -> None:
    shared = shared_prefix(first, second)
    assert first[:shared] == second[:shared]
    assert shared in (len(first), len(second)) or first[shared] != second[shared]


@pytest.fixture(scope="module")
def small_model() -> Iterator[Any]:
    """A random Llama of two layers, with a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for more
    yield get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    torch.set_num_threads(threads)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=6), st.data())
def test_scores_with_shared_prefixes_are_those_of_whole_rows(small_model: Any, sequences: list[list[int]], data: st.DataObject) -> None:
    scorer = Scorer(small_model)
    for ids in sequences:
        completion = data.draw(st.integers(1, len(ids) - 1))
        with torch.no_grad():
            whole = small_model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(whole[index - 1, ids[index]]) for index in range(completion, len(ids))]
        assert scorer.logprobs(Encoded(ids, completion)) == pytest.approx(expected, abs=1e-5)


def test_the_reference_without_the_adapter_is_the_base(small_model: Any) -> None:
    row = Encoded([1, 2, 3, 4], 2)
    adapted = Scorer(small_model).logprobs(row)
    with small_model.disable_adapter():
        base = Scorer(small_model).logprobs(row)
    assert np.abs(adapted - base).mean() > 1e-3


# ── HTTP ──


@contextmanager
def answering(replies: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A local server of fixed (status, JSON or bytes) by path; yields its base URL and the requests it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            requests.append({"path": self.path, "body": json.loads(self.rfile.read(length) or "null")})
            status, reply = replies[self.path]
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
        http.shutdown()
        thread.join()


MODELS = {"/v1/models": (200, {"data": [{"id": "base", "root": "/b", "max_model_len": 99}, {"id": "a@1", "root": "/a", "parent": "base"}]})}


def completions(logprobs: list[float]) -> tuple[int, Any]:
    entries: list[Any] = [None, *({str(10 + index): {"logprob": value, "rank": 1}} for index, value in enumerate(logprobs, 1))]
    return 200, {"choices": [{"prompt_logprobs": entries}]}


def test_the_server_is_asked_for_tokens_and_logprobs_of_the_adapter() -> None:
    replies = MODELS | {"/tokenize": (200, {"tokens": [1, 2]}), "/v1/completions": completions([-1.0, -2.0, -3.0])}
    with answering(replies) as (url, requests), Server(url, "base", "a@1") as server:
        assert server.max_tokens == 99
        assert server.tokenize([Message(role="user", content="Hi")]) == [1, 2]
        assert server.logprobs("a@1", Encoded([10, 11, 12, 13], 2)).tolist() == [-2.0, -3.0]
    assert requests[1] == {"path": "/tokenize", "body": {"model": "a@1", "messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}}
    assert requests[2]["body"] | {"prompt": [10, 11, 12, 13], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0} == requests[2]["body"]


def test_an_adapter_that_is_not_served_is_an_engine_error() -> None:
    with answering(MODELS) as (url, _), pytest.raises(EngineError, match="does not serve b@2"):
        Server(url, "base", "b@2")


@pytest.mark.parametrize("reply", [(500, {"error": "out of memory"}), (200, b"<html>"), completions([float("-inf"), -1.0, -1.0])])
def test_what_the_engine_cannot_answer_is_an_engine_error(reply: tuple[int, Any]) -> None:
    replies = MODELS | {"/v1/completions": reply}
    with answering(replies) as (url, _), Server(url, "base", "a@1") as server, pytest.raises(EngineError):
        server.logprobs("a@1", Encoded([10, 11, 12, 13], 1))


def test_no_engine_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="broke off"):
        Server("http://127.0.0.1:9/v1", "base", "a@1")


def test_checks_say_undecided_apart_from_failed() -> None:
    [first, *_] = weigh(distances_of(0.4, 0.02, 0.02, 0.4))
    assert first.to_json()["status"] == "fail"
    assert replace(first, undecided=True).to_json()["status"] == "undecided"
