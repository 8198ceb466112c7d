"""The report's plots of what answers withstand: a curve over the number of distractors, one over the place of the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rag.eval.charts import INK, LINE, MARKERS, add_legend, model_color, plot_axes, styled, svg


def plot_doses(section: dict[str, Any], places: dict[str, int]) -> str:
    """Token-F1 by the number of distractors beside the evidence; `places` are the models' in the report."""
    names = [condition["name"] for condition in section["conditions"] if condition["family"] == "distractors"]
    doses = [int(name.split()[0]) for name in names]
    return _plot(section, places, names, [float(dose) for dose in doses], [str(dose) for dose in doses], "distractors beside the evidence", "dose")


def plot_positions(section: dict[str, Any], places: dict[str, int]) -> str:
    """Token-F1 by the place of the evidence among the passages."""
    names = [condition["name"] for condition in section["conditions"] if condition["family"] == "position"]
    labels = [name.removeprefix("evidence ") for name in names]
    return _plot(section, places, names, [float(place) for place in range(len(names))], labels, "place of the evidence", "position")


def _plot(section: dict[str, Any], places: dict[str, int], names: Sequence[str], xs: Sequence[float], labels: Sequence[str], axis: str, kind: str) -> str:
    shown = [model for model in section["models"] if any(condition["name"] in names for condition in model["conditions"])]
    with styled():
        figure, axes = plot_axes(2.6)
        described = []
        span = (max(xs) - min(xs)) or 1.0
        for turn, model in enumerate(shown):
            found = {condition["name"]: condition["metrics"].get("token_f1") for condition in model["conditions"]}
            points = [(x, found[name]) for x, name in zip(xs, names, strict=True) if found.get(name)]
            color, aside = model_color(places[model["name"]]), (turn - (len(shown) - 1) / 2) * 0.012 * span
            for x, point in points:
                if point["low"] is not None:
                    axes.plot([x + aside] * 2, [point["low"], point["high"]], color=color, linewidth=1.4, alpha=0.6)
            at, values = [x + aside for x, _ in points], [point["value"] for _, point in points]
            axes.plot(at, values, color=color, linewidth=2, marker=MARKERS[places[model["name"]] % len(MARKERS)], markersize=6, label=model["name"])
            described.append(f"{model['name']}: " + ", ".join(f"{labels[xs.index(x)]} {point['value']:.2f}" for x, point in points))
        axes.set_xticks(list(xs), list(labels))
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelcolor=INK)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_xlabel(axis)
        axes.set_ylabel("token-F1")
        add_legend(axes)
        return svg(figure, f"robustness-{kind}", f"Token-F1 by {axis}", "; ".join(described) or "nothing was asked")
