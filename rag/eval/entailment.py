"""Faithfulness by a local NLI model: a sentence is supported where some passage that was shown entails it.

A cross-encoder for natural language inference in models/, named by evaluate.nli (such as cross-encoder/nli-deberta-v3-small); never required.
The lexical evidence of rag.eval.evidence stays beside it: it needs no model, and errs differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rag.eval.evidence import shown_chunks, split_sentences
from rag.eval.metrics import Row
from understudy.errors import NotFoundError, UsageError
from understudy.records import Chunk, Trace

ENTAILED = 0.5  # probability from which on a passage entails a sentence
BATCH = 16  # pairs at once


class Entailment:
    """A sentence-transformers cross-encoder with an entailment class. Raises NotFoundError, UsageError where the folder holds none."""

    def __init__(self, path: Path) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        if not list(path.glob("*.safetensors")):
            raise NotFoundError(f"no safetensors weights in {path}", "name a cross-encoder for NLI in models/ with evaluate.nli")
        self._model = CrossEncoder(str(path), device="cpu", local_files_only=True, trust_remote_code=False, activation_fn=torch.nn.Softmax(dim=-1))
        labels: Mapping[int, str] = self._model.config.id2label
        classes = [place for place, label in labels.items() if label.lower().startswith("entail")]
        if len(classes) != 1:
            raise UsageError(f"{path.name} has no entailment class, but {', '.join(labels.values())}", "name a cross-encoder that was trained on NLI")
        self._entailment = int(classes[0])

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Of each (premise, hypothesis), the probability in [0, 1] that the first entails the second."""
        if not pairs:
            return []
        scores = self._model.predict(list(pairs), batch_size=BATCH, show_progress_bar=False)  # [pairs, classes]
        return [float(score) for score in scores[:, self._entailment]]

    def unsupported(self, answer: str, passages: Sequence[str]) -> tuple[int, int]:
        """(sentences that no passage entails, all sentences) of an answer."""
        sentences = split_sentences(answer)
        pairs = [(passage, sentence) for sentence in sentences for passage in passages]
        found = dict(zip(pairs, self.probabilities(pairs), strict=True))
        supported = [any(found[passage, sentence] >= ENTAILED for passage in passages) for sentence in sentences]
        return len(sentences) - sum(supported), len(sentences)


def add_entailment(rows: Sequence[Row], traces: Sequence[Trace], chunks: dict[str, Chunk], entailment: Entailment) -> None:
    """Set each row's `unsupported_rate_nli`, of the answers that rest on passages: share of the sentences that no passage shown entails."""
    for row, trace in zip(rows, traces, strict=True):
        if row["unsupported_rate"] is not None:
            wrong, sentences = entailment.unsupported(trace.answer, [chunk.text for chunk in shown_chunks(trace, chunks)])
            row["nli_sentences"] = float(sentences)
            row["unsupported_rate_nli"] = wrong / sentences if sentences else None
