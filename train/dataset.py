"""Build a dataset: verified traces in, chat JSONL with splits, a ledger of rejections and lineage out.

datasets/DIGEST/  train.jsonl validation.jsonl  rows {"messages": […]}, as TRL and Fireworks take them; train.jsonl is epoch 0
                  held-out.jsonl                a question file for `evaluate`; no row shows or asks any of it
                  examples.jsonl passages.json  the unrendered rows, so that passages and their order can change by epoch
                  ledger.jsonl dataset.json     which traces were rejected and why; counts and lineage
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rag.eval.labels import reviewed_questions
from rag.prompts import ABSTENTION, PROMPT_VERSION, example_messages
from train.examples import Mix, build_examples, draw_passages, planned_query
from train.ledger import Barred, Rejection, Rules, Verified, verify_traces
from train.replay import Replay, replay_some
from understudy.adapters import manifests
from understudy.digests import canonical_json, digest_of
from understudy.errors import NotFoundError, StorageError, TrainingError, UnderstudyError
from understudy.files import read_json, read_jsonl, whole_folder, write_json, write_jsonl
from understudy.models import model_path
from understudy.records import Example, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDER_VERSION = 2
HELD_OUT_SHARE = 0.1  # of the traces, kept for evaluation where no side was declared on import
IMPORTED = "imported file"  # lineage of a dataset whose rows come from a file of conversations


class NothingToLearn(UnderstudyError):
    """Every trace was rejected, or is no news to the adapter that training goes on from; no dataset is written."""


def build_dataset(
    workspace: Workspace,
    seed: int = 0,
    unverified: bool = False,
    held_out: float = HELD_OUT_SHARE,
    dose: int | None = None,
    no_support: float = Mix.no_support,
    validations: float = Mix.validations,
    barred: Barred | None = None,
    replay: Replay | None = None,
) -> dict[str, Any]:
    """Build the dataset of the traces of experts, teachers and other systems; the result is the command's JSON.

    Imported traces without recovered passages or support take part where `unverified` asks for them; `held_out` is a share of the traces,
    `dose`, `no_support` and `validations` are Mix's; `barred` says why a trace may not teach, besides the rules, `replay` how much of what was learnt
    before is repeated. The same traces, corpus and options give the same digest, and an existing dataset is reused.
    Raises NotFoundError where there are no traces, NothingToLearn where none of them may teach.
    """
    config = workspace.config
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(config.tenant)}
    reviewed = tuple(reviewed_questions(workspace.reports, config.tenant))
    rules = Rules(students_of(workspace), config.retrieval.k if unverified else 0, held_out, reviewed)
    verified = verify_traces(workspace.store.traces(config.tenant), chunks, rules, barred)
    if not verified.sources and not verified.rejections:
        raise NotFoundError("there are no expert traces to learn from", "run `understudy traces import FILE`")
    examples = build_examples(verified.sources, chunks, Mix(k=config.retrieval.k, dose=dose, no_support=no_support, validations=validations), seed)
    if not examples:
        raise NothingToLearn(
            f"no trace may teach: {canonical_json(verified.reasons)}", "see the reasons above; import experts' answers with `understudy traces import FILE`"
        )
    reject_unused(verified, examples)
    replayed = None
    if replay:
        examples, replayed = replay_some(examples, replay, seed)
        if not replayed["new"]:
            raise NothingToLearn("nothing that may teach is new to the adapter that training goes on from", "import experts' answers")
        reject_unused(verified, examples, "learnt before, and not repeated this time")
    shown = {c: chunks[c].text for example in examples for c in example.passage_ids}
    documents = {chunks[c].document_id for c in shown} | {citation.document_id for trace in verified.held_out for citation in trace.citations}
    digest = digest_of(
        [BUILDER_VERSION, PROMPT_VERSION, seed, [e.model_dump() for e in examples], sorted(shown), sorted(trace.id for trace in verified.held_out)]
    )
    folder = workspace.datasets / digest
    if not (folder / "dataset.json").exists():
        facts = {
            "lineage": "traces",
            "prompt_version": PROMPT_VERSION,
            "seed": seed,
            "dose": dose,
            "no_support": no_support,
            "validations": validations,
            "unverified": unverified,
        }
        facts |= {"replay": replayed} if replayed else {}
        facts["document_ids"] = sorted(documents)  # whose text lies in the folder
        rows = {"held-out": [question_row(trace) for trace in verified.held_out]}
        write_dataset(workspace, folder, examples, dict(sorted(shown.items())), facts, rows)
    summary = enter_ledger(folder, verified)
    return {**summary, "dataset": digest, "path": workspace.relative(folder)}


def students_of(workspace: Workspace) -> frozenset[str]:
    """The names under which the model that is trained here answers: the base's and every adapter's."""
    return frozenset({"base", workspace.config.models.base, *(manifest.name for manifest, _ in manifests(workspace))})


def reject_unused(verified: Verified, examples: list[Example], reason: str = "no passage of its side may be shown") -> None:
    """Enter in the ledger what made no row after all."""
    used = {example.trace_id for example in examples}
    for source in verified.sources:
        if source.trace.id not in used:
            verified.reject(source.trace, reason)
    verified.sources = [source for source in verified.sources if source.trace.id in used]


def enter_ledger(folder: Path, verified: Verified) -> dict[str, Any]:
    """Write the ledger of the last build beside its dataset, and its counts into the summary, which is returned.

    The dataset is the newest from then on.
    """
    write_jsonl(folder / "ledger.jsonl", [rejection.model_dump() for rejection in verified.rejections])
    traces = {"kept": len(verified.sources), "held_out": len(verified.held_out), "rejected": len(verified.rejections)}
    summary = {**read_json(folder / "dataset.json"), "traces": traces, "rejected": verified.reasons}
    write_json(folder / "dataset.json", summary)
    return summary


def write_dataset(
    workspace: Workspace,
    folder: Path,
    examples: list[Example],
    passages: dict[str, str],
    facts: dict[str, Any],
    files: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Write a dataset's folder, whole or not at all; `facts` go into its summary, and `files` beside it (rows by name)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path(workspace, workspace.config.models.base)), local_files_only=True)
    train, validation = ([example for example in examples if example.split == split] for split in ("train", "validation"))
    tokens, sharing = sharing_of(train, passages, tokenizer)
    validations = [example for example in examples if example.task == "validate"]
    answers = [example for example in examples if example.task == "answer"]
    summary = {
        "schema_version": 1,
        **facts,
        "examples": {"train": len(train), "validation": len(validation)},
        "by_step": dict(Counter(example.task for example in examples)),
        "by_kind": dict(Counter(example.kind for example in examples)),
        "abstention_share": share(answers, sum(example.target == ABSTENTION for example in answers)),
        "bad_share": share(validations, sum(example.kind.startswith("bad") for example in validations)),
        "tokens": tokens,
        "sharing": round(sharing, 3),
        "tenants": [workspace.config.tenant],
        "group_ids": sorted({g for e in train for g in e.group_ids}),
        "question_digests": sorted({digest_of(e.question) for e in train}),
    }
    with whole_folder(folder) as scratch:
        write_jsonl(scratch / "train.jsonl", [chat_row(epoch_zero(e, facts.get("seed", 0)), passages) for e in train])
        write_jsonl(scratch / "validation.jsonl", [chat_row(e, passages) for e in validation])
        for name, rows in (files or {}).items():
            write_jsonl(scratch / f"{name}.jsonl", rows)
        write_jsonl(scratch / "examples.jsonl", [example.model_dump(exclude_defaults=True) for example in examples])
        write_json(scratch / "passages.json", passages)
        write_jsonl(scratch / "ledger.jsonl", [])
        write_json(scratch / "dataset.json", summary)


def share(rows: list[Example], count: int) -> float | None:
    """A count as a share of rows, None where there are none."""
    return round(count / len(rows), 4) if rows else None


def epoch_zero(example: Example, seed: int) -> Example:
    """A row with the passages that its first epoch shows."""
    return example.model_copy(update={"passage_ids": draw_passages(example, seed, 0)})


def chat_row(example: Example, passages: dict[str, str]) -> dict[str, Any]:
    """A row as TRL and Fireworks take it: the messages and nothing else."""
    messages = [message.model_dump() for message in example_messages(example, passages)]
    return {"messages": [*messages, {"role": "assistant", "content": example.target}]}


def question_row(trace: Trace) -> dict[str, Any]:
    """A held-out trace as a row of a question file."""
    return {
        "id": trace.metadata.get("question_id") or trace.id,
        "question": trace.question,
        "answer": None if trace.abstained else trace.answer,
        "quotes": [citation.quote for citation in trace.citations],
        "documents": [citation.document for citation in trace.citations],
        "pages": [citation.page for citation in trace.citations],
        "query": planned_query(trace),
        "type": trace.metadata.get("type", ""),
        "tenant": trace.tenant,
    }


def rows_to_learn(examples: list[Example], steps: Collection[str]) -> tuple[list[Example], list[Example]]:
    """The (training, validation) rows of these steps; rows of a chat file belong to every step."""
    chosen = [example for example in examples if example.task == "chat" or example.task in steps]
    return [example for example in chosen if example.split == "train"], [example for example in chosen if example.split == "validation"]


def read_dataset(folder: Path) -> tuple[list[Example], dict[str, str], dict[str, Any]]:
    """(examples, passage texts by chunk id, summary) of a dataset.

    Raises NotFoundError, StorageError, or TrainingError where it was built for other prompts than inference renders now.
    """
    summary, passages = read_json(folder / "dataset.json"), read_json(folder / "passages.json")
    rows = read_jsonl(folder / "examples.jsonl")
    try:
        version, examples = summary["prompt_version"], [Example.model_validate(row) for row in rows]
        for chunk_id in {chunk_id for example in examples for chunk_id in example.passage_ids}:
            passages[chunk_id]
    except (ValidationError, KeyError, TypeError) as error:
        raise StorageError(
            f"the dataset {folder.name[:12]} is damaged: {error}", "`dataset lint` names the rows; `understudy dataset build` makes it anew"
        ) from error
    if version not in (PROMPT_VERSION, IMPORTED):
        raise TrainingError(
            f"the dataset {folder.name[:12]} was built for prompts {version}, and these are {PROMPT_VERSION}",
            "run `understudy dataset build`",
        )
    return examples, passages, summary


def read_ledger(folder: Path) -> list[Rejection]:
    """The rejections of the last build of a dataset."""
    return [Rejection.model_validate(row) for row in read_jsonl(folder / "ledger.jsonl")]


def newest_dataset(workspace: Workspace) -> Path:
    """The dataset built last; imported files are none of them. Raises NotFoundError where there is none."""
    found = sorted(workspace.datasets.glob("*/dataset.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    built = next((file.parent for file in found if read_json(file).get("lineage") != IMPORTED), None)
    if built is None:
        raise NotFoundError("no dataset has been built", "run `understudy dataset build`")
    return built


def find_dataset(workspace: Workspace, name: str | None = None) -> Path:
    """The folder of a dataset: the newest, or the one called by its digest's beginning, its folder, or a file of conversations (imported then).

    Raises NotFoundError, and what import_chat_file raises.
    """
    if not name:
        return newest_dataset(workspace)
    path = Path(name)
    if path.is_file():
        from train.chat_file import import_chat_file

        return import_chat_file(workspace, path)
    if (path / "dataset.json").is_file():
        return path
    matching = [folder.parent for folder in workspace.datasets.glob("*/dataset.json") if folder.parent.name.startswith(name)]
    if len(matching) != 1:
        raise NotFoundError(f"no single dataset is called {name}", "give a folder, a chat JSONL file, or the beginning of a digest in datasets/")
    return matching[0]


def sharing_of(examples: Iterable[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
    """(tokens of all rows, tokens ÷ distinct trie tokens within each set of passages)."""
    from train.trie import Row, distinct_tokens
    from understudy.chat import encode_example

    groups: dict[tuple[str, ...], list[Row]] = {}
    for example in examples:
        encoded = encode_example(tokenizer, example_messages(example, passages), example.target)
        groups.setdefault(tuple(example.passage_ids), []).append(Row(encoded))
    tokens = sum(len(row.encoded.ids) for rows in groups.values() for row in rows)
    return tokens, tokens / max(1, sum(distinct_tokens(rows) for rows in groups.values()))
