"""Write tests/rag/eval/data/references.json: what rouge-score and pytrec_eval (trec_eval) say of made inputs.

python -m venv /tmp/references && /tmp/references/bin/pip install rouge-score==0.1.2 pytrec_eval-terrier==0.5.11
/tmp/references/bin/python scripts/metric_references.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytrec_eval
from rouge_score import rouge_scorer
from transformers.data.metrics import squad_metrics

TARGET = Path(__file__).parent.parent / "tests" / "rag" / "eval" / "data" / "references.json"
WORDS = [
    "the",
    "provider",
    "shall",
    "keep",
    "records",
    "for",
    "ten",
    "years",
    "after",
    "its",
    "high-risk",
    "system",
    "was",
    "placed",
    "on",
    "the",
    "market",
    "(Article",
    "18).",
]


def squad(generator: random.Random) -> list[dict[str, object]]:
    """Texts of words with articles, marks and repeats, in lengths from nothing on."""
    words = ["the", "a", "An", "owl", "Owl,", "cat.", "1,200", "high-risk", "“owl”", ""]
    rows = []
    for _ in range(60):
        prediction, answer = (" ".join(generator.choices(words, k=generator.randrange(0, 6))) for _ in range(2))
        f1, exact = squad_metrics.compute_f1(answer, prediction), squad_metrics.compute_exact(answer, prediction)
        rows.append({"prediction": prediction, "answer": answer, "f1": float(f1), "exact": exact})
    return rows


def rouge(generator: random.Random) -> list[dict[str, object]]:
    """Texts of words drawn with repeats, in lengths from nothing on."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rows = []
    for _ in range(60):
        prediction, answer = (" ".join(generator.choices(WORDS, k=generator.randrange(0, 16))) for _ in range(2))
        rows.append({"prediction": prediction, "answer": answer, "rouge_l": scorer.score(answer, prediction)["rougeL"].fmeasure})
    return rows


def ranking(generator: random.Random) -> list[dict[str, object]]:
    """Rankings of 8 with relevant passages in and out of them."""
    rows = []
    for _ in range(60):
        found = [generator.random() < 0.3 for _ in range(8)]
        missed = generator.randrange(0, 4)
        qrels = {f"d{place}": int(is_relevant) for place, is_relevant in enumerate(found)} | {f"m{number}": 1 for number in range(missed)}
        if not any(qrels.values()):
            continue
        run = {f"d{place}": float(100 - place) for place in range(len(found))}
        measures = {"P_3", "P_8", "recall_3", "recall_8", "recip_rank", "ndcg_cut_3", "ndcg_cut_8"}
        values = pytrec_eval.RelevanceEvaluator({"q": qrels}, {"P.3,8", "recall.3,8", "recip_rank", "ndcg_cut.3,8"}).evaluate({"q": run})["q"]
        rows.append({"found": found, "relevant": sum(qrels.values()), **{name: values[name] for name in sorted(measures)}})
    return rows


if __name__ == "__main__":
    generator = random.Random(0)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps({"rouge": rouge(generator), "ranking": ranking(generator), "squad": squad(generator)}, indent=0) + "\n")
