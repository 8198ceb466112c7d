"""Support by NLI, with a tiny cross-encoder of random weights: shapes, classes and refusals. No trained one has been run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag.eval.entailment import ENTAILED, Entailment, add_entailment
from rag.eval.metrics import score_trace
from understudy.errors import NotFoundError, UsageError

LABELS = {0: "contradiction", 1: "entailment", 2: "neutral"}


def tiny(folder: Path, labels: dict[int, str]) -> Path:
    """A BERT classifier of two layers and thirty words."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir()
    said = "a visitor may borrow up to six books dragons the reading room opens at nine on weekdays ."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *said.split()]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(set(words)), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, id2label=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_sentence_is_supported_where_a_passage_entails_it(tmp_path: Path, ask, reply, corpus) -> None:  # type: ignore[no-untyped-def]
    model = Entailment(tiny(tmp_path / "nli", LABELS))
    pairs = [("the reading room opens", "a visitor may borrow six books"), ("dragons", "six books"), ("dragons", "six books")]
    found = model.probabilities(pairs)
    assert len(found) == 3 and all(0 < probability < 1 for probability in found) and found[1] == pytest.approx(found[2]) and model.probabilities([]) == []
    passages = ["Visitors may borrow.", "The room opens at nine."]
    sentences = ["Dragons borrow six books.", "The room opens."]
    supported = [max(model.probabilities([(passage, sentence) for passage in passages])) >= ENTAILED for sentence in sentences]
    assert model.unsupported(" ".join(sentences), passages) == (2 - sum(supported), 2) and model.unsupported("", passages) == (0, 0)
    traces = [reply(), reply(answer="", abstained=True)]
    rows = [score_trace(trace, ask(), corpus) for trace in traces]
    add_entailment(rows, traces, corpus, model)
    assert rows[0]["nli_sentences"] == 1.0 and rows[0]["unsupported_rate_nli"] in (0.0, 1.0) and "unsupported_rate_nli" not in rows[1]


@pytest.mark.slow
def test_a_model_without_an_entailment_class_or_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no entailment class, but no, yes"):
        Entailment(tiny(tmp_path / "other", {0: "no", 1: "yes"}))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotFoundError, match="no safetensors"):
        Entailment(tmp_path / "pickled")
