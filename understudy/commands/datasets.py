"""dataset build/lint/show."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from understudy.commands import Outcome, workspace_of
from understudy.errors import NotFoundError, UsageError
from understudy.terminal import printable

SHOWN_FINDINGS = 50  # on a terminal; --json has them all


def dataset_build(args: Namespace) -> Outcome:
    """Build the dataset of what teachers answered."""
    from train.dataset import build_dataset

    if not 0 <= args.held_out < 1 or args.no_support < 0 or not 0 <= args.validations <= 1 or (args.dose or 0) < 0:
        raise UsageError(
            "there is no such dataset", "--held-out is a share from 0 to less than 1; --validations one from 0 to 1; --no-support and --dose are 0 or more"
        )
    result = build_dataset(workspace_of(args), args.seed, args.unverified, args.held_out, args.dose, args.no_support, args.validations)
    examples, traces = result["examples"], result["traces"]
    steps = ", ".join(f"{count} {name}" for name, count in sorted(result["by_step"].items()))
    lines = [
        f"dataset {result['dataset'][:12]}: {examples['train']} training rows, {examples['validation']} for validation ({steps});"
        f" sharing {result['sharing']:.2f}",
        f"{traces['kept']} traces kept, {traces['rejected']} rejected"
        + (f", {traces['held_out']} held out: `evaluate --questions {result['path']}/held-out.jsonl`" if traces["held_out"] else ""),
        *(f"rejected {count}: {reason}" for reason, count in result["rejected"].items()),
    ]
    return Outcome(result, lines)


def dataset_lint(args: Namespace) -> Outcome:
    """Find what would fail before it does."""
    from train.lint_folder import lint

    result = lint(workspace_of(args), args.dataset)
    found = result["findings"]
    lines = [
        printable(f"{f['file']}{'' if f['row'] is None else ' row ' + str(f['row'])}: {f['level']}: {f['rule']}: {f['message']}")
        for f in found[:SHOWN_FINDINGS]
    ]
    more = [f"… and {len(found) - SHOWN_FINDINGS} more: --json lists all"] if len(found) > SHOWN_FINDINGS else []
    return Outcome(
        result, [*lines, *more, f"{result['path']}: {result['errors']} errors, {result['warnings']} warnings"], exit_code=3 if result["errors"] else 0
    )


def dataset_show(args: Namespace) -> Outcome:
    """A page of a dataset's rows and rejections, or one row whole."""
    from rag.prompts import example_messages
    from train.dataset import find_dataset, read_dataset, read_ledger

    workspace = workspace_of(args)
    folder = find_dataset(workspace, args.dataset)
    examples, passages, summary = read_dataset(folder)
    about = {"dataset": folder.name, "path": workspace.relative(folder)}
    if args.row is not None:
        if not 1 <= args.row <= len(examples):
            raise NotFoundError(f"there is no row {args.row}", f"the dataset has the rows 1 to {len(examples)}")
        example = examples[args.row - 1]
        messages = [message.model_dump() for message in example_messages(example, passages)] + [{"role": "assistant", "content": example.target}]
        facts = f"row {args.row}: {example.split}, {example.task}, {example.kind}, trace {example.trace_id[:12]}"
        lines = [facts, *(f"\n[{message['role']}]\n{message['content']}" for message in messages)]
        return Outcome({**about, "row": args.row, **example.model_dump(), "messages": messages}, [printable(line) for line in lines])
    rows = [] if args.only == "rejected" or args.reason else kept_rows(examples, args)
    if args.only != "kept" and not (args.split or args.task or args.kind):
        rejections = enumerate(read_ledger(folder), 1)
        rows += [
            {"status": "rejected", "row": number, **rejection.model_dump()}
            for number, rejection in rejections
            if contains(rejection.question, args.contains) and contains(rejection.reason, args.reason)
        ]
    pages = max(1, -(-len(rows) // max(1, args.limit)))
    page = min(max(1, args.page), pages)
    shown = rows[(page - 1) * args.limit : page * args.limit] if args.limit > 0 else []
    result = {**about, "examples": summary["examples"], "traces": summary.get("traces"), "total": len(rows), "page": page, "pages": pages, "rows": shown}
    return Outcome(result, [*map(row_line, shown), f"page {page} of {pages}, {len(rows)} in all (--page, --row N, --only rejected)"])


def kept_rows(examples: list[Any], args: Namespace) -> list[dict[str, Any]]:
    """The rows that meet the filters, numbered as in examples.jsonl."""
    return [
        {"status": "kept", "row": number, **example.model_dump(include={"split", "task", "kind", "question", "proposal", "target", "trace_id"})}
        for number, example in enumerate(examples, 1)
        if args.split in (None, example.split)
        and args.task in (None, example.task)
        and args.kind in (None, example.kind)
        and contains(example.question, args.contains)
    ]


def contains(text: str, wanted: str | None) -> bool:
    """Whether a text holds another, whatever the case; always where none is wanted."""
    return wanted is None or wanted.lower() in text.lower()


def row_line(row: dict[str, Any]) -> str:
    """One row or rejection on a line."""
    question = " ".join(row["question"].split())
    if row["status"] == "rejected":
        detail = f" ({' '.join(row['detail'].split())})" if row["detail"] else ""
        return printable(f"rejected {row['row']:5}  {row['trace_id'][:12]}  {row['reason']}{detail}: {question}")
    target = " ".join(row["target"].split())
    judged = f" [{' '.join(row['proposal'].split())[:60]}]" if row["proposal"] else ""
    return printable(f"{row['row']:5}  {row['split']:10}  {row['task']:8}  {row['kind']:18}  {question}{judged} → {target[:80]}")
