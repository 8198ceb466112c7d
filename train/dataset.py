"""Build a dataset: verified traces in, chat JSONL with splits, a ledger of rejections and lineage out.

datasets/DIGEST/  train.jsonl validation.jsonl  chat rows {"messages", …} that TRL and Fireworks accept
                  examples.jsonl passages.json  the unrendered rows, so that passage order can change by epoch
                  ledger.jsonl dataset.json     what was rejected and why; counts and lineage
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rag.citations import find_quote
from rag.prompts import PROMPT_VERSION, answer_messages, plan_messages, validate_messages
from train.examples import Mix, Source, build_examples
from understudy.digests import canonical_json, digest_of
from understudy.errors import NotFoundError, UnderstudyError
from understudy.files import read_json, read_jsonl, whole_folder, write_json, write_jsonl
from understudy.models import model_path
from understudy.records import Chunk, Example, Message, Trace, TraceFilter
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDER_VERSION = 1
ACCEPTED_SCORE = 0.5  # a trace validated below this teaches nothing
FIREWORKS_MINIMUM = 3  # rows


def build_dataset(workspace: Workspace, seed: int) -> dict[str, Any]:
    """Build the dataset of the workspace's expert traces; the result is the command's JSON.

    The same traces, corpus and seed give the same digest, and an existing dataset is reused.
    Raises NotFoundError where there are no traces, UnderstudyError where none of them may teach.
    """
    config = workspace.config
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(config.tenant)}
    traces = list(workspace.store.traces(config.tenant, TraceFilter(source="expert")))
    if not traces:
        raise NotFoundError("there are no expert traces to learn from", "run `understudy traces import FILE`")
    sources, ledger = verify_traces(traces, chunks)
    examples = build_examples(sources, chunks, Mix(k=config.retrieval.k), seed)
    if not examples:
        raise UnderstudyError("no trace may teach: " + _reasons(ledger), "see the reasons above; `understudy traces ls` lists the traces")
    shown = {c: chunks[c] for example in examples for c in example.passage_ids}
    digest = digest_of([BUILDER_VERSION, PROMPT_VERSION, seed, [e.model_dump() for e in examples], sorted(shown)])
    folder = workspace.datasets / digest
    if not (folder / "dataset.json").exists():
        _write_dataset(workspace, folder, examples, shown, ledger, {s.trace.id: s.trace for s in sources})
    return {**summary_of(folder), "dataset": digest, "path": workspace.relative(folder), "rejected": dict(Counter(row["reason"] for row in ledger))}


def verify_traces(traces: list[Trace], chunks: dict[str, Chunk]) -> tuple[list[Source], list[dict[str, str]]]:
    """The traces that may teach, and a ledger row for each that may not.

    Rows may only show passages of documents that the traces themselves cite or ask about: what is kept for
    evaluation is never seen in training, not even as a distractor.
    """
    ledger: list[dict[str, str]] = []
    kept = []
    for trace in traces:
        reason = rejection(trace, chunks)
        if reason:
            ledger.append({"trace_id": trace.id, "question": trace.question, "reason": reason})
        else:
            kept.append(trace)
    splits = assign_splits(kept)
    allowed: dict[str, set[str]] = {"train": set(), "validation": set()}
    for trace in kept:
        allowed[splits[trace.id]] |= {citation.document_id for citation in trace.citations}
    sources = []
    for trace in kept:
        shown = next((step.passage_ids for step in trace.steps if step.name == "retrieve"), [])
        retrieved = [c for c in shown if c in chunks and chunks[c].document_id in allowed[splits[trace.id]]]
        support = sorted({citation.chunk_id for citation in trace.citations}, key=lambda c: (chunks[c].document, chunks[c].start))
        sources.append(Source(trace, retrieved, tuple(support), splits[trace.id]))
    return sources, ledger


def rejection(trace: Trace, chunks: dict[str, Chunk]) -> str | None:
    """Why a trace may not teach, or None."""
    if not trace.complete:
        return "incomplete"
    if trace.score is not None and trace.score < ACCEPTED_SCORE:
        return "validated below the threshold"
    if not trace.abstained and not trace.citations:
        return "no citation"
    for citation in trace.citations:
        chunk = chunks.get(citation.chunk_id)
        if chunk is None:
            return "cites a chunk that is no longer in the corpus"
        if find_quote(citation.quote, chunk.text) is None:
            return "quote not verbatim in the cited chunk"
    return None


def assign_splits(traces: list[Trace]) -> dict[str, Literal["train", "validation"]]:
    """Train or validation for each trace: by the split it was imported into, else by whole documents (about a tenth).

    A trace that cites documents on both sides goes to train with both: nothing of it may validate.
    """
    declared = {trace.id for trace in traces if trace.metadata.get("split") == "calibration"}
    documents = sorted({citation.document_id for trace in traces for citation in trace.citations})
    picked = {d for d in documents if int(hashlib.sha256(d.encode()).hexdigest(), 16) % 10 == 0}
    if len(documents) < 5:
        picked = set()  # too few to spare one; the training loss alone is reported
    splits: dict[str, Literal["train", "validation"]] = {}
    for trace in traces:
        cited = {citation.document_id for citation in trace.citations}
        by_document = bool(cited) and cited <= picked and not declared
        splits[trace.id] = "validation" if trace.id in declared or by_document else "train"
    return splits


def render(example: Example, passages: dict[str, str]) -> list[Message]:
    """The prompt of a row, by the renderer that inference uses. `passages` are texts by chunk id."""
    texts = [passages[c] for c in example.passage_ids]
    if example.task == "plan":
        return plan_messages(example.question)
    if example.task == "answer":
        return answer_messages(example.question, texts)
    return validate_messages(example.question, texts, example.proposal)


def read_dataset(folder: Path) -> tuple[list[Example], dict[str, str], dict[str, Any]]:
    """(examples, passage texts by chunk id, summary) of a dataset; raises NotFoundError or StorageError."""
    summary = read_json(folder / "dataset.json")
    examples = [Example.model_validate(row) for row in read_jsonl(folder / "examples.jsonl")]
    return examples, read_json(folder / "passages.json"), summary


def newest_dataset(workspace: Workspace) -> Path:
    """The dataset built last; raises NotFoundError where there is none."""
    found = sorted(workspace.datasets.glob("*/dataset.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NotFoundError("no dataset has been built", "run `understudy dataset build`")
    return found[-1].parent


def summary_of(folder: Path) -> dict[str, Any]:
    """Counts of a dataset."""
    return dict(read_json(folder / "dataset.json"))


def sharing_of(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
    """(tokens of all rows, tokens ÷ distinct trie tokens within each set of passages)."""
    from train.trie import Row, distinct_tokens
    from understudy.chat import encode_example

    groups: dict[tuple[str, ...], list[Row]] = {}
    for example in examples:
        encoded = encode_example(tokenizer, render(example, passages), example.target)
        groups.setdefault(tuple(example.passage_ids), []).append(Row(encoded))
    tokens = sum(len(row.encoded.ids) for rows in groups.values() for row in rows)
    return tokens, tokens / max(1, sum(distinct_tokens(rows) for rows in groups.values()))


def _write_dataset(
    workspace: Workspace, folder: Path, examples: list[Example], shown: dict[str, Chunk], ledger: list[dict[str, str]], traces: dict[str, Trace]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path(workspace, workspace.config.models.base)), local_files_only=True)
    passages = {chunk_id: chunk.text for chunk_id, chunk in sorted(shown.items())}
    tokens, sharing = sharing_of([e for e in examples if e.split == "train"], passages, tokenizer)
    counts = Counter(example.split for example in examples)
    used = {traces[example.trace_id].id: traces[example.trace_id] for example in examples}
    with whole_folder(folder) as scratch:
        for split in ("train", "validation"):
            write_jsonl(scratch / f"{split}.jsonl", [_chat_row(e, passages) for e in examples if e.split == split])
        write_jsonl(scratch / "examples.jsonl", [example.model_dump() for example in examples])
        write_json(scratch / "passages.json", passages)
        write_jsonl(scratch / "ledger.jsonl", ledger)
        write_json(
            scratch / "dataset.json",
            {
                "schema_version": 1,
                "prompt_version": PROMPT_VERSION,
                "examples": {"train": counts["train"], "validation": counts["validation"]},
                "by_step": dict(Counter(example.task for example in examples)),
                "tokens": tokens,
                "sharing": round(sharing, 3),
                "by_kind": dict(Counter(example.kind for example in examples)),
                "tenants": sorted({trace.tenant for trace in used.values()}),
                "group_ids": sorted({g for e in examples if e.split == "train" for g in e.group_ids}),
                "question_digests": sorted({digest_of(e.question) for e in examples if e.split == "train"}),
            },
        )


def _chat_row(example: Example, passages: dict[str, str]) -> dict[str, Any]:
    messages = [message.model_dump() for message in render(example, passages)]
    return {"messages": [*messages, {"role": "assistant", "content": example.target}], "task": example.task, "kind": example.kind, "trace_id": example.trace_id}


def _reasons(ledger: list[dict[str, str]]) -> str:
    return canonical_json(Counter(row["reason"] for row in ledger))
