"""ROUGE-L: the longest common subsequence of two texts' words (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries)."""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(prediction: str, answer: str | Sequence[str]) -> float:
    """ROUGE-L's F1 in [0, 1], the best over the accepted answers; without stemming, as the package rouge-score has it.

    Words are runs of letters and digits of any alphabet, in lower case: rouge-score keeps ASCII ones only.
    """
    golds = [answer] if isinstance(answer, str) else answer
    return max((_f1(_words(prediction), _words(gold)) for gold in golds), default=0.0)


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, in O(len(left) · len(right)) time and one row of memory."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _f1(predicted: list[str], wanted: list[str]) -> float:
    shared = common_subsequence(predicted, wanted)
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
