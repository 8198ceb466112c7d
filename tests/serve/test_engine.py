"""The engine without vLLM: its template, what it serves, its guardian, and the grouped LoRA arithmetic."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.arguments import build_command
from serve.cpu_lora import add_low_rank, group_rows, pack
from serve.engine import registered_adapters, served_base, start_engine, with_closed_template
from serve.supervise import Engine, died, find_cause, free_port, spawn, wait_until_healthy
from tests.processes import session_of
from tests.serve.test_arguments import make_spec, option
from tests.understudy.test_chat import CHATML, HYBRID, R1, make_tokenizer
from understudy.adapters import AdapterManifest
from understudy.chat import closed_template, template_digest
from understudy.config import Config
from understudy.digests import digest_of
from understudy.errors import AdapterError, EngineError, NotFoundError
from understudy.files import write_json
from understudy.workspace import Workspace

# ---- the chat template


def save_tokenizer(folder: Path, template: str) -> Path:
    """A model folder with nothing but a tokenizer."""
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_engine_of_a_reasoning_model_is_started_with_the_template_of_training(tmp_path: Path) -> None:
    spec, file = make_spec(base_path=save_tokenizer(tmp_path / "r1", R1)), tmp_path / "logs" / "chat_template.jinja"
    closed = with_closed_template(spec, file)
    assert closed == replace(spec, chat_template=file)
    assert option(build_command(closed), "--chat-template") == str(file)
    text = file.read_text(encoding="utf-8")
    assert text == closed_template(make_tokenizer(R1))
    assert digest_of(text) == template_digest(make_tokenizer(R1))  # what the adapter's manifest and the proof compare


@pytest.mark.parametrize("template", [CHATML, HYBRID])
def test_an_engine_of_any_other_model_takes_its_own_template(tmp_path: Path, template: str) -> None:
    spec = make_spec(base_path=save_tokenizer(tmp_path / "model", template))
    assert with_closed_template(spec, tmp_path / "file.jinja") is spec
    assert "--chat-template" not in build_command(spec)
    assert not (tmp_path / "file.jinja").exists()


def test_the_template_is_written_beside_the_log_before_the_engine_starts(tmp_path: Path) -> None:
    base = save_tokenizer(tmp_path / "r1", R1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(EngineError, match="cannot listen"):
            start_engine(make_spec(base_path=base, port=listener.getsockname()[1]), tmp_path / "logs" / "engine.log", print)
    assert (tmp_path / "logs" / "chat_template.jinja").read_text(encoding="utf-8") == closed_template(make_tokenizer(R1))


def test_a_template_that_cannot_be_rendered_ends_the_start_with_a_cause(tmp_path: Path) -> None:
    base = save_tokenizer(tmp_path / "broken", "{{ raise_exception('no thinking today') }}")
    with pytest.raises(EngineError, match="no thinking today"):
        with_closed_template(make_spec(base_path=base), tmp_path / "file.jinja")


# ---- what a workspace serves


def make_workspace(root: Path, base: str = "tiny") -> Workspace:
    return Workspace(root, Config.model_validate({"models": {"base": base}}), {})


def add_weights(workspace: Workspace, folder: str, base: str, digest: str) -> Path:
    path = workspace.models / folder
    path.mkdir(parents=True)
    write_json(path / "config.json", {})
    write_json(path / "understudy.json", {"id": base, "weights_digest": digest})
    return path


def add_manifest(workspace: Workspace, name: str, digest: str, created_at: float, served_on: str, base: str = "tiny") -> AdapterManifest:
    manifest = AdapterManifest(
        name=name, digest=digest * 64, base=base, base_digest="w" * 64, served_base_digest=served_on, quantisation="none",
        tokenizer_digest="", chat_template_digest="", prompt_version="", dataset_digest="", recipe={}, seed=0, rank=8, alpha=16,
        targets=[], packages={}, metrics={}, tenants=[], group_ids=[], question_digests=[], created_at=created_at,
    )  # fmt: skip
    write_json(workspace.adapters / name / manifest.digest / "manifest.json", manifest.model_dump())
    return manifest


def test_base_alone_is_served_as_it_is(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    folder = add_weights(workspace, "tiny", "tiny", "plain")
    assert served_base(workspace) == (folder, "tiny", "plain")


def test_newest_adapter_decides_which_weights_are_served(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    plain = add_weights(workspace, "tiny", "tiny", "plain")
    dequantised = add_weights(workspace, "tiny-nf4", "tiny", "nf4")
    add_manifest(workspace, "old", "1", 1.0, "plain")
    assert served_base(workspace) == (plain, "tiny", "plain")
    qlora = add_manifest(workspace, "new", "2", 2.0, "nf4")
    add_manifest(workspace, "other", "3", 3.0, "foreign", base="another-model")
    assert served_base(workspace) == (dequantised, "tiny", "nf4")
    assert [(each.name, each.path.name, each.rank) for each in registered_adapters(workspace, "nf4")] == [(qlora.served_name, qlora.digest, 8)]
    assert qlora.served_name == "new@" + "2" * 12


def test_missing_dequantised_weights_are_named(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    add_weights(workspace, "tiny", "tiny", "plain")
    add_manifest(workspace, "new", "2", 2.0, "gone")
    with pytest.raises(NotFoundError, match="new@222222222222"):
        served_base(workspace)


def test_adapters_being_written_are_not_served_and_broken_ones_are_named(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    manifest = add_manifest(workspace, "a", "1", 1.0, "plain")
    partial = workspace.adapters / "a" / ".2.partial"
    write_json(partial / "manifest.json", {})
    assert [each.name for each in registered_adapters(workspace, "plain")] == [manifest.served_name]
    write_json(workspace.adapters / "b" / "3" / "manifest.json", {"name": "b"})
    with pytest.raises(AdapterError, match=r"b/3/manifest\.json"):
        registered_adapters(workspace, "plain")


# ---- the guardian


LISTENER = textwrap.dedent("""
    import http.server, signal, subprocess, sys
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('grandchild', flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", stubborn])
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
    print("Application startup complete", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
""")


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while session_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not session_of(pid)


def start_listener(tmp_path: Path) -> tuple[Engine, str]:
    port = free_port("127.0.0.1")
    engine = spawn([sys.executable, "-c", LISTENER, str(port)], dict(os.environ), "127.0.0.1", port, tmp_path / "engine.log")
    return engine, f"http://127.0.0.1:{port}/v1"


def test_stop_leaves_nothing_even_of_a_grandchild_that_ignores_sigterm(tmp_path: Path) -> None:
    engine, url = start_listener(tmp_path)
    stages: list[str] = []
    with engine:
        wait_until_healthy(engine, url, 30, stages.append)
        deadline = time.monotonic() + 10
        while "grandchild" not in engine.log_file.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(session_of(engine.pid)) == 3  # guardian, child, grandchild
    assert session_of(engine.pid) == {}
    assert stages[0] == "starting vLLM"
    assert stages[-1].startswith("ready after")
    engine.stop()  # twice does no harm


def test_kill_minus_nine_of_the_parent_takes_everything_along(tmp_path: Path) -> None:
    code = "import os, sys, time; from pathlib import Path; from serve.supervise import spawn\n" \
        f"engine = spawn([sys.executable, '-c', {LISTENER!r}, sys.argv[1]], dict(os.environ), '127.0.0.1', int(sys.argv[1]), Path(sys.argv[2]))\n" \
        "print(engine.pid, flush=True); time.sleep(600)"  # fmt: skip
    port, log = free_port("127.0.0.1"), tmp_path / "engine.log"
    parent = subprocess.Popen([sys.executable, "-c", code, str(port), str(log)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while (not log.exists() or "grandchild" not in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(session_of(pid)) == 3
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until_gone(pid, 2.0)


def test_death_at_start_is_reported_at_once_with_its_cause_and_log(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    code = "import sys; print('(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1] ValueError: too little of everything'); sys.exit(3)"
    engine = spawn([sys.executable, "-c", code], dict(os.environ), "127.0.0.1", port, tmp_path / "engine.log")
    with engine, pytest.raises(EngineError, match="status 3: ValueError: too little of everything") as caught:
        wait_until_healthy(engine, f"http://127.0.0.1:{port}/v1", 60, lambda _stage: None)
    assert str(tmp_path / "engine.log") in caught.value.message


def test_engine_that_never_gets_healthy_times_out_with_the_setting_to_raise(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    engine = spawn([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), "127.0.0.1", port, tmp_path / "engine.log")
    with engine, pytest.raises(EngineError) as caught:
        wait_until_healthy(engine, f"http://127.0.0.1:{port}/v1", 0.5, lambda _stage: None)
    assert "serve.start_seconds" in caught.value.remedy
    assert session_of(engine.pid) == {}


def test_taken_port_is_named_with_a_remedy(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as vLLM does, which would let two engines share it
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(EngineError, match=str(port)) as caught:
            spawn(["true"], {}, "127.0.0.1", port, tmp_path / "engine.log")
    assert f"serve.port={port + 1}" in caught.value.remedy
    assert not (tmp_path / "engine.log").exists()


def test_cause_is_the_first_error_not_its_consequences() -> None:
    lines = [
        "(APIServer pid=1) WARNING 11-21 10:00:00 [x.py:1] An Error: of no consequence",
        "(Worker pid=3) ERROR 11-21 10:00:00 [multiproc_executor.py:900] Traceback (most recent call last):",
        "(Worker pid=3) ERROR 11-21 10:00:00 [multiproc_executor.py:900]     raise ValueError(",
        "(Worker pid=3) ERROR 11-21 10:00:00 [multiproc_executor.py:900] ValueError: Available memory is less than requested",
        "(EngineCore pid=2) Exception: WorkerProc initialization failed due to an exception. See stack trace for root cause.",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert find_cause("\n".join(lines)) == "ValueError: Available memory is less than requested"
    assert find_cause("usage: x\napi_server.py: error: unrecognized arguments: --nonsense\n") == "api_server.py: error: unrecognized arguments: --nonsense"
    assert find_cause("pydantic.ValidationError: 1 validation error for ModelConfig\n  Value error, too long").endswith("ModelConfig Value error, too long")
    assert find_cause("Killed\n\n") == "Killed"
    assert find_cause("") == "it wrote nothing"


def test_memory_shortage_gets_its_own_remedy(tmp_path: Path) -> None:
    with spawn([sys.executable, "-c", "raise ValueError('Available memory is less')"], {}, "127.0.0.1", free_port("127.0.0.1"), tmp_path / "log") as engine:
        engine.process.wait(10)
        assert "serve.kv_cache_gib" in died(engine).remedy


# ---- LoRA on the CPU


def dense_reference(y: torch.Tensor, x: torch.Tensor, slots: list[int], a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    """Row by row, slice by slice, in float64."""
    rows = []
    for row, slot in enumerate(slots):
        delta = torch.cat([x[row].double() @ down[slot, 0].double().T @ up[slot, 0].double().T for down, up in zip(a, b, strict=True)])
        rows.append(y[row].double() + (scale * delta if slot >= 0 else 0))
    return torch.stack(rows)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], float]:
    """A batch, the adapter of each of its rows (-1: none), and a layer's stacks with adapters of several ranks, some all zero."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    slots = draw(st.lists(st.integers(-1, 2), min_size=1, max_size=12))
    width, rank, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    used = [draw(st.integers(0, rank)) for _ in range(3)]
    a = tuple(torch.zeros(3, 1, rank, width) for _ in outputs)
    b = tuple(torch.zeros(3, 1, output, rank) for output in outputs)
    for down, up in zip(a, b, strict=True):
        for slot, real in enumerate(used):
            down[slot, 0, :real] = torch.randn(real, width)
            up[slot, 0, :, :real] = torch.randn(up.shape[2], real)
    return torch.randn(len(slots), sum(outputs)), torch.randn(len(slots), width), slots, a, b, draw(st.sampled_from([1.0, 0.5]))


@given(batches())
@settings(deadline=None, max_examples=200)
def test_grouped_lora_equals_the_dense_reference(
    batch: tuple[torch.Tensor, torch.Tensor, list[int], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], float],
) -> None:
    y, x, slots, a, b, scale = batch
    expected = dense_reference(y, x, slots, a, b, scale)
    for slot, rows in group_rows(torch.tensor(slots)):
        packed = pack(a, b, slot)
        if packed is not None:
            add_low_rank(y, x, rows, packed, scale)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_rows_stand_together_is_not_gathered() -> None:
    assert group_rows(torch.tensor([-1, 1, 1, 0])) == [(1, slice(1, 3)), (0, slice(3, 4))]
    [(slot, rows)] = group_rows(torch.tensor([2, -1, 2]))
    assert slot == 2
    assert isinstance(rows, torch.Tensor)
    assert rows.tolist() == [0, 2]
    assert group_rows(torch.tensor([-1, -1])) == []


def test_packing_drops_the_padding_of_ranks_and_layers_without_an_adapter() -> None:
    a, b = torch.zeros(2, 1, 16, 4), torch.zeros(2, 1, 6, 16)
    a[1, 0, :3], b[1, 0, :, :3] = 1.0, 1.0
    packed = pack((a,), (b,), 1)
    assert packed is not None
    assert packed.down.shape == (3, 4)
    assert packed.up.shape == (6, 3)
    assert pack((a,), (b,), 0) is None


def run_wrapper(kind: str, ids: list[int], slots: list[int | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's change by vLLM's own wrapper class or ours, and the dense reference; `ids` are adapter ids, 0 for the base."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from serve.punica import GroupedPunicaWrapper

    torch.manual_seed(0)
    outputs = (8, 4, 4)
    a = tuple(torch.randn(2, 1, 8, 16) for _ in outputs)
    b = tuple(torch.randn(2, 1, output, 8) for output in outputs)
    x, y = torch.randn(len(ids), 16), torch.zeros(len(ids), 16)
    wrapper = {"stock": PunicaWrapperCPU, "ours": GroupedPunicaWrapper}[kind](64, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), True), slots, 3, 100)
    wrapper.add_lora_linear(y, x, a, b, 1.0, outputs)
    return y.double(), dense_reference(torch.zeros(len(ids), 16), x, [slots.index(each) if each else -1 for each in ids], a, b, 1.0)


def test_base_rows_of_a_mixed_batch_stay_base_rows() -> None:
    """The stock wrapper gives them the adapter of the last slot (it indexes with -1); when it no longer does, say so in FACTS."""
    ids = [0, 0, 5, 5, 7, 0, 5]
    got, expected = run_wrapper("ours", ids, [5, 7])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    stock, _ = run_wrapper("stock", ids, [5, 7])
    torch.testing.assert_close(stock[2:5], expected[2:5], rtol=1e-4, atol=1e-4)
    assert stock[0].abs().max() > 1


def test_weights_written_into_a_slot_after_a_step_are_used() -> None:
    from vllm.lora.layers import LoRAMapping

    from serve.punica import GroupedPunicaWrapper

    wrapper = GroupedPunicaWrapper(64, 8, "cpu")
    wrapper.update_metadata(LoRAMapping((1, 1), (1, 1), True), [1], 2, 100)
    a, b, x = (torch.ones(1, 1, 2, 3),), (torch.ones(1, 1, 4, 2),), torch.ones(2, 3)
    first, second = torch.zeros(2, 4), torch.zeros(2, 4)
    wrapper.add_lora_linear(first, x, a, b, 1.0, (4,))
    b[0][0] = 0
    b[0][0, 0, :, :1].copy_(torch.full((4, 1), 5.0))
    wrapper.add_lora_linear(second, x, a, b, 1.0, (4,))
    assert first.flatten().tolist() == [6.0] * 8
    assert second.flatten().tolist() == [15.0] * 8
    a[0][0] = 0
    third = torch.zeros(2, 4)
    wrapper.add_lora_linear(third, x, a, b, 1.0, (4,))
    assert third.flatten().tolist() == [0.0] * 8


@pytest.mark.parametrize(("ids", "adapted"), [([5, 5], True), ([5, 7], False), ([5, 0], False), ([0, 0], False)])
def test_prompt_logprobs_under_an_adapted_language_head_never_end_the_engine(ids: list[int], adapted: bool) -> None:
    """They come as all rows of one request, whatever was sampled; whose they are is known only where one adapter has them all."""
    from vllm.lora.layers import LoRAMapping

    from serve.punica import GroupedPunicaWrapper

    wrapper = GroupedPunicaWrapper(64, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), True), [5, 7], 3, 100)
    y = torch.zeros(9, 4)
    wrapper.add_lora_logits(y, torch.ones(9, 3), torch.ones(2, 1, 2, 3), torch.ones(2, 1, 4, 2), 1.0)
    assert y.flatten().tolist() == [6.0 if adapted else 0.0] * 36


def test_the_language_head_takes_each_row_with_its_own_adapter() -> None:
    from vllm.lora.layers import LoRAMapping

    from serve.punica import GroupedPunicaWrapper

    wrapper = GroupedPunicaWrapper(64, 8, "cpu")
    wrapper.update_metadata(LoRAMapping((0, 7, 5), (0, 7, 5), True), [5, 7], 3, 100)
    y, b = torch.zeros(3, 4), torch.ones(2, 1, 6, 2)  # a vocabulary padded further than the model's
    b[1] *= 2
    wrapper.add_lora_logits(y, torch.ones(3, 3), torch.ones(2, 1, 2, 3), b, 1.0)
    assert y[:, 0].tolist() == [0.0, 12.0, 6.0]


def test_plugin_leaves_an_unknown_vllm_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from serve import cpu_lora, punica

    monkeypatch.setattr(logging.root.manager, "disable", 0)  # a command run before in this process has quietened it
    assert cpu_lora._wrapper_name("stock.Wrapper") == cpu_lora.WRAPPER
    monkeypatch.setitem(punica.KNOWN_PARAMETERS, "add_lora_linear", ["self", "something_else"])
    assert cpu_lora._wrapper_name("stock.Wrapper") == "stock.Wrapper"
    assert len(caplog.records) == 1
    assert "internals" in caplog.text
