"""`scripts/bench coverage`: how often our 95 % intervals hold the truth, and how often they find a planted difference.

Two models answer the same made questions, right or wrong. What a question and its document add to both models, and to each alone,
comes from a normal variable whose variance the document's share and the question's share divide (a Gaussian copula), so that the
rates are exact. Coverage is of the difference of the two rates. Documents of equal size, and, in the lines marked so, of sizes as unequal as
1 : 2 : … : G. Writes rag/eval/coverage.json, which the report's "too small" reads, and the tables of docs/evaluation.md; prints
{bench, coverage | power, …} lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from rag.eval.coverage import TABLE
from rag.eval.estimators import Numbers
from rag.eval.resampling import critical, draw_counts, standard_errors
from rag.eval.stats import skewness
from understudy.files import write_text

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
DOCUMENTS, EACH, ALONE = (5, 8, 12, 20, 40), (4, 12, 40), (10, 20, 40, 80, 160, 400)
EFFECTS = (0.0, 0.1, 0.25)  # a document's share of the variance, twice: for both models together, and for each alone
QUESTION_SHARE = 0.4  # of the variance, common to both models
RATES = ((0.02, 0.08), (0.05, 0.15), (0.1, 0.2), (0.3, 0.5), (0.5, 0.5))
PLANTED = (0.0, 0.05, 0.1, 0.2)  # over a rate of 0.4
SIMULATIONS, RESAMPLES = 4000, 2000
ROUNDING = 1e-9


def simulate(generator: np.random.Generator, sizes: list[int], rates: tuple[float, float], effect: float) -> Numbers:
    """Paired differences of right answers [questions, simulations], each -1, 0 or 1; `sizes` are the documents'."""

    def of_documents() -> Numbers:
        return np.repeat(generator.standard_normal((len(sizes), SIMULATIONS)), sizes, axis=0)

    shape = (sum(sizes), SIMULATIONS)
    shared = np.sqrt(effect) * of_documents() + np.sqrt(QUESTION_SHARE) * generator.standard_normal(shape)
    rest = np.sqrt(1 - 2 * effect - QUESTION_SHARE)
    first, second = (shared + np.sqrt(effect) * of_documents() + rest * generator.standard_normal(shape) < ndtri(rate) for rate in rates)
    return second.astype(np.float64) - first


def intervals(differences: Numbers, sizes: list[int]) -> Numbers:
    """[2, simulations] by the product's own draws, errors and ends; every simulation is resampled by the same draws."""
    drawn = np.concatenate(list(draw_counts([str(place) for place in range(len(sizes))], RESAMPLES, 0)))  # [resamples, documents]
    sums = np.add.reduceat(differences, np.cumsum([0, *sizes[:-1]]), axis=0)  # [documents, simulations]
    means = (drawn @ sums) / (drawn @ np.array(sizes, dtype=np.float64))[:, None]
    freedom = sum(sizes) ** 2 / sum(size**2 for size in sizes) - 1
    value, margin = differences.mean(axis=0), critical(freedom) * standard_errors(means.T, len(sizes))
    return np.stack([value - margin, value + margin])


def run(sizes: list[int], rates: tuple[float, float], effect: float) -> tuple[float, float, float]:
    """(coverage, mean width, share of intervals that leave out zero) of one cell."""
    generator = np.random.default_rng([*sizes, int(1000 * sum(rates)), int(100 * effect)])
    low, high = intervals(simulate(generator, sizes, rates, effect), sizes)
    truth = rates[1] - rates[0]
    held = (low <= truth + ROUNDING) & (truth <= high + ROUNDING)
    return float(held.mean()), float((high - low).mean()), float(((low > ROUNDING) | (high < -ROUNDING)).mean())


def sizes_of(documents: int, each: int, is_even: bool = True) -> list[int]:
    """Questions of each document, `each` in the mean; `documents` 0 is `each` questions alone."""
    if not documents:
        return [1] * each
    return [each] * documents if is_even else [max(1, round(2 * each * place / (documents + 1))) for place in range(1, documents + 1)]


def shape_of(rates: tuple[float, float]) -> float:
    """The skewness of such differences, rounded."""
    made = simulate(np.random.default_rng(0), [200], rates, 0.0).ravel()
    return round(skewness([{"exact_match": 0.0}] * len(made), [{"exact_match": value} for value in made.tolist()], "exact_match") or 0.0, 2)


def main() -> None:
    """Simulate every size, and write the table."""
    sizes = [(0, each, True) for each in ALONE] + [(documents, each, even) for documents in DOCUMENTS for each in EACH for even in (True, False)]
    coverage, power = [], []
    shapes = {rates: shape_of(rates) for rates in RATES}
    for documents, each, is_even in sizes:
        of_size = {"documents": documents, "questions_per_document": each, "even": is_even}
        made = sizes_of(documents, each, is_even)
        for effect in EFFECTS if documents else (0.0,):
            for rates in RATES:
                share, width, _ = run(made, rates, effect)
                row = {**of_size, "document_effect": effect, "rates": rates, "skewness": shapes[rates]}
                coverage.append({**row, "coverage": round(share, 4), "width": round(width, 3)})
                print(json.dumps({"bench": "coverage", **coverage[-1]}), flush=True)
        for planted in PLANTED:
            *_, found = run(made, (0.4, 0.4 + planted), 0.1 if documents else 0.0)
            power.append({**of_size, "difference": planted, "found": round(found, 3)})
            print(json.dumps({"bench": "power", **power[-1]}), flush=True)
    write_table({"simulations": SIMULATIONS, "resamples": RESAMPLES, "coverage": coverage, "power": power})


def write_table(content: dict[str, Any]) -> None:
    """The table as JSON, a cell a line."""
    parts = [f'"{name}": {json.dumps(value) if isinstance(value, int) else _lines(value)}' for name, value in content.items()]
    write_text(TABLE, "{\n" + ",\n".join(parts) + "\n}\n")


def _lines(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def tables() -> str:
    """The table's contents as Markdown: a line a size."""
    content = json.loads(TABLE.read_text())
    head = [f"coverage {first:g} → {second:g}" for first, second in RATES] + [f"finds +{planted:g}" for planted in PLANTED[1:]] + ["false alarms"]
    lines = ["| documents × questions | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]

    def size_of(row: dict[str, Any]) -> tuple[int, int, bool]:
        return row["documents"], row["questions_per_document"], row["even"]

    for size in dict.fromkeys(size_of(row) for row in content["coverage"]):
        cells = []
        for rates in RATES:
            shares = [row["coverage"] for row in content["coverage"] if size_of(row) == size and tuple(row["rates"]) == rates]
            cells.append(f"{min(shares):.3f}" if len(shares) == 1 else f"{min(shares):.3f}–{max(shares):.3f}")
        found = {row["difference"]: row["found"] for row in content["power"] if size_of(row) == size}
        cells += [f"{found[planted]:.2f}" for planted in (*PLANTED[1:], 0.0)]
        documents, each, is_even = size
        name = f"{documents} × {each}{'' if is_even else ', unequal'}" if documents else f"{each} alone"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
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
