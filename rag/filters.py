"""Metadata filters: `tag=law`, `document=x.pdf`, `page<=3`. They choose the chunks that a search may look at, before it looks.

A condition is KEY OPERATOR VALUE. Keys and operators are the few below, everything else is refused; a value is only ever
compared, so whatever it holds is data. Conditions hold together, except that several `=` of one key are alternatives.
The tenant is no key: an index holds one tenant's chunks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np

from understudy.errors import UsageError
from understudy.records import Record

COMPARISONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = {"document": ("=", "!="), "tag": ("=", "!="), "type": ("=", "!="), "valid": ("=",), "page": ("=", "!=", *COMPARISONS)}
REMEDY = "conditions are document=NAME, tag=NAME, type=MEDIA/TYPE, valid=YYYY-MM-DD, page=N; != where it makes sense, < <= > >= for pages"


class IndexedDocument(Record):
    """What an index keeps of a document, for filters, ranking and page numbers."""

    id: str
    source: str
    media_type: str
    tags: list[str]
    boost: float
    valid_from: float | None  # seconds since the epoch
    valid_until: float | None
    page_starts: list[int]

    def is_valid(self, at: float) -> bool:
        """Whether the document holds at a time (seconds since the epoch); `valid_until` is the first moment at which it does not."""
        return (self.valid_from is None or self.valid_from <= at) and (self.valid_until is None or at < self.valid_until)


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of every chunk of a generation, without its text."""

    chunk_ids: list[str]
    documents: list[IndexedDocument]
    document_of: np.ndarray  # [chunks] int32, place in `documents`
    pages: np.ndarray  # [chunks, 2] int32, first and last page

    @cached_property
    def place(self) -> dict[str, int]:
        """Where each chunk id stands in `chunk_ids`."""
        return {chunk_id: place for place, chunk_id in enumerate(self.chunk_ids)}

    def document(self, chunk_id: str) -> IndexedDocument:
        """The document of a chunk of this generation."""
        return self.documents[int(self.document_of[self.place[chunk_id]])]

    def in_documents(self, chosen: Callable[[IndexedDocument], bool]) -> np.ndarray:
        """Mask [chunks] of the chunks whose document is chosen."""
        mask: np.ndarray = np.array([chosen(document) for document in self.documents], dtype=bool)[self.document_of]
        return mask


@dataclass(frozen=True)
class Condition:
    """One parsed condition."""

    key: str
    operator: str
    value: str

    def mask(self, facts: Facts) -> np.ndarray:
        """The chunks [chunks] that meet it. A chunk over several pages meets a page condition where one of them does."""
        if self.key == "page":
            first, last, page = facts.pages[:, 0], facts.pages[:, 1], int(self.value)
            if self.operator in COMPARISONS:
                return COMPARISONS[self.operator](first if self.operator.startswith("<") else last, page)
            holds = (first <= page) & (page <= last)
        elif self.key == "valid":
            at = _moment(self.value)
            holds = facts.in_documents(lambda document: document.is_valid(at))
        elif self.key == "tag":
            holds = facts.in_documents(lambda document: self.value in document.tags)
        elif self.key == "type":
            holds = facts.in_documents(lambda document: document.media_type == self.value)
        else:
            holds = facts.in_documents(lambda document: self.value in (document.source, document.id))
        return ~holds if self.operator == "!=" else holds


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """The conditions in a fixed order, each once. Raises UsageError for an unknown key or operator, or a value of the wrong kind."""
    return tuple(sorted({_parse(text) for text in texts}, key=lambda c: (c.key, c.operator, c.value)))


def matching(facts: Facts, conditions: tuple[Condition, ...]) -> np.ndarray:
    """Mask [chunks] of the chunks that meet all conditions; several `=` of one key are alternatives."""
    allowed = np.ones(len(facts.chunk_ids), dtype=bool)
    for condition in conditions:
        if condition.operator != "=":
            allowed &= condition.mask(facts)
    for key in {condition.key for condition in conditions if condition.operator == "="}:
        allowed &= np.logical_or.reduce([c.mask(facts) for c in conditions if c.key == key and c.operator == "="])
    return allowed


def _parse(text: str) -> Condition:
    found = re.fullmatch(r"\s*([A-Za-z_$.]+)\s*(<=|>=|!=|=|<|>)\s*(.+?)\s*", text, re.DOTALL)
    if not found:
        raise UsageError(f"{text!r} is not a condition", REMEDY)
    key, symbol, value = found.groups()
    if key not in OPERATORS:
        hint = "; the tenant comes from the configuration" if key == "tenant" else ""
        raise UsageError(f"unknown key {key} in the condition {text!r}{hint}", REMEDY)
    if symbol not in OPERATORS[key]:
        raise UsageError(f"{key} has no operator {symbol}, in the condition {text!r}", REMEDY)
    if key == "page" and not re.fullmatch(r"[0-9]{1,9}", value):
        raise UsageError(f"{value!r} is not a page number", REMEDY)
    if key == "valid":
        _moment(value)
    return Condition(key, symbol, value)


def _moment(value: str) -> float:
    """Seconds since the epoch of an ISO date or time, UTC where it names no zone. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise UsageError(f"{value!r} is not a date", REMEDY) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
