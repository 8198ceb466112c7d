"""The command line as a user meets it: real processes, exit codes, one-line causes and remedies."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MODELS
from understudy.cli import _speak_any_language, main
from understudy.workspace import Workspace, create_workspace


def understudy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "understudy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, understudy.cli as c; c.build_parser().format_help(); print([m for m in ('torch', 'pydantic', 'vllm', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_terminal_without_our_signs_gets_question_marks_and_json_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    for as_json, said in ((False, b"?"), (True, "−".encode())):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
        _speak_any_language(as_json)
        print("−", end="")
        assert written.getvalue() == said


def test_commands_without_a_workspace_say_how_to_make_one(tmp_path: Path) -> None:
    done = understudy("--workspace", str(tmp_path / "none"), "documents", "ls")
    assert done.returncode == 1
    assert "is not a workspace" in done.stderr
    assert "init" in done.stderr


def test_wrong_usage_is_2(tmp_path: Path) -> None:
    assert understudy("frobnicate").returncode == 2
    root = str(tmp_path / "w")
    assert understudy("--workspace", root, "init").returncode == 0
    done = understudy("--workspace", root, "documents", "ls", "--set", "retreival.k=2")
    assert done.returncode == 2
    assert "did you mean retrieval.k?" in done.stderr


def test_errors_are_json_where_json_is_asked_for(tmp_path: Path) -> None:
    root = str(tmp_path / "w")
    understudy("--workspace", root, "init")
    done = understudy("--workspace", root, "ingest", "missing.pdf", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["search", "words"], "empty"),
        (["ask", "anything?"], "empty"),
        (["dataset", "build"], "no expert traces"),
        (["train"], "no dataset"),
        (["prove", "nobody"], "no adapter nobody"),
        (["evaluate", "--questions", "missing.jsonl"], "does not exist"),
        (["traces", "import", "missing.jsonl"], "does not exist"),
        (["traces", "show", "abc"], "no single trace"),
        (["train", "no-such-recipe"], "no recipe"),
        (["models", "add", "no-such-model"], "no model"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], cause: str) -> None:
    create_workspace(str(tmp_path))
    (tmp_path / "models").symlink_to(MODELS)
    assert main(["--workspace", str(tmp_path), *arguments]) == 1
    said = capsys.readouterr().err
    assert cause in said and "→" in said and "Traceback" not in said


def test_a_missing_model_names_the_command_that_adds_it(tmp_path: Path) -> None:
    root = str(tmp_path / "w")
    understudy("--workspace", root, "init")
    (tmp_path / "a.txt").write_text("some words")
    done = understudy("--workspace", root, "ingest", str(tmp_path / "a.txt"))
    assert done.returncode == 1
    assert "models add all-minilm-l6-v2" in done.stderr


def test_asking_without_a_server_says_how_to_start_one(notes_workspace: Workspace) -> None:
    done = understudy("--workspace", str(notes_workspace.root), "ask", "When is the kiln fired?")
    assert done.returncode == 1
    assert "no server is running" in done.stderr
    assert "serve" in done.stderr


def test_the_command_reference_is_what_the_table_says() -> None:
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, str(root / "scripts" / "reference.py"), "--check"], capture_output=True).returncode == 0
