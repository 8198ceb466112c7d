"""Answers beside each other, word by word: which words of one the others do not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

WORD = re.compile(r"(\w+)")
COMPARED = 400  # words of a text; what comes after them is left unmarked, so that no answer makes a report slow


@dataclass(frozen=True)
class Run:
    """A stretch of a text, and whether the other texts lack its words."""

    text: str
    is_new: bool


def new_words(text: str, others: Sequence[str]) -> list[Run]:
    """The text cut into runs, which joined are the text; new is what no other has in the same order, whatever its case and punctuation.

    Nothing is new where there are no others.
    """
    parts = WORD.split(text)  # what stands between words at even places, words at odd ones
    mine = [word.casefold() for word in parts[1::2]]
    known = {2 * place + 1 for other in others for place in _shared(mine, [word.casefold() for word in WORD.findall(other)])}
    new = set(range(1, min(len(parts), 2 * COMPARED), 2)) - known if others else set()
    is_new = [place in new or {place - 1, place + 1} <= new for place in range(len(parts))]
    grouped = groupby(zip(parts, is_new, strict=True), key=lambda part: part[1])
    return [Run(joined, marked) for marked, of_run in grouped if (joined := "".join(text for text, _ in of_run))]


def _shared(mine: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Places of my words that theirs have in the same order."""
    blocks = SequenceMatcher(None, theirs[:COMPARED], mine[:COMPARED], autojunk=False).get_matching_blocks()
    return [place for block in blocks for place in range(block.b, block.b + block.size)]
