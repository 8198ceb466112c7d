"""questions import/export: question files from public sets, and for other tools."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from understudy.commands import Outcome
from understudy.files import require_file
from understudy.terminal import printable


def questions_import(args: Namespace) -> Outcome:
    """A public set as a question file."""
    from rag.eval.public_sets import import_set

    documents = Path(args.documents) if args.documents else None
    result = import_set(Path(args.source), Path(args.target), args.format, documents, args.split)
    kept = f", {result['documents']} documents in {documents}" if documents else ""
    lines = [f"{result['imported']} questions ({result['with_answer']} with an answer key) in {args.target}{kept}"]
    lines += [printable(f"skipped {row['row']}: {row['reason']}") for row in result["skipped"][:20]]
    if result["ignored_columns"]:
        lines.append(printable(f"columns that were not read: {', '.join(result['ignored_columns'])}"))
    return Outcome(result, lines)


def questions_export(args: Namespace) -> Outcome:
    """A question file for another tool."""
    from rag.eval.exports import export_rows
    from rag.eval.questions import read_questions
    from understudy.files import write_jsonl

    rows = export_rows(read_questions(require_file(Path(args.source))), args.format)
    write_jsonl(Path(args.target), rows)
    return Outcome({"format": args.format, "exported": len(rows), "path": args.target}, [f"{len(rows)} questions in {args.target}"])
