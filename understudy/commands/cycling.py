"""cycle: the whole loop once, what a scheduler calls."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, report, workspace_of
from understudy.progress import show_progress
from understudy.terminal import printable

if TYPE_CHECKING:
    from understudy.cycles import Cycle


def cycle(args: Namespace) -> Outcome:
    """Run a cycle, go on with the one that was interrupted, or say that nothing is due; exit 3 where the candidate is refused."""
    from understudy.cycle import dry_run, run_cycle
    from understudy.cycles import BEGIN

    workspace = workspace_of(args)
    if args.dry_run:
        result = dry_run(workspace, args.documents)
        return Outcome(result, [printable(line) for line in _plan_lines(result)])
    found, made = run_cycle(workspace, args.set, args.documents, args.anew, args.refreeze, report, show_progress)
    if made is None:
        return Outcome({"cycle": None, "due": False, "verdict": "nothing", "reason": "; ".join(found.waits)}, [f"nothing to do: {'; '.join(found.waits)}"])
    assert made.end is not None  # every last stage has a verdict
    stages = [{"stage": line.stage, "seconds": line.seconds, **line.outcome} for line in made.lines if line.stage != BEGIN]
    release = made.outcomes.get("evaluate", {}).get("release")
    result = {"cycle": made.name, "due": True, **made.outcomes[BEGIN], "verdict": made.end.verdict, "reason": made.end.reason, "release": release}
    lines = [f"cycle {made.name}: {made.end.verdict}: {made.end.reason}"]
    if made.end.verdict in ("canary", "ready"):
        lines += [f"release {release}; `understudy release ls` shows how it does, `understudy release promote {release}` makes it live"]
    return Outcome({**result, "stages": stages}, [printable(line) for line in lines], 3 if made.end.verdict == "refused" else 0)


def cycle_ls(args: Namespace) -> Outcome:
    """The tenant's cycles, oldest first."""
    from understudy.cycles import cycles_of

    rows = [_cycle_json(cycle) for cycle in cycles_of(workspace_of(args))]
    return Outcome({"cycles": rows}, [printable(_cycle_line(row)) for row in rows] or ["no cycle has begun"])


def _cycle_json(cycle: Cycle) -> dict[str, Any]:
    from understudy.cycles import BEGIN

    set_out, end = cycle.outcomes[BEGIN], cycle.end
    return {
        "cycle": cycle.name,
        "alias": set_out["alias"],
        "began_at": cycle.lines[0].at,
        "seconds": round(sum(line.seconds for line in cycle.lines), 1),
        "stage": (cycle.lines[-2] if end and end.verdict == "abandoned" else cycle.lines[-1]).stage,  # the last that was done
        "verdict": end.verdict if end else None,
        "reason": end.reason if end else "",
        "release": cycle.outcomes.get("evaluate", {}).get("release"),
    }


def _cycle_line(row: dict[str, Any]) -> str:
    began = datetime.fromtimestamp(row["began_at"], UTC).strftime("%Y-%m-%d %H:%M")
    came_to = f"{row['verdict']}: {row['reason']}" if row["verdict"] else "has not ended; `understudy cycle` goes on with it"
    return f"{row['cycle']}  {began} UTC  {row['seconds']:7.0f} s  until {row['stage']:<9}  {came_to}"


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a dry run found, for people."""
    why = f"cycle {plan['unfinished']} is unfinished" if plan["unfinished"] else "; ".join(plan["reasons"] if plan["due"] else plan["waits"])
    lines = [f"{'due' if plan['due'] else 'not due'}: {why}"]
    lines += [f"  {step['stage']:10}{'done' if step['done'] else step['would']}" for step in plan["steps"]]
    return [*lines, *(f"drift of {plan['drift']['subject']}: {advice}" for advice in plan["drift"]["advice"])] if plan["drift"] else lines
