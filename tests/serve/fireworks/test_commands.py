"""The whole hosted path by its commands: rows go there, an adapter comes back and is registered; and a killed command is gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE as PACKAGED
from tests.conftest import MODELS
from tests.serve.fireworks.server import BASE, HOME, KEY, FireworksServer, Handler
from understudy.adapters import find_adapter
from understudy.cli import main
from understudy.files import write_json
from understudy.models import CARD, weights_digest
from understudy.workspace import Workspace, create_workspace, open_workspace

LAST = "assistant"


@pytest.fixture
def workspace(server: FireworksServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    hosted = f"{{account: acme, url: '{server.url}', base_model: {BASE}, poll_seconds: 0.01, wait_seconds: 20}}"
    made = create_workspace(str(tmp_path / "workspace"), f"models: {{base: {PACKAGED}}}\nfireworks: {hosted}\n")
    made.models.mkdir()
    (made.models / PACKAGED).symlink_to(MODELS / PACKAGED)
    return made


@pytest.fixture
def trained_there(server: FireworksServer, workspace: Workspace, tmp_path: Path) -> None:
    """What training there makes: a LoRA, as PEFT writes one, on `little`, a model of one layer that is here too."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder, adapter = workspace.models / "little", tmp_path / "adapter"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, **heads))
    base.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODELS / PACKAGED / name, folder / name)
    write_json(folder / CARD, {"id": "little", "origin": "test", "weights_digest": weights_digest(folder)})
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "/mnt/somewhere/there"
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    server.files = {each.name: each.read_bytes() for each in adapter.iterdir() if each.is_file()} | {"training_args.bin": b"\x80\x04."}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of conversations."""
    path = tmp_path / "rows.jsonl"
    lines = [[{"role": "user", "content": f"Who signs form {i}?"}, {"role": LAST, "content": f"The keeper of form {i}."}] for i in range(12)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


@pytest.fixture
def run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Run a command; its exit code and JSON. No output holds the key."""

    def call(*words: str) -> tuple[int, Any]:
        code = main(["--workspace", str(workspace.root), "fireworks", *words, "--json"])
        printed = capsys.readouterr()
        assert KEY not in printed.out + printed.err
        return code, json.loads(printed.out)

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("trained_there")
def test_rows_go_there_and_an_adapter_comes_back(run: Callable[..., tuple[int, Any]], server: FireworksServer, workspace: Workspace, rows: Path) -> None:
    assert run("status") == (0, {"schema_version": 1, "resources": []})
    code, uploaded = run("upload", str(rows))
    assert (code, [each["rows"] for each in uploaded["uploads"]]) == (0, [12])
    code, trained = run("train", str(rows), "--name", "forms", "--rank", "4", "--epochs", "1")
    assert (code, trained["state"]) == (0, "COMPLETED")
    assert server.resources["supervisedFineTuningJobs"][trained["job"]]["loraRank"] == 4
    code, brought = run("download", "--base", "little")
    assert (code, brought["base"], brought["lineage"], brought["model"]) == (0, "little", "unknown", trained["model"])
    assert find_adapter(workspace, "forms")[0].served_name == brought["adapter"]
    assert run("download", "--base", "little")[1]["reused"] is True
    assert run("deploy")[1]["state"] == "READY"
    code, loaded = run("load-lora")
    assert (code, loaded["state"]) == (0, "DEPLOYED")
    assert loaded["remote"] == {
        "base_url": f"{server.url}/inference/v1",
        "model": f"{HOME}/models/{trained['model']}#{loaded['deployment']}",
        "api_key_env": "FIREWORKS_API_KEY",
    }
    assert {each["state"] for each in run("status")[1]["resources"]} == {"READY", "COMPLETED", "DEPLOYED"}
    code, deleted = run("delete", "all")
    assert (code, [each.split("/")[0] for each in deleted["deleted"]]) == (
        0,
        ["deployedModels", "deployments", "models", "supervisedFineTuningJobs", "datasets"],
    )
    assert not any(server.resources.values())


@pytest.mark.slow
@pytest.mark.usefixtures("trained_there")
def test_a_built_dataset_is_named_in_the_lineage(run: Callable[..., tuple[int, Any]], workspace: Workspace, rows: Path) -> None:
    from train.chat_file import import_chat_file

    folder = import_chat_file(workspace, rows)
    code, uploaded = run("upload", folder.name[:12])
    assert (code, uploaded["dataset"], [each["split"] for each in uploaded["uploads"]]) == (0, folder.name, ["train"])
    code, trained = run("train", folder.name[:12], "--rank", "4")
    assert (code, trained["dataset"]) == (0, folder.name)
    assert run("download", "--base", "little", "--name", "ours")[1]["lineage"] == "stated"
    assert find_adapter(open_workspace(str(workspace.root)), "ours")[0].dataset_digest == folder.name


def test_a_dry_run_sends_nothing(run: Callable[..., tuple[int, Any]], server: FireworksServer, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY")  # nor needs it the key
    for words in (["upload", str(rows)], ["train", str(rows)], ["deploy"], ["deploy", "--merged"], ["load-lora"], ["download"]):
        code, shown = run(*words, "--dry-run")
        assert code == 0
        assert all(each["headers"] == {"Authorization": "Bearer [redacted]"} for each in shown["requests"])
        assert all(each["url"].startswith(f"{server.url}/v1/{HOME}/") for each in shown["requests"])
    assert run("delete", "all", "--dry-run")[1]["requests"] == []
    assert server.asked == []


def test_what_is_shown_is_what_is_sent(run: Callable[..., tuple[int, Any]], server: FireworksServer, rows: Path) -> None:
    shown = [f"{each['method']} {each['url'].removeprefix(server.url)}" for each in run("upload", str(rows), "--dry-run")[1]["requests"]]
    run("upload", str(rows))
    assert server.asked[: len(shown)] == shown


def test_a_dataset_with_faults_is_not_sent(run: Callable[..., tuple[int, Any]], server: FireworksServer, rows: Path) -> None:
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "And?"}]}\n')
    code, said = run("upload", str(rows))
    assert (code, said["error"]["code"]) == (3, "gate")
    assert "rows.jsonl row 13" in said["error"]["message"]
    assert server.asked == []


@pytest.mark.parametrize("words", [["upload"], ["train"], ["status"], ["deploy"], ["load-lora"], ["download"], ["delete", "all"]], ids=lambda words: words[0])
def test_offline_refuses_all_of_it(run: Callable[..., tuple[int, Any]], server: FireworksServer, workspace: Workspace, rows: Path, words: list[str]) -> None:
    settings = (workspace.root / "understudy.yaml").read_text()
    (workspace.root / "understudy.yaml").write_text(settings + "offline: true\n")
    code, said = run(*words, *([str(rows)] if words[0] in ("upload", "train") else []))
    assert (code, "offline" in said["error"]["message"]) == (2, True)
    assert server.asked == []


def test_a_model_that_is_nowhere_else_is_kept(run: Callable[..., tuple[int, Any]], server: FireworksServer, rows: Path) -> None:
    run("upload", str(rows))
    model = run("train", str(rows), "--rank", "4")[1]["model"]
    code, said = run("delete", f"models/{model}")
    assert (code, "is nowhere else" in said["error"]["message"]) == (2, True)
    assert run("delete", f"models/{model}", "--force")[0] == 0
    assert not server.resources["models"]


@pytest.mark.parametrize("name", ["Forms", "base", "a" * 49])
def test_an_adapter_has_a_name_that_it_can_have_here(run: Callable[..., tuple[int, Any]], server: FireworksServer, rows: Path, name: str) -> None:
    assert run("train", str(rows), "--name", name)[0] == 2
    assert server.asked == []


def killed(workspace: Workspace, words: list[str], reached: threading.Event) -> None:
    """Start a command, and kill it once it has come to a point."""
    process = subprocess.Popen([sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "fireworks", *words], stderr=subprocess.DEVNULL)
    assert reached.wait(300), "the command never came to that point"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_upload(run: Callable[..., tuple[int, Any]], server: FireworksServer, workspace: Workspace, rows: Path) -> None:
    reached = threading.Event()

    def stall(handler: Handler) -> bool:
        handler.rfile.read(1000)
        reached.set()
        time.sleep(2)
        handler.reset()
        return True

    server.faults = [("POST .*:upload", stall)]
    killed(workspace, ["upload", str(rows)], reached)
    assert server.sent == []
    assert [each["state"] for each in run("status")[1]["resources"]] == ["UPLOADING"]
    assert run("upload", str(rows))[1]["uploads"][0]["state"] == "READY"
    assert (len(server.made), len(server.sent)) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["POST .*Jobs", "GET .*Jobs/"], ids=["begun", "polling"])
def test_kill_9_in_the_middle_of_a_run(run: Callable[..., tuple[int, Any]], server: FireworksServer, workspace: Workspace, rows: Path, place: str) -> None:
    """The job is begun, and the command ends before its answer is read; or while it waits."""
    reached = threading.Event()
    run("upload", str(rows))
    server.job_steps = [{"state": "JOB_STATE_RUNNING"}] * 10_000

    def hold(handler: Handler) -> bool:
        def send(*_args: Any, **_headers: str) -> None:
            reached.set()
            time.sleep(2)
            handler.reset()

        handler.send = send  # type: ignore[method-assign]
        handler.answer()
        return True

    server.faults = [(place, (lambda _: False) if "GET" in place else hold), *([(place, lambda _: False)] * 3), (place, hold)]
    killed(workspace, ["train", str(rows), "--rank", "4"], reached)
    server.faults = []
    job = next(iter(server.coming.keys() & {each for each in server.made if "Job" in each}))
    server.coming[job] = [{"state": "JOB_STATE_COMPLETED"}]
    assert run("train", str(rows), "--rank", "4")[1]["state"] == "COMPLETED"
    assert [each for each in server.made if "Job" in each] == [job]
