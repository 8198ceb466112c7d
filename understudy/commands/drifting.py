"""drift: whether recent runs are still like those that a model was measured on."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.commands import Outcome, workspace_of
from understudy.commands.wiring import calibration_folder, default_model
from understudy.errors import NotFoundError, UsageError
from understudy.records import Trace, TraceFilter
from understudy.terminal import printable
from understudy.workspace import Workspace

DAY = 86_400.0
REFERENCE_DAYS = 90.0  # before the recent runs


@dataclass(frozen=True)
class Reference:
    """What recent runs are compared with."""

    source: str  # traces, or the evaluation's folder
    traces: list[Trace]


def drift(args: Namespace) -> Outcome:
    """Compare the recent runs of a model with its reference; exit 3 with --gate where something is due."""
    if args.days <= 0 or not 0.5 < args.confidence < 1:
        raise UsageError("there is no such comparison", "--days is above 0, --confidence between 0.5 and 1")
    workspace = workspace_of(args)
    result = measure_drift(workspace, args.name or default_model(workspace), args.days, args.confidence, args.against)
    reference, recent, due = result["reference"], result["recent"], result["due"]
    lines = [f"{result['subject']}: {recent['n']} runs of the last {args.days:g} days against {reference['n']} ({reference['source']})"]
    lines += [_line(signal) for signal in result["signals"]]
    lines += [*result["advice"], f"due: {', '.join(due) or 'nothing'}"]
    return Outcome(result, [printable(line) for line in lines], 3 if args.gate and due else 0)


def measure_drift(workspace: Workspace, name: str, days: float, confidence: float, against: str | None = None) -> dict[str, Any]:
    """The command's JSON for a model or an alias. Raises NotFoundError where it has answered nothing since its calibration."""
    from rag.drift import compare, newest_of, what_is_due
    from rag.retrieve import open_retriever

    begin, runs = time.time() - days * DAY, _runs(workspace, name, time.time() - (days + REFERENCE_DAYS) * DAY)
    subject, own = newest_of(runs, name)
    if not own:
        raise NotFoundError(f"there is no run of {name} since its calibration", "`understudy traces ls` lists what was asked; name a model or a release")
    recent = [trace for trace in own if trace.created_at >= begin]
    reference = _reference(workspace, subject, [trace for trace in own if trace.created_at < begin], against)
    signals = compare(reference.traces, recent, open_retriever(workspace).embed, confidence)
    due, advice = what_is_due(signals)
    return {
        "subject": subject,
        "reference": {"source": reference.source, "n": len(reference.traces)},
        "recent": {"days": days, "n": len(recent)},
        "confidence": confidence,
        "signals": [asdict(signal) for signal in signals],
        "due": due,
        "advice": advice,
    }


def _runs(workspace: Workspace, name: str, since: float) -> list[Trace]:
    """The whole runs of models since a time, and since this one's calibration, which its scores depend on. Answers from the cache are none."""
    try:
        file = calibration_folder(workspace, name) / "calibration.json"
        since = max(since, file.stat().st_mtime if file.exists() else 0.0)
    except NotFoundError:  # an alias, whose scores are its models'
        pass
    found = workspace.store.traces(workspace.config.tenant, TraceFilter(source="model", complete=True, since=since))
    return [trace for trace in found if trace.cache in ("off", "miss")]


def _reference(workspace: Workspace, subject: str, earlier: list[Trace], against: str | None) -> Reference:
    """The earlier runs where there are enough of them, else the newest evaluation; or what was asked for."""
    from rag.drift import FEWEST

    if against == "traces" or (against is None and len(earlier) >= FEWEST):
        return Reference("traces", earlier)
    folder = _evaluation_of(workspace, subject)
    if folder is None and against == "evaluation":
        raise NotFoundError(f"no evaluation of {subject}", "run `understudy evaluate`, or compare with --against traces")
    if folder is None:
        return Reference("traces", earlier)
    return Reference(f"evaluation {workspace.relative(folder)}", _traces_in(folder, subject))


def _evaluation_of(workspace: Workspace, subject: str) -> Path | None:
    from rag.eval.run import traces_file

    files = sorted(workspace.reports.glob(f"*/{traces_file(subject)}"), key=lambda file: file.stat().st_mtime)
    return files[-1].parent if files else None


def _traces_in(folder: Path, subject: str) -> list[Trace]:
    from rag.eval.run import traces_file
    from understudy.files import read_jsonl

    found = [Trace.model_validate(row) for row in read_jsonl(folder / traces_file(subject))]
    last = {trace.metadata.get("question_id", trace.id): trace for trace in found}  # a question that failed was asked again
    return [trace for trace in last.values() if trace.complete]


def _line(signal: dict[str, object]) -> str:
    """One signal for people."""
    name, n = f"  {signal['name']:12}", f"n={signal['n_reference']}/{signal['n_recent']}"
    if signal["p_holm"] is None:
        return f"{name} {signal['note']} ({n})"
    moved = "" if signal["reference"] is None else f" {signal['reference']:.3f} → {signal['recent']:.3f};"
    verdict = "worse" if signal["is_worse"] else "changed" if signal["is_changed"] else "as before"
    return f"{name} {verdict}:{moved} {signal['effect_name']} {signal['effect']:+.3f}, p={signal['p_holm']:.3g} ({signal['test']}, {n})"
