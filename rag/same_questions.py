"""When two questions are one: the same words, or nearly the same meaning with the same numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

NEAR = 0.92  # cosine from which on two questions with the same numbers are one
SHINGLE = 4  # characters


class KnownQuestions:
    """Questions seen so far: none is admitted twice, nor a near-duplicate with the same numbers."""

    def __init__(self, embed: Callable[[list[str]], np.ndarray]) -> None:
        self._embed = embed
        self._normalised: set[str] = set()
        self._numbers: list[Counter[str]] = []
        self._vectors: list[np.ndarray] = []

    def add(self, questions: list[str]) -> None:
        """Take in questions that are known already."""
        if questions:
            self._normalised |= {normalised(question) for question in questions}
            self._numbers += [numbers_of(question) for question in questions]
            self._vectors += list(self._embed(questions))

    def admit(self, question: str) -> str | None:
        """Take in a question and return None, or the reason why it is no new one."""
        if normalised(question) in self._normalised:
            return "a duplicate"
        [vector] = self._embed([question])
        if self._vectors:
            near = np.flatnonzero(np.stack(self._vectors) @ vector >= NEAR)
            if any(self._numbers[index] == numbers_of(question) for index in near):
                return "a near-duplicate"
        self._normalised.add(normalised(question))
        self._numbers.append(numbers_of(question))
        self._vectors.append(vector)
        return None


def normalised(question: str) -> str:
    """Words alone, in lower case."""
    return " ".join(re.findall(r"\w+", question.lower()))


def shingles(text: str) -> frozenset[str]:
    """The runs of SHINGLE characters of a text; a shorter text is one."""
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def numbers_of(question: str) -> Counter[str]:
    """The numbers in a question: another number makes another question, however near."""
    return Counter(re.findall(r"\d+", question))
