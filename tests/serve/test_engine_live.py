"""Real vLLM: one engine, started by `run_serve` in a process of its own, used by every test, and killed with -9 by the last."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from serve.arguments import ServedAdapter
from serve.command import engine_for, log_path, run_serve
from serve.engine import load_adapter, plan_engine, served_models, start_engine, unload_adapter
from serve.load import measure
from serve.supervise import free_port, require_free_port
from tests.conftest import BASE, SERVE, SERVED_BASE, Served, register_random_adapter
from tests.processes import session_of
from tests.serve.doors import WIRING
from understudy.chat import encode_prompt
from understudy.engines import find_engine
from understudy.errors import AdapterError, EngineError
from understudy.models import weights_digest
from understudy.records import Message
from understudy.workspace import Workspace, create_workspace

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = [Message(role="user", content="What is the capital of France?")]


@pytest.fixture
def served(engine_session: Served) -> Served:
    """The session's engine."""
    return engine_session


def post(url: str, route: str, **body: object) -> Any:
    answer = httpx.post(f"{url}{route}", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


def prompt_logprobs(url: str, model: str, ids: list[int]) -> torch.Tensor:
    """Log-probability of each id after the first, as the engine scores it."""
    answer = post(url, "/completions", model=model, prompt=ids, max_tokens=1, temperature=0, prompt_logprobs=0)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)])


def local_logprobs(workspace: Workspace, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """The same by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(workspace.models / SERVED_BASE, dtype=torch.bfloat16)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        scores: torch.Tensor = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def story(workspace: Workspace, words: int, seed: int = 0) -> list[int]:
    """Token ids of a text that no other test uses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace.models / SERVED_BASE)
    vocabulary = re.findall(r"[a-z]{3,}", str(json.__doc__))
    text = " ".join(random.Random(seed).choices(vocabulary, k=words))
    return encode_prompt(tokenizer, [Message(role="user", content=text)])


def test_the_engine_is_announced_with_all_it_serves(served: Served) -> None:
    announced = json.loads(served.workspace.engine_file.read_text())
    assert announced["models"][:2] == [BASE, served.adapter] == served.running.models[:2]
    assert announced["base_digest"] == weights_digest(served.workspace.models / SERVED_BASE)
    assert announced["url"] == plan_engine(served.workspace).url
    assert "GroupedPunicaWrapper" in log_path(served.workspace).read_text()


def test_the_base_answers(served: Served) -> None:
    messages = [message.model_dump() for message in PROMPT]
    answer = post(served.running.url, "/chat/completions", model=BASE, messages=messages, max_tokens=16, temperature=0, logprobs=True, top_logprobs=20)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 20


def test_what_is_served_is_the_adapter_as_peft_computes_it(served: Served) -> None:
    ids = story(served.workspace, 120)
    [adapter] = [each for each in plan_engine(served.workspace).adapters if each.name == served.adapter]
    base, adapted = local_logprobs(served.workspace, None, ids), local_logprobs(served.workspace, adapter.path, ids)
    served_base, served_adapted = (prompt_logprobs(served.running.url, name, ids) for name in (BASE, served.adapter))
    apart = (base - adapted).abs().mean()
    assert apart > 0.5  # otherwise the comparison says nothing
    assert (served_base - base).abs().mean() < apart / 5
    assert (served_adapted - adapted).abs().mean() < apart / 5


def test_base_and_adapter_do_not_leak_into_each_other_in_one_batch(served: Served) -> None:
    """Both slots full, and base rows among them: the case that the stock wrapper gets wrong."""
    second = register_random_adapter(served.workspace, "second", rank=4, seed=2)
    [adapter] = [each for each in plan_engine(served.workspace).adapters if each.name == second]
    load_adapter(served.running.url, adapter)
    texts = [story(served.workspace, 60, seed) for seed in (1, 2, 3)]
    names = (BASE, served.adapter, second)
    alone = {(name, index): prompt_logprobs(served.running.url, name, ids) for name in names for index, ids in enumerate(texts)}
    with ThreadPoolExecutor(9) as pool:
        together = {key: pool.submit(prompt_logprobs, served.running.url, key[0], texts[key[1]]) for key in alone}
    apart = min((alone[a, 0] - alone[b, 0]).abs().mean() for a, b in ((BASE, served.adapter), (BASE, second), (served.adapter, second)))
    assert apart > 0.5
    for key, scores in alone.items():
        assert (together[key].result() - scores).abs().mean() < apart / 5, key


def test_a_second_identical_prompt_is_read_from_the_cache(served: Served) -> None:
    ids = story(served.workspace, 400, seed=9)
    for name in (BASE, served.adapter):
        first, second = (post(served.running.url, "/completions", model=name, prompt=ids, max_tokens=1, temperature=0)["usage"] for _ in range(2))
        assert (first["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"] == 0
        assert second["prompt_tokens_details"]["cached_tokens"] > len(ids) // 2


def test_loading_what_is_not_an_adapter_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing@000000000000"):
        load_adapter(served.running.url, ServedAdapter("nothing@000000000000", tmp_path, 8))
    assert "nothing@000000000000" not in served_models(served.running.url)


def test_an_adapter_above_the_engines_rank_is_refused(served: Served) -> None:
    wide = register_random_adapter(served.workspace, "wide", rank=64, seed=5)
    [adapter] = [each for each in plan_engine(served.workspace).adapters if each.name == wide]
    try:
        with pytest.raises(AdapterError, match="rank 64") as caught:
            load_adapter(served.running.url, adapter)
        assert "serve.max_lora_rank" in caught.value.remedy and wide not in served_models(served.running.url)
    finally:
        shutil.rmtree(adapter.path.parent)  # the engine's next start would make room for it


def test_an_adapter_is_never_replaced_under_its_name(served: Served, tmp_path: Path) -> None:
    [adapter] = [each for each in plan_engine(served.workspace).adapters if each.name == served.adapter]
    load_adapter(served.running.url, adapter)  # there already: nothing to do
    copy = tmp_path / "copy"
    shutil.copytree(adapter.path, copy)
    with pytest.raises(AdapterError, match="lists"):
        load_adapter(served.running.url, replace(adapter, path=copy))


def test_a_command_borrows_the_running_engine_and_brings_new_adapters(served: Served) -> None:
    third = register_random_adapter(served.workspace, "third", rank=8, seed=3)
    with engine_for(served.workspace, lambda stage: pytest.fail(f"started another engine: {stage}")) as engine:
        assert engine.pid == served.running.pid
        assert third in engine.models
        answer = post(engine.url, "/completions", model=third, prompt="The", max_tokens=2)
        assert answer["model"] == third
    assert find_engine(served.workspace) is not None  # borrowed, not stopped


def test_adapters_come_and_go_while_the_engine_answers(served: Served) -> None:
    fourth = register_random_adapter(served.workspace, "fourth", rank=8, seed=4)
    [adapter] = [each for each in plan_engine(served.workspace).adapters if each.name == fourth]
    prompts = [[Message(role="user", content=f"Say {number}.")] for number in range(12)]
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(measure, served.running.url, [BASE, served.adapter], prompts, 4)
        for _ in range(3):
            load_adapter(served.running.url, adapter)
            assert fourth in served_models(served.running.url)
            unload_adapter(served.running.url, fourth)
            assert fourth not in served_models(served.running.url)
        assert load.result().faults == []
    with pytest.raises(AdapterError, match="keeps"):
        unload_adapter(served.running.url, fourth)
    shutil.rmtree(adapter.path.parent)


def test_the_engine_here_is_an_engine_elsewhere_to_another_workspace(served: Served, tmp_path: Path) -> None:
    """What the probe makes of a real vLLM."""
    other = create_workspace(str(tmp_path / "other"), f"serve: {{url: '{served.running.url}'}}\n")
    with engine_for(other, lambda stage: pytest.fail(f"started an engine: {stage}")) as engine:
        able = engine.capabilities
    assert able is not None and able.kind == "vllm" and able.version.startswith("0.32")
    assert able.can_prove and able.logprobs and able.structured_output and able.lists_adapters and able.loads_adapters
    assert not able.tools  # no parser is named
    assert served.adapter in engine.models and engine.base == BASE


def test_a_second_server_for_the_workspace_is_refused(served: Served) -> None:
    with pytest.raises(EngineError, match=served.running.url):
        run_serve(served.workspace, WIRING, lambda *_: None)


def test_a_taken_port_is_refused_before_anything_starts(served: Served, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=str(plan_engine(served.workspace).port)) as caught:
        start_engine(plan_engine(served.workspace), tmp_path / "engine.log", print)
    assert "serve.port=" in caught.value.remedy


def test_an_engine_that_cannot_start_says_why(served: Served, tmp_path: Path) -> None:
    settings = served.workspace.config.serve.model_copy(update={"max_model_len": 10_000_000})
    spec = replace(plan_engine(served.workspace, free_port("127.0.0.1")), settings=settings)
    with pytest.raises(EngineError, match="max_model_len") as caught:
        start_engine(spec, tmp_path / "engine.log", print, tmp_path / "engine.json")
    assert str(tmp_path / "engine.log") in caught.value.message
    assert not (tmp_path / "engine.json").exists()


def test_ctrl_c_ends_a_start_cleanly(served: Served, tmp_path: Path) -> None:
    other = create_workspace(str(tmp_path / "other"), f"serve: {{port: {free_port('127.0.0.1')}}}\ngateway: {{port: {free_port('127.0.0.1')}}}\n")
    other.models.symlink_to(served.workspace.models)
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(other.root)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (log_path(other).exists() and log_path(other).stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    [guardian] = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said.endswith("stopped\n")
    assert session_of(guardian) == {}
    assert not other.engine_file.exists()


@pytest.mark.ends_engine
def test_kill_minus_nine_of_our_process_takes_the_engine_along(served: Served) -> None:
    """Last: it ends the session's engine."""
    before = session_of(served.running.pid)
    assert len(before) >= 3, before  # guardian, API server, engine core
    served.process.send_signal(signal.SIGKILL)
    served.process.wait()
    began = time.monotonic()
    while session_of(served.running.pid) and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert session_of(served.running.pid) == {}
    assert find_engine(served.workspace) is None  # the announcement is stale, and known to be
    require_free_port("127.0.0.1", plan_engine(served.workspace).port)
    left = [path.name for path in Path("/dev/shm").iterdir() if any(f"_{pid}_" in path.name or f"-{pid}-" in path.name for pid in before)]
    assert not left
