"""Settings: layers, faults all at once, nearest names."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.recipe import FOLDER, load_recipe
from understudy.config import load_config
from understudy.errors import UsageError
from understudy.store import open_store
from understudy.store.urls import shown_url


def test_later_layers_win_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "understudy.yaml").write_text("retrieval:\n  k: 5\n  candidates: 30\n")
    monkeypatch.setenv("UNDERSTUDY_RETRIEVAL__CANDIDATES", "40")
    config, origins = load_config(tmp_path, ["retrieval.rrf_k=10"])
    assert (config.retrieval.k, config.retrieval.candidates, config.retrieval.rrf_k) == (5, 40, 10)
    assert origins == {"retrieval.k": "understudy.yaml", "retrieval.candidates": "environment", "retrieval.rrf_k": "command line"}


def test_every_fault_is_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "understudy.yaml").write_text("retrieval:\n  kandidates: 3\n  k: 0\n")
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path)
    assert "did you mean retrieval.candidates?" in caught.value.message
    assert "retrieval.k" in caught.value.message


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list\n"])
def test_a_broken_file_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "understudy.yaml").write_text(text)
    with pytest.raises(UsageError):
        load_config(tmp_path)


def test_every_shipped_recipe_loads() -> None:
    names = [path.stem for path in FOLDER.glob("*.yaml")]
    assert len(names) >= 3
    for name in names:
        assert load_recipe(name, []).rank >= 1


def test_recipe_faults_come_together() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("default", ["rnk=4", "epochs=0", "name=base"])
    assert "did you mean rank?" in caught.value.message
    assert "epochs" in caught.value.message
    assert "reserved" in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://me:hunter2@host/db",
        "mongodb+srv://me:hunter2@host/db",
        "mongodb://host/db?tlsCertificateKeyFilePassword=hunter2",
        "mongodb://me@host/db",
        "mongodb://me:x/hunter2@host/db",
        "mongodb://me:x?hunter2@host/db",
        "mongodb://me:x@hunter2@host/db",
        "mongodb://host/?authMechanismProperties=A:x@hunter2",
    ],
)
def test_a_password_comes_from_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for file, overrides in ((f"store: {url}\n", []), ("", [f"store={url}"])):
        (tmp_path / "understudy.yaml").write_text(file)
        with pytest.raises(UsageError, match="environment only") as caught:
            load_config(tmp_path, overrides)
        assert "hunter2" not in caught.value.message + caught.value.remedy
    (tmp_path / "understudy.yaml").write_text("store: mongodb://host/db\n")
    monkeypatch.setenv("UNDERSTUDY_STORE", url)
    assert load_config(tmp_path)[0].store == url
    assert "hunter2" not in shown_url(url)


def test_a_url_without_secrets_is_shown_with_its_place() -> None:
    assert shown_url("mongodb://me:x@a.example:27017,b.example/db?replicaSet=r") == "mongodb://***@a.example:27017,b.example/db"
    assert shown_url("mongodb://[::1]:27017/") == "mongodb://[::1]:27017/"
    assert shown_url("sqlite:///some@place.db") == "sqlite:///some@place.db"


def test_a_store_in_a_variable_is_named_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "understudy.yaml").write_text("store: env:OUR_STORE\n")
    config, _ = load_config(tmp_path)
    assert shown_url(config.store) == "env:OUR_STORE"
    with pytest.raises(UsageError, match="OUR_STORE is not set"):
        open_store(config.store, tmp_path)
    monkeypatch.setenv("OUR_STORE", "sqlite:///elsewhere.db")
    open_store(config.store, tmp_path).close()
    assert (tmp_path / "elsewhere.db").is_file()
