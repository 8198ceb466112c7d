"""Fine-tune the embedder on what the traces cite: a bi-encoder, contrastive, with hard negatives.

A question (and the expert's search query for it) is drawn to the passage that its answer quotes, and away from a passage that
retrieval returned and nothing quotes, and from the other passages of the batch: multiple negatives ranking loss (Henderson et al.,
arXiv:1705.00652; sentence-transformers' own). No passage that supports a question is ever among its negatives.
"""

from __future__ import annotations

import importlib.metadata
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rag.embed import has_bfloat16
from train.base import keep_freed_memory
from train.checkpoint import Position, TrainingState, load_checkpoint, save_checkpoint, seed_step
from train.dataset import newest_dataset, read_dataset
from train.examples import planned_query
from train.recipe import RetrieverRecipe
from train.support import holds_answer
from understudy.digests import digest_of, digest_of_files
from understudy.errors import TrainingError, UsageError
from understudy.files import read_json, whole_folder, write_json
from understudy.models import CARD, LEARNT, model_path, weights_digest
from understudy.progress import Progress
from understudy.records import SCHEMA_VERSION, Chunk, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGES = ("torch", "transformers", "sentence-transformers")
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Pair:
    """What somebody asks and a passage that answers it."""

    asked: str
    positive: str
    negatives: tuple[str, ...]  # retrieved, nearest first, and no support
    support: frozenset[str]  # every passage that must not be its negative; the positive is one


@dataclass(frozen=True)
class Triplet:
    """A pair with the hard negative of this epoch; None where retrieval returned none."""

    pair: Pair
    negative: str | None

    @property
    def passages(self) -> set[str]:
        """What it puts among the others' negatives."""
        return {self.pair.positive, *([self.negative] if self.negative else [])}


def tune_retriever(workspace: Workspace, recipe: RetrieverRecipe, report: Callable[[str], None], progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Tune the configured embedder on the newest dataset's training traces into models/NAME; the result is the command's JSON.

    The same dataset, base and recipe make one run: finished, its embedder is returned; interrupted, it goes on from its last
    checkpoint, at most a minute back. Recall@k before and after is measured on the dataset's validation questions, whose documents were not
    trained on. Raises UsageError where NAME is taken by another model, TrainingError where there is nothing to learn from.
    """
    from train.recall import compare_recall

    keep_freed_memory()
    dataset = newest_dataset(workspace)
    base_id = workspace.config.models.embedder
    base = model_path(workspace, base_id)
    key = digest_of([dataset.name, embedder_digest(base), recipe.model_dump()])
    target = workspace.models / recipe.name
    if (target / LEARNT).exists() and read_json(target / LEARNT)["key"] == key:
        report("this recipe was already trained on this dataset and embedder: its model is reused")
        return dict(read_json(target / LEARNT)["result"]) | {"reused": True}
    if target.exists():
        raise UsageError(f"there is a model {recipe.name} already", "choose another with name=…: indexes were made with that one")
    train_traces, validation_traces, group_ids = split_traces(workspace, dataset)
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(workspace.config.tenant)}
    pairs = make_pairs(train_traces, chunks)
    report(f"{len(pairs)} pairs from {len(train_traces)} questions; tuning {base_id}")
    model = load_model(base)
    run = workspace.runs / key
    position = fit_pairs(model, pairs, recipe, run, report, progress)
    tuned = run / "tuned"
    save_model(model, tuned)
    precision = workspace.config.models.embedder_precision
    recall = compare_recall(workspace, base, tuned, precision, validation_traces, chunks)
    result = {
        "embedder": recipe.name,
        "path": workspace.relative(target),
        "digest": weights_digest(tuned),
        "base": base_id,
        "dataset": dataset.name,
        "pairs": len(pairs),
        "seconds": round(position.seconds, 1),
        "loss": {"first": position.losses[0], "last": sum(position.losses[-10:]) / len(position.losses[-10:])},
        "recall": recall,
    }
    _register(target, tuned, key, result, recipe, embedder_digest(base), group_ids)
    shutil.rmtree(run, ignore_errors=True)
    return result


def split_traces(workspace: Workspace, dataset: Path) -> tuple[list[Trace], list[Trace], list[str]]:
    """(training, validation, documents of the training ones): the dataset's answered traces, as it split them."""
    examples, _, summary = read_dataset(dataset)
    splits = {example.trace_id: example.split for example in examples}
    traces = [trace for trace in workspace.store.traces(workspace.config.tenant) if trace.id in splits and trace.citations]
    sides = {split: [trace for trace in traces if splits[trace.id] == split] for split in ("train", "validation")}
    return sides["train"], sides["validation"], list(summary["group_ids"])


def make_pairs(traces: Iterable[Trace], chunks: dict[str, Chunk], without: frozenset[str] = frozenset()) -> list[Pair]:
    """Each question and search query with each passage it cites; nothing from the documents in `without`.

    Raises TrainingError where no trace cites a passage that is still there.
    """
    by_document: dict[str, list[Chunk]] = {}
    for chunk in chunks.values():
        by_document.setdefault(chunk.document_id, []).append(chunk)
    pairs = []
    for trace in traces:
        documents = {citation.document_id for citation in trace.citations}
        if documents & without:
            continue
        cited = dict.fromkeys(c.chunk_id for c in trace.citations if c.chunk_id in chunks)
        support = frozenset(chunk.text for d in documents for chunk in by_document.get(d, []) if chunk.id in cited or holds_answer(trace, chunk))
        shown = dict.fromkeys(c for step in trace.steps if step.name == "retrieve" for c in step.passage_ids if c in chunks)
        negatives = [chunks[c].text for c in shown if chunks[c].document_id not in without and not holds_answer(trace, chunks[c])]
        near = tuple(text for text in dict.fromkeys(negatives) if text not in support)
        for asked in dict.fromkeys(text for text in (trace.question, planned_query(trace)) if text):
            pairs += [Pair(asked, chunks[c].text, near, support) for c in cited]
    if not pairs:
        raise TrainingError("no trace cites a passage to learn from", "import more answers with `understudy traces import`, then build the dataset again")
    return pairs


def deal(pairs: list[Pair], recipe: RetrieverRecipe, epoch: int) -> list[list[Triplet]]:
    """The batches of one epoch: every pair once, in an order and with hard negatives drawn from the seed.

    No passage in a batch supports a pair whose positive it is not.
    """
    rng = random.Random(f"{recipe.seed}/{epoch}")
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    batches: list[tuple[list[Triplet], set[str], set[str]]] = []  # with their passages and supports
    open_batches: list[tuple[list[Triplet], set[str], set[str]]] = []
    for pair in shuffled:
        triplet = Triplet(pair, rng.choice(pair.negatives[: recipe.negative_depth]) if pair.negatives else None)
        place = next((b for b in open_batches if not (b[1] & pair.support) and not (b[2] & triplet.passages)), None)
        if place is None:
            place = ([], set(), set())
            batches.append(place)
            open_batches.append(place)
        place[0].append(triplet)
        place[1].update(triplet.passages)
        place[2].update(pair.support)
        if len(place[0]) == recipe.batch:
            open_batches.remove(place)
    return [batch for batch, _, _ in batches]


def fit_pairs(
    model: SentenceTransformer, pairs: list[Pair], recipe: RetrieverRecipe, run: Path, report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> Position:
    """The loop: AdamW, linear warm-up and decay, a checkpoint a minute. Raises TrainingError when a gradient is not finite."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(recipe.seed)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.01)
    state = TrainingState(parameters, optimizer)
    load_checkpoint(run, state)
    position = state.position
    if position.steps:
        report(f"resuming at step {position.steps}, after {position.seconds:.0f} s of training")
    loss_of = MultipleNegativesRankingLoss(model, scale=recipe.scale)
    batches = [batch for epoch in range(recipe.epochs) for batch in deal(pairs, recipe, epoch)]
    model.train()
    saved = time.monotonic()
    with progress("tuning the retriever", len(batches)) as bar:
        bar.advance(position.steps)
        for batch in batches[position.steps :]:
            began = time.monotonic()
            seed_step(recipe.seed, position.steps)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu" or has_bfloat16()):
                loss = loss_of([model.preprocess(column) for column in columns_of(batch)], None)
            loss.backward()
            if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)):
                raise TrainingError(f"the gradient is not finite (loss {loss.item():.3f})", "tune again with a lower learning_rate")
            for group in optimizer.param_groups:
                group["lr"] = rate_at(position.steps / len(batches), recipe)
            optimizer.step()
            optimizer.zero_grad()
            position.steps += 1
            position.seconds += time.monotonic() - began
            position.losses.append(loss.item())
            bar.advance(note=f"loss {loss.item():.3f}")
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(run, state)
                saved = time.monotonic()
    save_checkpoint(run, state)
    model.eval()
    return position


def columns_of(batch: list[Triplet]) -> list[list[str]]:
    """Questions, their passages, and hard negatives; these are left out where some question has none."""
    columns = [[t.pair.asked for t in batch], [t.pair.positive for t in batch]]
    negatives = [t.negative for t in batch if t.negative is not None]
    return [*columns, negatives] if len(negatives) == len(batch) else columns


def rate_at(done: float, recipe: RetrieverRecipe) -> float:
    """Linear warm-up, then linear decay to zero over the share `done`."""
    warm = min(1.0, (done + 1e-3) / recipe.warmup_ratio) if recipe.warmup_ratio else 1.0
    return recipe.learning_rate * warm * (1.0 - done)


def embedder_digest(folder: Path) -> str:
    """Sha256 over an embedder's weights, wherever in its folder they lie."""
    return digest_of_files(folder.rglob("*.safetensors"))


def load_model(folder: Path) -> SentenceTransformer:
    """An embedder in float32, on the GPU if there is one."""
    from sentence_transformers import SentenceTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False)


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Write an embedder's folder: safetensors, tokenizer, pooling."""
    with whole_folder(folder) as scratch:
        model.save_pretrained(str(scratch), create_model_card=False)


def _register(target: Path, tuned: Path, key: str, result: dict[str, Any], recipe: RetrieverRecipe, base_digest: str, group_ids: list[str]) -> None:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "base_digest": base_digest,
        "recipe": recipe.model_dump(),
        "group_ids": group_ids,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "result": result,
    }
    with whole_folder(target) as scratch:
        shutil.copytree(tuned, scratch, dirs_exist_ok=True)
        write_json(scratch / LEARNT, manifest)
        card = {"id": recipe.name, "origin": f"{result['base']}, tuned on dataset {result['dataset'][:12]}", "weights_digest": result["digest"]}
        write_json(scratch / CARD, card)
