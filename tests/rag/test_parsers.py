"""Parser children under real attack: bombs, loops, crashes, kills; the batch goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rag.parsers import Child, Parsers
from tests.rag.pdfs import Pdf, Text, billion_laughs, decompression_bomb, five_thousand_pages
from understudy.errors import DocumentError
from understudy.settings.corpus import Ingest


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.txt"
    file.write_text("Some good words to keep.")
    return file


@pytest.fixture
def parsers() -> Iterator[Parsers]:
    with Parsers(Ingest(parse_seconds=1, parse_memory_gib=0.3), 1) as opened:
        yield opened


def child_of(parsers: Parsers) -> Child:
    (child,) = parsers._children
    return child


def test_one_child_reads_many_files(parsers: Parsers, good: Path) -> None:
    texts = [parsers.parse(good)[0]["pages"] for _ in range(3)]
    assert texts == [["Some good words to keep."]] * 3
    assert len(parsers._children) == 1


def test_a_loop_is_stopped_and_the_next_file_is_read(good: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop.pdf"
    loop.write_bytes(billion_laughs())
    with Parsers(Ingest(parse_seconds=0.3), 1) as parsers:
        with pytest.raises(DocumentError, match=r"stopped after 0.3 s"):
            parsers.parse(loop)
        assert parsers.parse(good)


def test_a_bomb_meets_the_memory_limit_and_the_next_file_is_read(parsers: Parsers, good: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pdf"
    bomb.write_bytes(decompression_bomb(300))
    with pytest.raises(DocumentError, match=r"crashed|memory limit|no text|stopped after"):
        parsers.parse(bomb)
    assert parsers.parse(good)


def test_processor_time_is_limited_even_without_a_parent(tmp_path: Path) -> None:
    loop = tmp_path / "loop.pdf"
    loop.write_bytes(billion_laughs())
    child = Child(Ingest(parse_seconds=1))
    child._limits = Ingest(parse_seconds=30)  # the parent waits on; the child's own limit acts
    with pytest.raises(DocumentError, match="processor time"):
        child.parse(loop)
    child.kill()


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_a_reason_and_a_fresh_child_takes_over(parsers: Parsers, good: Path, tmp_path: Path, sent: signal.Signals) -> None:
    loop = tmp_path / "loop.pdf"
    loop.write_bytes(billion_laughs())
    parsers.parse(good)
    pid = child_of(parsers)._process.pid
    threading.Timer(0.2, os.kill, (pid, sent)).start()
    with pytest.raises(DocumentError, match=sent.name):
        parsers.parse(loop)
    assert parsers.parse(good)
    assert child_of(parsers)._process.pid != pid


def test_a_folder_called_rag_among_the_documents_is_not_run(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tmp_path / "rag" / "parse"
    hostile.mkdir(parents=True)
    for file in (tmp_path / "rag" / "__init__.py", hostile / "__init__.py", hostile / "__main__.py"):
        file.write_text("open('owned', 'w').write('')")
    monkeypatch.chdir(tmp_path)
    with Parsers(Ingest(), 1) as parsers:
        assert parsers.parse(good)
    assert not (tmp_path / "owned").exists()


def test_leaving_ends_the_children(good: Path) -> None:
    with Parsers(Ingest(), 1) as parsers:
        parsers.parse(good)
        process = child_of(parsers)._process
    assert process.poll() is not None


def test_a_truncated_pdf_gives_text_or_a_reason(parsers: Parsers, tmp_path: Path) -> None:
    pdf = Pdf()
    for number in range(5):
        pdf.page(Text(72, 700, f"Page {number} of words."))
    whole, cut = pdf.write(), tmp_path / "cut.pdf"
    for share in (0.2, 0.5, 0.8, 0.99):
        cut.write_bytes(whole[: int(len(whole) * share)])
        with contextlib.suppress(DocumentError):  # whose message is the reason
            assert "words" in "".join(parsers.parse(cut)[0]["pages"])


@pytest.mark.slow
def test_five_thousand_pages_are_read(tmp_path: Path) -> None:
    file = tmp_path / "register.pdf"
    file.write_bytes(five_thousand_pages())
    began = time.monotonic()
    with Parsers(Ingest(), 1) as parsers:
        pages = parsers.parse(file)[0]["pages"]
    print(f"{len(pages) / (time.monotonic() - began):.0f} pages/s")
    assert len(pages) == 5000
    assert pages[4711] == "Entry 4712 of the register names the owner. It is kept for ten years."
