"""A report as large as they get, two hundred questions to eight models under every condition: one file, below 3 MB, quiet in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rag.eval.modes import split_mode
from rag.eval.report import build_report
from rag.eval.robustness import Asked, share_out
from rag.eval.variants import Variant, conditions
from rag.prompts import ABSTENTION
from tests.conftest import SAMPLE
from understudy.records import Chunk, Question, Step, Trace, Usage

NAMES = ("base", "base:closed-book", "base:fast", *(f"handbooks@0123456789ab{mode}" for mode in ("", ":closed-book", ":fast")), "frontier", "teacher")
QUESTIONS, MEGABYTE = 200, 10**6
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def large_corpus() -> dict[str, Chunk]:
    """The sample's handbooks, cut as long as chunks are."""
    chunks = {}
    for source in sorted((SAMPLE / "sources").glob("*.md")):
        text = source.read_text(encoding="utf-8")
        for ordinal, start in enumerate(range(0, len(text), 420)):
            id_, end = f"{source.stem}-{start}", min(len(text), start + 480)
            document = f"{source.stem}.pdf"
            chunks[id_] = Chunk(id=id_, document_id=document, document=document, text=text[start:end], start=start, end=end, pages=[1], ordinal=ordinal)
    return chunks


def sentence_of(chunk: Chunk) -> str:
    return max(re.split(r"(?<=[.!?])\s+|\n+", chunk.text), key=len).strip()


def answer(question: Question, name: str, chunks: list[Chunk], generator: Random, source: str = "model") -> Trace:
    """A run as a model makes one: most answers near the gold one, some wrong, some abstentions."""
    model, mode = split_mode(name)
    skill = {"base": 0.35, "handbooks@0123456789ab": 0.75, "frontier": 0.8, "teacher": 0.85}[model] - 0.25 * (mode == "closed-book")
    shown = [] if mode == "closed-book" else [chunk.id for chunk in chunks]
    usage = Usage(prompt_tokens=generator.randint(300, 900), cached_tokens=200, completion_tokens=40)
    seconds = generator.lognormvariate(0.5, 0.5)
    is_right, words = generator.random() < skill, " ".join(question.answers or ["nothing of the kind"]).split()
    abstains = (not question.answerable) == is_right
    text = ABSTENTION if abstains else " ".join(words if is_right else [*generator.sample(words, len(words) // 3 + 1), "dragons"])
    quotes = [] if abstains or not shown else [sentence_of(generator.choice(chunks)) if not is_right else (question.quotes or ["no such words here"])[0]]
    steps = [Step(name="plan", text="some words", seconds=seconds / 4, usage=usage)] if mode == "agentic" else []
    steps += [] if mode == "closed-book" else [Step(name="retrieve", passage_ids=shown, seconds=0.02, parsed={"ranking": shown})]
    steps += [Step(name="answer", passage_ids=shown, seconds=seconds, usage=usage, first_token_seconds=seconds / 3 if mode == "fast" else None)]
    steps += [Step(name="validate", passage_ids=shown, text="0.8", seconds=seconds / 3, usage=usage)] if mode == "agentic" else []
    return Trace(
        id=f"{name} {question.id}", question=question.question, steps=steps, answer=text, abstained=abstains, citations=[], quotes=quotes, model=model,
        score=min(1.0, max(0.0, generator.gauss(0.3 + 0.4 * is_right, 0.2))), source=source, generation="g", prompt_version="p", created_at=0.0,  # type: ignore[arg-type]
        metadata={"mode": mode},
    )  # fmt: skip


def make_large(folder: Path) -> dict[str, Any]:
    generator, chunks = Random(0), large_corpus()
    every = list(chunks.values())
    questions, shown = [], {}
    for place in range(QUESTIONS):
        gold = generator.choice([chunk for chunk in every if len(sentence_of(chunk).split()) > 8])
        sentence = sentence_of(gold)
        id_ = f"q{place:03}"
        asked = f"What do the handbooks say of {' '.join(sentence.split()[:9])}?"
        gold_of = {"answers": [sentence], "quotes": [sentence]} if place % 4 else {}
        about = {"documents": [gold.document], "pages": [1], "type": ("fact", "number", "reason")[place % 3]}
        questions.append(Question.model_validate({"id": id_, "question": asked, "has_answer_key": True, **gold_of, **about}))
        near = [chunk for chunk in every if chunk.document == gold.document and chunk.id != gold.id]
        shown[id_] = sorted([gold, *generator.sample(near, min(5, len(near)))], key=lambda chunk: chunk.start)
    traces = {name: [answer(q, name, shown[q.id], generator, "imported" if name == "teacher" else "model") for q in questions] for name in NAMES}
    made = conditions()
    variants = []
    for condition in made:
        for question in (question for question in questions if question.answerable):
            changed = {"id": f"{condition.name}/{question.id}", **({"answers": None, "quotes": []} if condition.family == "support" else {})}
            passages = None if condition.family == "wording" else ()
            variants.append(Variant(condition.name, question.id, question.model_copy(update=changed), passages))
    shares = share_out(variants, [name for name in NAMES if name != "teacher"])
    answered = {name: [answer(v.question, name, shown[v.of], generator) for v in of_name] for name, of_name in shares.items()}
    return build_report(
        questions, traces, chunks, folder, k=6, concurrency=8, resamples=300, provenance={"questions": "0" * 64, "machine": {"cores": "2"}},
        robustness=Asked(shares, answered, made, 12, 0), energy={"base": {"joules_per_question": 81.2, "questions": 200, "joules": {"package-0": 16240.0}}},
        notes=["12 questions were set apart."],
    )  # fmt: skip


@pytest.mark.slow
def test_a_large_report_is_one_file_below_3_mb_that_a_browser_shows_without_a_word(tmp_path: Path) -> None:
    report = make_large(tmp_path)
    page = tmp_path / "report.html"
    assert page.stat().st_size < 3 * MEGABYTE and len(report["models"]) == 8 and len(report["robustness"]["models"]) == 7
    assert len(re.findall(r"<svg", page.read_text())) == 7 + 2 + 2 + 8
    if BROWSER is None:
        pytest.skip("no Chromium here: the page was not opened")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([BROWSER, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, env=environment)
    assert f"{QUESTIONS} of {QUESTIONS} questions" in done.stdout  # its own script has run
    assert "CONSOLE" not in done.stderr and "Refused to" not in done.stderr
