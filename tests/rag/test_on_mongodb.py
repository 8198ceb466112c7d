"""The commands as a user runs them, with the records in MongoDB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MODELS
from understudy.cli import main


def test_a_corpus_in_mongodb_is_ingested_updated_and_searched(
    mongodb_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNDERSTUDY_STORE", mongodb_url)

    def understudy(*arguments: str) -> dict[str, Any]:
        assert main(["--workspace", str(tmp_path / "w"), "--json", *arguments]) in (0, 1)
        return dict(json.loads(capsys.readouterr().out))

    understudy("init")
    (tmp_path / "w" / "models").symlink_to(MODELS)
    kiln, barn = tmp_path / "kiln.txt", tmp_path / "barn.txt"
    kiln.write_text("The kiln is fired on Tuesdays at seven in the morning.")
    barn.write_text("The barn was painted green in the spring of that year.")
    assert understudy("ingest", str(kiln), str(barn))["documents"]["added"] == 2
    kiln.write_text("The kiln is fired on Mondays at noon.")
    done = understudy("ingest", str(kiln), str(barn))["documents"]
    assert (done["updated"], done["unchanged"]) == (1, 1)
    found = understudy("search", "When is the kiln fired?", "-k", "2")["passages"]
    assert [("Mondays" in p["text"], "Tuesdays" in p["text"]) for p in found] == [(True, False), (False, False)]
    checks = {check["name"]: check for check in understudy("doctor")["checks"]}
    assert checks["store"]["status"] == "ok"
    assert "local index" in checks["search"]["detail"]


def test_doctor_says_that_the_server_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workspace", str(tmp_path / "w"), "init"]) == 0
    monkeypatch.setenv("UNDERSTUDY_STORE", "mongodb://me:hunter2@127.0.0.1:9/db?serverSelectionTimeoutMS=50")
    assert main(["--workspace", str(tmp_path / "w"), "doctor"]) == 1
    shown = capsys.readouterr()
    assert "FAIL store: mongodb://***@127.0.0.1:9/db: no answer" in shown.out
    assert "hunter2" not in shown.out + shown.err
