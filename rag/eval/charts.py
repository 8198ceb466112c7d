"""The report's plots, by matplotlib, as inline SVG that takes its colours from the page.

Colours are drawn as placeholders and then replaced by the style sheet's variables, so one SVG is right in light
and in dark mode; text stays text. Equal data gives equal bytes: ids are salted, and there is no date.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from rag.eval.estimators import Numbers
from rag.eval.metrics import METRICS, Row, column
from rag.eval.reliability import reliability_curve
from rag.eval.resampling import Interval
from rag.eval.stats import Comparison
from understudy.digests import digest_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.4  # inches, of 72 SVG units
INK, SOFT, LINE, GAIN, LOSS = "#010203", "#010204", "#010205", "#010206", "#010207"
MODELS = [f"#01021{place}" for place in range(8)]  # the first is the baseline
MARKERS = "osD^vPX*"  # models differ in more than colour
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", GAIN: "gain", LOSS: "loss", **{color: f"m{n}" for n, color in enumerate(MODELS)}}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "understudy",  # ids do not depend on chance
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a model's name may hold dollar signs
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.axisbelow": True,
}


def color_place(place: int) -> int:
    """Which of the page's colours the model at this place of the report has."""
    return 0 if place == 0 else 1 + (place - 1) % (len(MODELS) - 1)


def model_color(place: int) -> str:
    """The placeholder colour of the model at this place of the report."""
    return MODELS[color_place(place)]


def plot_forest(comparisons: Sequence[Comparison], name: str) -> str:
    """Paired differences of the share metrics with their intervals, better always to the right."""
    shown = [c for c in comparisons if METRICS[c.metric].unit == "share" and c.low is not None]
    with styled():
        figure, axes = plot_axes(0.55 + 0.3 * max(1, len(shown)))
        for place, comparison in enumerate(shown):
            sign = -1 if METRICS[comparison.metric].better == "lower" else 1
            middle, *ends = (sign * (value or 0.0) for value in (comparison.difference, comparison.low, comparison.high))
            color = GAIN if comparison.is_gain else LOSS if comparison.is_loss else SOFT
            fill = "none" if color == SOFT else color
            axes.plot(sorted(ends), [place, place], color=color, linewidth=2.2, solid_capstyle="round")
            axes.plot([middle], [place], marker="o", markersize=6.5, color=color, markerfacecolor=fill, markeredgewidth=1.6)
        axes.axvline(0, color=INK, linewidth=1)
        labels = [METRICS[c.metric].label + (" (fewer)" if METRICS[c.metric].better == "lower" else "") for c in shown]
        axes.set_yticks(range(len(shown)), labels)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.tick_params(length=0)
        axes.set_xlabel("← worse   ·   difference   ·   better →")
        rows = [f"{METRICS[c.metric].label} {c.difference:+.2f} from {c.low:+.2f} to {c.high:+.2f}" for c in shown]
        return svg(figure, f"forest-{name}", f"Paired differences of {name}, with 95 % intervals", "; ".join(rows))


def plot_latency(seconds: dict[str, dict[str, list[float]]]) -> str:
    """Seconds by step, dot at the median and line to the 95th percentile; `seconds` by model, then step."""
    names = [step for step in dict.fromkeys(step for by_step in seconds.values() for step in by_step) if any(by_step.get(step) for by_step in seconds.values())]
    with styled():
        figure, axes = plot_axes(0.6 + len(names) * (0.16 + 0.17 * len(seconds)))
        described = []
        for place, (model, by_step) in enumerate(seconds.items()):
            color = model_color(place)
            for row, step in enumerate(names):
                if not by_step.get(step):
                    continue
                middle, high = np.percentile(by_step[step], [50, 95], method="inverted_cdf")
                height = row + (place - (len(seconds) - 1) / 2) * 0.72 / max(1, len(seconds))
                axes.plot([middle, high], [height, height], color=color, linewidth=2, solid_capstyle="butt")
                axes.plot([middle], [height], marker="o", markersize=6, color=color, linestyle="none")
                axes.plot([high], [height], marker="|", markersize=7, markeredgewidth=2, color=color, linestyle="none")
                described.append(f"{model} {step} {middle:.2f} s, {high:.2f} s")
            if any(by_step.values()):
                axes.plot([], [], color=color, marker="o", linewidth=2, label=model)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.tick_params(length=0)
        axes.set_xlabel("seconds: dot median, bar 95th percentile")
        add_legend(axes)
        return svg(figure, "latency", "Latency by step, median and 95th percentile", "; ".join(described))


def plot_frontier(points: Sequence[tuple[str, float | None, Interval]]) -> str:
    """Each model's median seconds against its token-F1, with its 95 % interval; the line joins those that no other beats in both."""
    known = [(place, name, seconds, quality) for place, (name, seconds, quality) in enumerate(points) if seconds is not None and quality.value is not None]
    measured = [(seconds, quality.value or 0.0) for _, _, seconds, quality in known]
    unbeaten = sorted(point for point in set(measured) if not any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in measured))
    with styled():
        figure, axes = plot_axes(2.6)
        if len(unbeaten) > 1:
            axes.step(*zip(*unbeaten, strict=True), where="post", color=SOFT, linewidth=1, dashes=(3, 3))
        described = []
        for (place, name, _, quality), (seconds, value) in zip(known, measured, strict=True):
            color = model_color(place)
            if quality.low is not None and quality.high is not None:
                axes.plot([seconds, seconds], [quality.low, quality.high], color=color, linewidth=1.6, alpha=0.6)
            axes.plot([seconds], [value], marker=MARKERS[place % len(MARKERS)], markersize=8, color=color, linestyle="none", label=name)
            described.append(f"{name} {seconds:.2f} s, token-F1 {value:.2f}")
        axes.set_xlim(left=0)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(color=LINE, linewidth=0.7)
        axes.tick_params(length=0)
        axes.set_xlabel("median seconds of a run  (← faster)")
        axes.set_ylabel("token-F1")
        add_legend(axes)
        return svg(figure, "frontier", "Latency and quality", "; ".join(described) or "nothing was timed")


def plot_history(series: dict[str, list[tuple[float, float, float, float]]], metric: str, name: str) -> str:
    """A metric over time; `series` are (seconds since the epoch, value, low, high) by model."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num

    with styled():
        figure, axes = plot_axes(2.4)
        described = []
        for place, (model, points) in enumerate(series.items()):
            color = model_color(place)
            days = [float(date2num(datetime.fromtimestamp(at, UTC))) for at, *_ in points]
            values, lows, highs = ([point[column] for point in points] for column in (1, 2, 3))
            axes.vlines(days, lows, highs, color=color, linewidth=1.4, alpha=0.6)
            axes.plot(days, values, color=color, linewidth=2, marker="o", markersize=5, label=model)
            described.append(f"{model}: {', '.join(f'{value:.2f}' for value in values)}")
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.tick_params(length=0)
        add_legend(axes, METRICS[metric].label)
        return svg(figure, f"history-{name}", f"{METRICS[metric].label} over time", "; ".join(described))


def plot_scores(name: str, rows: Sequence[Row], place: int) -> str:
    """A model's validation scores: how often right in each band of the score, and how scores of right and wrong answers spread."""
    scores, right = column(rows, "score"), column(rows, "is_right")
    known = ~np.isnan(scores) & ~np.isnan(right)
    scores, is_right = scores[known], right[known] == 1
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        reliability, histogram = figure.subplots(1, 2)
        described = _draw_reliability(reliability, scores, is_right, model_color(place))
        _draw_histogram(histogram, scores, is_right)
        for axes in (reliability, histogram):
            axes.set_xlim(-0.02, 1.02)
            axes.set_xlabel("validation score")
            axes.grid(axis="y", color=LINE, linewidth=0.7)
            axes.tick_params(length=0)
            axes.tick_params(axis="y", labelcolor=SOFT)
        return svg(figure, f"scores-{name}", f"Validation scores of {name}", described)


def _draw_reliability(axes: Axes, scores: Numbers, is_right: np.ndarray, color: str) -> str:
    """Share of right answers in each band of the score, dots as large as the band is full."""
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, dashes=(3, 3))
    bands = reliability_curve(scores, is_right.astype(np.float64)) if len(scores) else []
    if bands:
        xs, ys, counts = (np.array(values) for values in zip(*((band.score, band.share_right, band.count) for band in bands), strict=True))
        axes.plot(xs, ys, color=color, linewidth=2)
        axes.scatter(xs, ys, s=18 + 160 * counts / counts.sum(), color=color, zorder=3)
    axes.set_ylim(-0.04, 1.08)
    axes.set_title("How often right, by score", loc="left", color=INK)
    axes.set_ylabel("share right")
    return "; ".join(f"score {band.score:.2f}: {band.share_right:.0%} right of {band.count}" for band in bands) or "no scores"


def _draw_histogram(axes: Axes, scores: Numbers, is_right: np.ndarray) -> None:
    """Scores of right and wrong answers, side by side; filled or hollow, so that colour alone tells nothing."""
    from matplotlib.ticker import MaxNLocator

    edges = np.linspace(0, 1, 11)
    for offset, chosen, label, color, fill in ((0.006, is_right, "right", GAIN, True), (0.05, ~is_right, "wrong", LOSS, False)):
        counts, _ = np.histogram(scores[chosen], edges)
        face = color if fill else "none"
        axes.bar(edges[:-1] + offset, counts, 0.042, align="edge", label=label, facecolor=face, edgecolor=color, linewidth=1.2)
    axes.set_title("Scores given", loc="left", color=INK)
    axes.set_ylabel("answers")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handlelength=1, handleheight=0.8)


def styled() -> AbstractContextManager[None]:
    """Matplotlib set to the page's style, for a block."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def plot_axes(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the page's width, `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def add_legend(axes: Axes, title: str = "") -> None:
    """The labelled lines above the axes, under a title, in as many columns as their names leave room for; nothing where there are none."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = int(72 * WIDTH / (6 * max(map(len, names)) + 36))  # points, of nine-point letters
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=max(1, min(4, columns, len(names))),
            borderaxespad=0.2,
            handlelength=1.6,
            title=title or None,
            title_fontproperties={"weight": "bold", "size": 9.5},
            alignment="left",
        )


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an SVG element for a page that holds several: own ids, page colours and fonts, spoken title."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"(?s)<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text)  # its style would reach the whole page
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    prefix = f"svg{digest_of(name)[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"\b(font: [^;\"]*?px |font-family: )[^;\"]*", r"\1var(--sans)", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    head = f'<svg role="img" aria-labelledby="{prefix}title {prefix}desc"'
    size = re.sub(r'(width|height)="[^"]*pt"\s*', "", text[: text.index(">") + 1]).replace("<svg", head)
    spoken = f'<title id="{prefix}title">{escape(title)}</title><desc id="{prefix}desc">{escape(description)}</desc>'
    return size + spoken + text[text.index(">") + 1 :].strip()
