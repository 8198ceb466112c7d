"""A line added to a file is on disk whole, or the file is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.errors import StorageError
from understudy.files import append_jsonl, read_jsonl


def test_a_line_that_was_cut_off_goes_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"row": 1})
    with path.open("ab") as file:
        file.write(b'{"row": "' + b"x" * 200_000)
    append_jsonl(path, {"row": "é"})
    assert read_jsonl(path) == [{"row": 1}, {"row": "é"}]
    path.write_bytes(b"x" * 70_000)
    append_jsonl(path, {"row": 3})
    assert read_jsonl(path) == [{"row": 3}]


def test_a_disk_that_is_full_halfway_leaves_the_lines_before(tmp_path: Path) -> None:
    import resource
    import signal

    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"row": 1})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))  # the next write is a short one
        with pytest.raises(StorageError, match="cannot write"):
            append_jsonl(path, {"row": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_jsonl(path) == [{"row": 1}]


def test_a_device_without_space_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        append_jsonl(path, {"row": 1})
