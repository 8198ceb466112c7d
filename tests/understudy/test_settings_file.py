"""Settings changed in place: what was asked for changes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.cli import main
from understudy.errors import UsageError
from understudy.settings_file import set_values, with_value
from understudy.workspace import create_workspace

BLOCK = """# mine
models:
  base: tiny  # small
serve:
  # the engine
  port: 8300  # free here
  max_loras: 2

# the rest
tenant: legal
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "serve:\n  port: 1\n"),
        ("# only a comment", "# only a comment\nserve:\n  port: 1\n"),
        ("tenant: a", "tenant: a\nserve:\n  port: 1\n"),
        ("serve: {max_loras: 2}\n", "serve: {max_loras: 2, port: 1}\n"),
        ("serve: {}\ntenant: a\n", "serve: {port: 1}\ntenant: a\n"),
        ("serve:\ntenant: a\n", 'serve: {"port": 1}\ntenant: a\n'),
        (BLOCK, BLOCK.replace("8300", "1")),
        (
            BLOCK.replace("  port: 8300  # free here\n", ""),
            BLOCK.replace("  port: 8300  # free here\n", "").replace("max_loras: 2\n", "max_loras: 2\n  port: 1\n"),
        ),
    ],
)
def test_one_key_changes_and_comments_stay(before: str, after: str) -> None:
    assert with_value(before, "serve.port", 1) == after


def test_a_file_is_made_or_changed_whole(tmp_path: Path) -> None:
    path = tmp_path / "understudy.yaml"
    set_values(path, {"serve.max_num_seqs": 8, "serve.prefix_caching": False, "tenant": "ü"})
    assert yaml.safe_load(path.read_text()) == {"serve": {"max_num_seqs": 8, "prefix_caching": False}, "tenant": "ü"}


def test_settings_are_set_from_the_command_line_all_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = create_workspace(str(tmp_path), "# mine\nretrieval: {k: 2}\n").root / "understudy.yaml"
    assert main(["--workspace", str(tmp_path), "config", "set", "retrieval.k=3", "models.embedder=tuned"]) == 0
    assert file.read_text() == '# mine\nretrieval: {k: 3}\nmodels:\n  embedder: "tuned"\n'
    for wrong in ("retrieval.k=none", "retrieval.kk=3", "retrieval.k"):
        assert main(["--workspace", str(tmp_path), "config", "set", "tenant=x", wrong]) == 2
    assert "tenant" not in file.read_text() and "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a list\n", "serve: 3\n", "serve: [1]\n", "a: &x {port: 2}\nserve: *x\n", "serve: {port: 2\n"])
def test_what_cannot_be_changed_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"serve\.port"):
        with_value(text, "serve.port", 1)


names = st.sampled_from(["serve", "models", "port", "base", "k"])
trees = st.dictionaries(names, st.one_of(st.integers(), st.text("ab# :", max_size=5), st.none(), st.dictionaries(names, st.integers(), max_size=3)), max_size=4)


@settings(max_examples=30, deadline=None)
@given(trees, st.booleans(), st.lists(names, min_size=1, max_size=3), st.integers())
def test_any_mapping_keeps_every_other_value(tree: dict[str, object], flow: bool, parts: list[str], value: int) -> None:
    text = yaml.safe_dump(tree, default_flow_style=flow)
    try:
        changed = yaml.safe_load(with_value(text, ".".join(parts), value))
    except UsageError:
        return  # a scalar stands where a section would have to
    expected = tree
    for part in parts[:-1]:
        expected = expected.get(part) or {}  # type: ignore[assignment,union-attr]
    assert {k: v for k, v in changed.items() if k != parts[0]} == {k: v for k, v in tree.items() if k != parts[0]}
    for part in parts:
        changed = changed[part]
    assert changed == value
