"""`scripts/bench coverage`: how often our 95 % intervals hold the truth, and how often they find a planted difference.

Two models answer the same made questions, right or wrong. What a question and its document add to both models, and to each alone,
comes from a normal variable whose variance the document's share and the question's share divide (a Gaussian copula), so that the
rates are exact. Coverage is of the difference of the two rates. Writes rag/eval/coverage.json, which the report's "too small" reads,
and the tables of docs/evaluation.md; prints {bench, coverage | power, …} lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from rag.eval.coverage import TABLE
from rag.eval.estimators import Numbers
from rag.eval.resampling import draw_counts, make_interval
from understudy.files import write_json, write_text

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
DOCUMENTS, EACH, ALONE = (5, 8, 12, 20, 40), (4, 12, 40), (10, 20, 40, 80, 160, 400)
EFFECTS = (0.0, 0.1, 0.25)  # a document's share of the variance, twice: for both models together, and for each alone
QUESTION_SHARE = 0.4  # of the variance, common to both models
RATES = ((0.05, 0.15), (0.3, 0.5), (0.5, 0.5))
PLANTED = (0.0, 0.05, 0.1, 0.2)  # over a rate of 0.4
SIMULATIONS, RESAMPLES = 2000, 2000


def simulate(generator: np.random.Generator, documents: int, each: int, rates: tuple[float, float], effect: float) -> Numbers:
    """Paired differences of right answers [questions, simulations], each -1, 0 or 1."""

    def of_documents() -> Numbers:
        return np.repeat(generator.standard_normal((documents, SIMULATIONS)), each, axis=0)

    shared = np.sqrt(effect) * of_documents() + np.sqrt(QUESTION_SHARE) * generator.standard_normal((documents * each, SIMULATIONS))
    rest = np.sqrt(1 - 2 * effect - QUESTION_SHARE)
    first, second = (
        shared + np.sqrt(effect) * of_documents() + rest * generator.standard_normal((documents * each, SIMULATIONS)) < ndtri(rate) for rate in rates
    )
    return second.astype(np.float64) - first


def intervals(differences: Numbers, drawn: Numbers) -> Numbers:
    """[simulations, 2] by the product's own draws [resamples, questions] and ends; every simulation is resampled by the same draws."""
    means = drawn @ differences.astype(np.float32) / len(differences)
    found = [make_interval(float(differences[:, place].mean()), means[:, place]) for place in range(differences.shape[1])]
    return np.array([[interval.low, interval.high] for interval in found])


def draw(documents: int, each: int) -> Numbers:
    """How often each question is drawn, [resamples, questions]; `documents` 0 is `each` questions alone."""
    clusters = [str(place // each) for place in range(documents * each)] or [str(place) for place in range(each)]
    return np.concatenate(list(draw_counts(clusters, RESAMPLES, 0))).astype(np.float32)


def run(documents: int, each: int, rates: tuple[float, float], effect: float, drawn: Numbers) -> tuple[float, float, float]:
    """(coverage, mean width, share of intervals that leave out zero) of one cell."""
    generator = np.random.default_rng([documents, each, int(1000 * sum(rates)), int(100 * effect)])
    differences = simulate(generator, documents or each, each if documents else 1, rates, effect)
    low, high = intervals(differences, drawn).T
    truth = rates[1] - rates[0]
    return float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean()), float(((low > 0) | (high < 0)).mean())


def main() -> None:
    """Simulate every size, and write the table."""
    sizes = [(0, each) for each in ALONE] + [(documents, each) for documents in DOCUMENTS for each in EACH]
    coverage, power = [], []
    for documents, each in sizes:
        drawn = draw(documents, each)
        for effect in EFFECTS if documents else (0.0,):
            for rates in RATES:
                share, width, _ = run(documents, each, rates, effect, drawn)
                row = {"documents": documents, "questions_per_document": each, "document_effect": effect, "rates": rates}
                coverage.append({**row, "coverage": round(share, 4), "width": round(width, 3)})
                print(json.dumps({"bench": "coverage", **coverage[-1]}), flush=True)
        for planted in PLANTED:
            *_, found = run(documents, each, (0.4, 0.4 + planted), 0.1 if documents else 0.0, drawn)
            power.append({"documents": documents, "questions_per_document": each, "difference": planted, "found": round(found, 3)})
            print(json.dumps({"bench": "power", **power[-1]}), flush=True)
    write_json(TABLE, {"simulations": SIMULATIONS, "resamples": RESAMPLES, "coverage": coverage, "power": power})


def tables() -> str:
    """The table's contents as Markdown: a line a size."""
    content = json.loads(TABLE.read_text())
    head = [f"coverage {first:g} → {second:g}" for first, second in RATES] + [f"finds +{planted:g}" for planted in PLANTED[1:]] + ["false alarms"]
    lines = ["| documents × questions | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for size in dict.fromkeys((row["documents"], row["questions_per_document"]) for row in content["coverage"]):
        of_size = [row for row in content["coverage"] if (row["documents"], row["questions_per_document"]) == size]
        cells = []
        for rates in RATES:
            shares = [row["coverage"] for row in of_size if tuple(row["rates"]) == rates]
            cells.append(f"{min(shares):.3f}" if len(shares) == 1 else f"{min(shares):.3f}–{max(shares):.3f}")
        found = {row["difference"]: row["found"] for row in content["power"] if (row["documents"], row["questions_per_document"]) == size}
        cells += [f"{found[planted]:.2f}" for planted in (*PLANTED[1:], 0.0)]
        lines.append(f"| {f'{size[0]} × {size[1]}' if size[0] else f'{size[1]} alone'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables() -> None:
    """Put the tables between their marks in docs/evaluation.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- coverage -->\n")
    write_text(DOCS, f"{before}<!-- coverage -->\n{tables()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    if "--tables" not in sys.argv:
        main()
    write_tables()
