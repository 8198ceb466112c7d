"""Public question sets as our question files: BEIR folders, SQuAD, RAGAS and RAGChecker JSON, CSV; and the texts they ask about, to ingest.

Read as data, whatever a row holds; a row that is no question is skipped with its reason. Formats as their projects document them:
BEIR (corpus.jsonl, queries.jsonl, qrels/*.tsv), SQuAD 1.1 and 2.0, RAGAS (user_input, reference, reference_contexts; the older
question, ground_truth, contexts), RAGChecker (results of query, gt_answer, retrieved_context).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rag.citations import find_quote, sentence_around
from rag.eval.questions import parse_question
from understudy.digests import digest_of
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import read_json, read_jsonl, write_jsonl, write_text

Format = Literal["beir", "squad", "ragas", "ragchecker", "csv"]
Row = dict[str, Any]  # of a question file
COLUMNS = ("question", "answer", "id", "quote", "document", "page", "query", "type", "answerable")  # of a CSV
ANSWERABLE = {"": True, "yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass
class Imported:
    """Rows of a question file, the documents they are about by file name, and what was left out."""

    rows: list[Row] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)  # {row, reason}
    ignored: list[str] = field(default_factory=list)  # columns that are none of ours

    def add(self, name: str, make: Callable[[], Row]) -> None:
        """Keep a row if it is a question of ours; `name` says in the report which one was not."""
        try:
            row = {key: value for key, value in make().items() if value not in ("", []) and (value is not None or key == "answer")}
            parse_question(row)
            self.rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            missing = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            self.skipped.append({"row": name, "reason": missing})


def import_set(source: Path, target: Path, kind: Format | None = None, documents: Path | None = None, split: str = "test") -> dict[str, Any]:
    """Write a public set as a question file, and its texts into `documents` where that is given; the result is the command's JSON.

    `split` names the qrels of a BEIR folder. Raises NotFoundError, StorageError, UsageError where the format is unclear.
    """
    kind = kind or guess_format(source)
    imported = {"beir": lambda: read_beir(source, split), "csv": lambda: read_csv(source)}.get(kind, lambda: _read_json_set(source, kind))()
    ids: set[str] = set()
    for row in list(imported.rows):
        if row.get("id") in ids:
            imported.rows.remove(row)
            imported.skipped.append({"row": row["id"], "reason": "its id was used before"})
        ids.add(row.get("id", ""))
    if not imported.rows:
        reasons = f", such as {imported.skipped[0]['row']}: {imported.skipped[0]['reason']}" if imported.skipped else ""
        raise StorageError(f"{source} holds no question of the format {kind}{reasons}", "correct the file, or name another format with --format")
    write_jsonl(target, imported.rows)
    for name, text in imported.documents.items() if documents else ():
        assert documents is not None
        write_text(documents / name, text)
    return {
        "format": kind,
        "imported": len(imported.rows),
        "with_answer": sum("answer" in row for row in imported.rows),
        "skipped": imported.skipped,
        "ignored_columns": imported.ignored,
        "documents": len(imported.documents) if documents else 0,
        "path": str(target),
    }


def guess_format(source: Path) -> Format:
    """By a folder's files, a file's name and its first keys; raises UsageError, NotFoundError."""
    if not source.exists():
        raise NotFoundError(f"{source} does not exist", "check the path")
    if source.is_dir() and (source / "queries.jsonl").is_file():
        return "beir"
    if source.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if source.is_file():
        content = _json_of(source)
        first = content[0] if isinstance(content, list) and content else content
        keys = set(first) if isinstance(first, dict) else set()
        for kind, marks in (("squad", {"data"}), ("ragchecker", {"results"}), ("ragas", {"user_input"}), ("ragas", {"question", "contexts"})):
            if marks <= keys:
                return kind  # type: ignore[return-value]
    raise UsageError(f"cannot tell the format of {source}", f"name it with --format: {', '.join(get_args(Format))}")


def read_beir(folder: Path, split: str) -> Imported:
    """Questions with the documents judged relevant; a set without answers, so that it measures retrieval alone."""
    judged: dict[str, list[str]] = {}
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        known = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise NotFoundError(f"{qrels} does not exist", f"splits there: {known}; name one with --split")
    for row in _table(qrels):
        if str(row.get("score") or "0").strip() not in ("0", "-1"):
            judged.setdefault(str(row.get("query-id")), []).append(str(row.get("corpus-id")))
    imported = Imported()
    for row in read_jsonl(folder / "corpus.jsonl"):
        imported.documents[file_name(str(row.get("_id")))] = "\n\n".join(part for part in (str(row.get("title") or ""), str(row.get("text") or "")) if part)
    for row in read_jsonl(folder / "queries.jsonl"):
        key = str(row.get("_id"))
        if key in judged:
            imported.add(key, lambda row=row, key=key: {"id": key, "question": row["text"], "documents": [file_name(name) for name in judged[key]]})  # type: ignore[misc]
    return imported


def read_squad(content: Any) -> Imported:
    """One document an article; the quote is the sentence of the context in which the answer stands."""
    imported = Imported()
    for article in content["data"]:
        name = file_name(str(article.get("title") or "article"))
        imported.documents[name] = "\n\n".join(str(paragraph["context"]) for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                imported.add(str(qa.get("id")), lambda qa=qa, context=paragraph["context"], name=name: _squad_row(qa, context, name))  # type: ignore[misc]
    return imported


def read_ragas(content: Any) -> Imported:
    """Rows with a reference answer; reference contexts become documents, and the quote the sentence that holds the answer."""
    imported = Imported()
    for place, row in enumerate(content):
        imported.add(f"row {place + 1}", lambda row=row: _context_row(imported, {  # type: ignore[misc]
            "question": row.get("user_input") or row["question"],
            "answer": row.get("reference") or row.get("ground_truth") or row.get("ground_truths"),
            "contexts": row.get("reference_contexts") or row.get("contexts") or row.get("retrieved_contexts") or [],
        }))  # fmt: skip
    return imported


def read_ragchecker(content: Any) -> Imported:
    """Queries with their ground truth; retrieved contexts become documents."""
    imported = Imported()
    for row in content["results"]:
        imported.add(str(row.get("query_id")), lambda row=row: _context_row(imported, {  # type: ignore[misc]
            "id": str(row["query_id"]),
            "question": row["query"],
            "answer": row["gt_answer"],
            "contexts": [context["text"] for context in row.get("retrieved_context") or []],
        }))  # fmt: skip
    return imported


def read_csv(path: Path) -> Imported:
    """Columns question, answer, and any of id, quote, document, page, query, type, answerable (no: abstaining is right), separated by the
    comma, semicolon or tab that the header has most of."""
    imported = Imported()
    for place, row in enumerate(_table(path)):
        columns = [key.strip().lower() for key in row if isinstance(key, str)]
        if "question" not in columns:
            raise StorageError(f"{path} has no column `question` but {', '.join(columns)}", f"name its columns by these: {', '.join(COLUMNS)}")
        imported.ignored = [name for name in columns if name not in COLUMNS]
        imported.add(f"line {place + 2}", lambda row=row: _csv_row(row))  # type: ignore[misc]
    return imported


def file_name(title: str) -> str:
    """A plain .txt name for a title, distinct for distinct titles."""
    plain = re.sub(r"[^\w.-]+", "_", title).strip("._")[:100]
    return f"{plain}.txt" if plain and plain == title else f"{plain or 'document'}-{digest_of(title)[:8]}.txt"


def _squad_row(qa: Row, context: str, name: str) -> Row:
    answers = list(dict.fromkeys(str(answer["text"]) for answer in qa.get("answers") or []))
    row = {"id": str(qa["id"]), "question": qa["question"], "answer": answers or None, "document": name}
    if answers:
        start = int(qa["answers"][0]["answer_start"])
        first, last = sentence_around(context, start, start + len(answers[0]))
        row["quotes"] = [context[first:last]]
    return row


def _context_row(imported: Imported, given: Row) -> Row:
    answer = given["answer"]
    if not answer:
        raise ValueError("it has no reference answer")
    contexts = [str(context) for context in given.pop("contexts") if str(context).strip()]
    text = answer if isinstance(answer, str) else str(answer[0])
    for context in contexts:
        name = f"context-{digest_of(context)[:16]}.txt"
        imported.documents[name] = context
        if span := find_quote(text, context):
            first, last = sentence_around(context, *span)
            return {**given, "quotes": [context[first:last]], "documents": [name]}
    return {**given, "documents": [f"context-{digest_of(context)[:16]}.txt" for context in contexts]}


def _csv_row(given: Row) -> Row:
    if any(given.pop(None, None) or []):  # type: ignore[call-overload]
        raise ValueError("it has more cells than there are columns: a cell that holds the separator needs quotation marks")
    cells = {key.strip().lower(): (value or "").strip() for key, value in given.items()}
    row: Row = {key: cells.get(key, "") for key in ("id", "question", "query", "type", "document")}
    if cells.get("quote"):
        row["quotes"] = [cells["quote"]]
    if cells.get("page"):
        if not cells["page"].isdecimal():
            raise ValueError(f"`page` is {cells['page']!r}, not a whole number")
        row["pages"] = [int(cells["page"])]
    is_answerable = ANSWERABLE.get(cells.get("answerable", "").lower())
    if is_answerable is None:
        raise ValueError(f"`answerable` is {cells['answerable']!r}, neither yes nor no")
    if not is_answerable:
        row["answer"] = None
    elif cells.get("answer"):
        row["answer"] = cells["answer"]
    return row


def _read_json_set(source: Path, kind: str) -> Imported:
    content = _json_of(source)
    try:
        return {"squad": read_squad, "ragas": read_ragas, "ragchecker": read_ragchecker}[kind](content)
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{source} is not of the format {kind}: {error!r}", "name another format with --format") from error


def _json_of(path: Path) -> Any:
    """The value of a JSON file, or the rows of a JSONL file."""
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def _table(path: Path) -> Iterator[Row]:
    """The rows of a file with a header line, which tells what separates its columns; raises NotFoundError, StorageError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            yield from csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", "check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StorageError(f"cannot read {path}: {error}", "give a UTF-8 file with a header line and its quotation marks in pairs") from error
