"""What `evaluate` prints."""

from __future__ import annotations

from typing import Any

from understudy.terminal import figure

NAME = 36  # characters of a model's name


def table_lines(result: dict[str, Any]) -> list[str]:
    """Models side by side: each metric with its difference and interval where one was computed."""
    models = result["models"]
    shown = [name for name in models[0]["metrics"] if any(model["metrics"][name] is not None for model in models)]
    pairs = {(pair["b"], pair["metric"]): pair for pair in result["pairs"]}
    width = max(12, *(len(model["name"][:NAME]) + 2 for model in models))
    header = f"{'metric':24}" + "".join(f"{model['name'][:NAME]:>{width}}" for model in models) + ("   difference [95 %]" if len(models) == 2 else "")
    lines = [header, "─" * len(header)]
    for metric in shown:
        cells = "".join(f"{figure(model['metrics'][metric]):>{width}}" for model in models)
        pair = pairs.get((models[-1]["name"], metric)) if len(models) == 2 else None
        interval = f"   {pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]" if pair and pair["low"] is not None else ""
        lines.append(f"{metric:24}{cells}{interval}")
    return lines


def gate_lines(result: dict[str, Any]) -> list[str]:
    """A line for every gate: outcome, difference with its interval, and how many more questions would tell."""
    lines = []
    for gate in result["gates"]:
        limit = f"min gain {gate['min_gain']:g}" if "min_gain" in gate else f"max loss {gate['max_loss']:g}"
        found = "not measured" if gate["low"] is None else f"{gate['difference']:+.3f} [{gate['low']:+.3f}, {gate['high']:+.3f}]"
        more = f", about {gate['more_questions']} more questions would tell" if gate["more_questions"] else ""
        lines.append(f"gate {gate['status']:9} {gate['model']} against {gate['against']}, {gate['metric']} ({limit}): {found}{more}")
    return lines


def robustness_lines(section: dict[str, Any] | None) -> list[str]:
    """A line for every model and condition: token-F1, or what the condition is about, and what it changed."""
    if section is None:
        return []
    lines = [f"robustness, {section['questions']} questions ({section['left_out']} left out)"]
    for model in section["models"]:
        for condition in model["conditions"]:
            shown = [metric for metric in ("obeyed", "token_f1", "abstained") if metric in condition["metrics"]]
            metric = shown[0] if shown else ""
            if metric:
                changed = condition["differences"].get(metric)
                interval = "" if not changed or changed["low"] is None else f"  {changed['difference']:+.3f} [{changed['low']:+.3f}, {changed['high']:+.3f}]"
                lines.append(f"  {model['name'][:NAME]:{NAME}} {condition['name']:16} {metric:10} {condition['metrics'][metric]['value']:.3f}{interval}")
    return lines
