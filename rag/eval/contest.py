"""Two models of a finished evaluation, question by question: what people review and a judge compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.eval.compare import read_report, read_scores
from rag.eval.evidence import locate_shown, shown_chunks
from rag.eval.explorer import CHANGED, Mark, QuoteView, mark_text, quality
from rag.eval.labels import Choice
from rag.eval.metrics import Row
from rag.eval.modes import without_digest
from rag.eval.recorded_answers import TEACHER
from rag.eval.run import load_traces, traces_file
from understudy.digests import digest_of
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import read_json
from understudy.records import Chunk, Trace

PREFERENCES: dict[str, str] = {  # by what a judge-free metric prefers one answer to another
    "quality": "token-F1, or rightly abstaining where there is no answer",
    "semantic_similarity": "semantic similarity to the expert's answer",
    "citation_precision": "citation precision",
    "citation_recall": "citation recall",
}


@dataclass(frozen=True)
class Contest:
    """The scored questions of two models; `a` is the baseline. Lists are in the order of the run's questions."""

    folder: Path
    a: str
    b: str
    ids: list[str]
    questions: list[str]
    clusters: list[str]  # each question's document
    rows: tuple[list[Row], list[Row]]

    def preferences(self, metric: str) -> list[Choice | None]:
        """Which answer a metric prefers; None where it is undefined for either, a tie where they differ by less than CHANGED."""
        return [_preference(_value(first, metric), _value(second, metric)) for first, second in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class SeenPassage:
    """A passage with the spans that each answer cites; `shown_to` holds the places, 0 and 1, of the answers whose prompt held it."""

    document: str
    pages: list[int]
    marks: list[Mark]
    shown_to: list[int]


@dataclass(frozen=True)
class SeenAnswer:
    """An answer without the name of its model."""

    text: str
    quotes: list[QuoteView]
    failed: bool


def find_run(reports: Path, name: str | None) -> Path:
    """A finished evaluation's folder: by path, by the beginning of its name, or the newest. Raises NotFoundError."""
    if name and (Path(name) / "report.json").is_file():
        return Path(name)
    finished = [path.parent for path in reports.glob("*/report.json") if path.parent.name.startswith(name or "")]
    if not finished or (name and len(finished) > 1):
        wanted = "there is no finished evaluation" if not name else f"{len(finished) or 'no'} finished evaluations begin with {name!r}"
        raise NotFoundError(wanted, "`understudy evaluate history` lists them")
    return max(finished, key=lambda folder: float(read_report(folder / "report.json").get("finished_at") or 0.0))


def open_contest(folder: Path, models: Sequence[str] | None = None) -> Contest:
    """Two models of a run, in its order, by default the first two; raises UsageError where it does not hold them."""
    scores = read_scores(folder / "report.json")
    known = list(scores["models"])
    chosen = sorted({_named(name, known) for name in models}, key=known.index) if models else known[:2]
    if len(chosen) != 2:
        raise UsageError(f"two models are compared, not {', '.join(chosen) or 'none'}", f"--models with two of: {', '.join(known)}")
    asked = scores["questions"]
    a, b = chosen
    return Contest(
        *(folder, a, b, [row["id"] for row in asked], [row["question"] for row in asked], [row["document"] for row in asked]),
        rows=(scores["models"][a], scores["models"][b]),
    )


def read_answers(contest: Contest, recorded: Callable[[], list[Trace]]) -> list[tuple[Trace, Trace]]:
    """Both models' runs of every question; `recorded` gives the teacher's, which lie in the store and not in the run's folder."""
    traces = [_traces_of(contest, name, recorded) for name in (contest.a, contest.b)]
    return list(zip(*traces, strict=True))


def says_the_same(pair: tuple[Trace, Trace]) -> bool:
    """Whether two runs end in the same words and quotes, so that there is nothing to prefer."""
    first, second = ((trace.complete, " ".join(trace.answer.split()), [" ".join(quote.split()) for quote in trace.quotes]) for trace in pair)
    return first == second


def view_pair(pair: Sequence[Trace], chunks: Mapping[str, Chunk]) -> tuple[list[SeenAnswer], list[SeenPassage]]:
    """The answers of two runs in the order given, and every passage shown to either with what they cite of it."""
    shown = [shown_chunks(trace, dict(chunks)) for trace in pair]
    emitted = [[locate_shown(text, passages) for text in dict.fromkeys(trace.quotes)] for trace, passages in zip(pair, shown, strict=True)]
    answers = [
        SeenAnswer(trace.answer, [QuoteView(quote.text, "verbatim" if quote.spans else "not found") for quote in quotes], not trace.complete)
        for trace, quotes in zip(pair, emitted, strict=True)
    ]
    passages = []
    for chunk in {chunk.id: chunk for of_run in shown for chunk in of_run}.values():
        seeing = [place for place, of_run in enumerate(shown) if chunk in of_run]
        cited = [[span for quote in emitted[place] for span in quote.spans] if place in seeing else [] for place in range(len(pair))]
        passages.append(SeenPassage(chunk.document, chunk.pages, mark_text(chunk, [], cited), seeing))
    return answers, passages


def _named(name: str, known: Sequence[str]) -> str:
    """A model of the run by its name, or an adapter by its name without the digest."""
    found = [full for full in known if name in (full, without_digest(full))]
    if len(found) != 1:
        raise UsageError(f"{name} is not one model of this run", f"it measured {', '.join(known)}")
    return found[0]


def _traces_of(contest: Contest, name: str, recorded: Callable[[], list[Trace]]) -> list[Trace]:
    path = contest.folder / traces_file(name)
    if path.exists():
        by_id = load_traces(path)
        if not by_id.keys() >= set(contest.ids):
            raise StorageError(f"{path} lacks answers that the report is about", "repeat the evaluation: what was answered is not asked again")
        return [by_id[question_id] for question_id in contest.ids]
    if name != TEACHER:
        raise NotFoundError(f"{contest.folder} holds no answers of {name}", "repeat the evaluation")
    traces = recorded()
    expected = (read_json(contest.folder / "run.json").get("recorded") or {}).get(name)
    if expected and expected != digest_of([trace.id for trace in traces]):
        raise StorageError("the teacher's answers were recorded anew since this evaluation", "repeat the evaluation")
    return traces


def _value(row: Row, metric: str) -> float | None:
    return quality(row) if metric == "quality" else row.get(metric)


def _preference(first: float | None, second: float | None) -> Choice | None:
    if first is None or second is None:
        return None
    return "b" if second - first >= CHANGED else "a" if first - second >= CHANGED else "tie"
