"""Token-aware chunking: every chunk is an exact slice of its document's text, and together they cover all of it that is not blank.

A text is cut into atoms (sentences, table rows, list items; parts of those that are longer than a chunk), and the atoms are
put together so that the whole document's cuts are cheapest: between sections rather than paragraphs, between paragraphs
rather than sentences, never after a heading, with chunks as full as that allows. The best cuts are found exactly, as in
Knuth and Plass, "Breaking Paragraphs into Lines" (1981).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rag.citations import page_of
from understudy.records import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter
    from tokenizers import Tokenizer

VERSION = "sentences-1"  # of the algorithm; the settings below are part of a chunker's name
# Costs of a cut by what it follows (a section: none), of each heading inside a chunk, of the square of a chunk's empty share. `scripts/bench chunks`
# chose them on the sample's train and calibration questions: chunks that keep to one subject find more than full ones.
AFTER_PARAGRAPH, AFTER_LINE, AFTER_SENTENCE, AFTER_PART, AFTER_HEADING = 0.0, 0.3, 0.6, 2.0, 4.0
HEADING_INSIDE, EMPTY = 1.0, 0.3
TOKEN_CHARACTERS = 32  # a longer token, such as the one unknown token of a long word, counts as several
FEWEST_TOKENS = 1 / 32  # of a chunk: shorter neighbours are one atom
SENTENCE_END = re.compile(r"[.!?…][\"”’»)\]]*\s+(?=[\"“‘«(\[]?[^\Wa-z])|(?<=[a-z)”])[.!?]\d{1,2}\s+(?=[A-Z])|[。！？]")
ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|No|Nos|Nr|Art|Arts|Sec|Fig|Eq|Vol|pp?|cf|vs|e\.g|i\.e|z\.\s?B|bzw|ca|approx))\.\s+$")


@dataclass(slots=True)
class Atom:
    """A span that is cut only around."""

    start: int
    end: int  # without the white space after it
    cut: float  # cost of a cut after it
    heading: str = ""  # its title, where it is one
    level: int = 0


class Chunker:
    """Cuts documents into chunks of at most `chunk_tokens`, which begin with whole sentences of the one before, up to `overlap_tokens`."""

    def __init__(self, tokenizer_file: Path, chunk_tokens: int, overlap_tokens: int) -> None:
        self.name = f"{VERSION}/{chunk_tokens}/{overlap_tokens}"
        self._tokenizer = load_tokenizer(tokenizer_file)
        self._limit, self._overlap = chunk_tokens, min(overlap_tokens, chunk_tokens // 2)

    def chunks(self, document: Document) -> list[Chunk]:
        """The document's chunks in order."""
        result = []
        paths = heading_paths(document)
        for ordinal, (start, end, body) in enumerate(self.spans(document)):
            first, last = page_of(start, document.page_starts), page_of(end - 1, document.page_starts)
            result.append(
                Chunk(
                    id=Chunk.make_id(document.id, f"{self.name}/{document.parser}", start, end),
                    document_id=document.id,
                    document=document.source,
                    text=document.text[start:end],
                    start=start,
                    end=end,
                    pages=list(range(first, last + 1)),
                    ordinal=ordinal,
                    headings=paths[bisect_left(paths, (body + 1,)) - 1][1] if paths and paths[0][0] <= body else [],
                    tenant=document.tenant,
                )
            )
        return result

    def spans(self, document: Document) -> list[tuple[int, int, int]]:
        """(start, end, where its first text that is no heading begins) of each chunk."""
        encoded = self._tokenizer.encode(document.text, add_special_tokens=False)
        starts = [place for start, end in encoded.offsets for place in range(start, max(end, start + 1), TOKEN_CHARACTERS)]
        limit = self._limit
        while True:
            atoms = to_atoms(document, starts, limit)
            cuts = best_cuts(atoms, starts, limit, self._overlap)
            spans = [(atoms[first].start, atoms[last].end, _body(atoms[first : last + 1])) for first, last in cuts]
            longest = max((len(e) for e in self._tokenizer.encode_batch([document.text[a:b] for a, b, _ in spans], add_special_tokens=False)), default=0)
            if longest <= self._limit or limit <= 1:
                return spans
            limit = max(1, limit - (longest - self._limit))  # a slice may count more tokens than it did inside the text


def _body(atoms: list[Atom]) -> int:
    return next((atom.start for atom in atoms if not atom.heading), atoms[-1].start)


def heading_paths(document: Document) -> list[tuple[int, list[str]]]:
    """(offset from which it holds, heading path) in text order."""
    stack: list[tuple[int, str]] = []
    paths = []
    for heading in document.headings:
        stack = [*((level, title) for level, title in stack if level < heading.level), (heading.level, heading.title.lstrip("# "))]
        paths.append((heading.start, [title for _, title in stack]))
    return paths


def to_atoms(document: Document, starts: list[int], limit: int) -> list[Atom]:
    """The text's sentences, rows and headings in order; what is longer than a chunk in about equal parts."""
    headings = {heading.start: heading for heading in document.headings}
    atoms: list[Atom] = []
    for start, end, cut in _pieces(document.text, sorted(headings)):
        heading = headings.get(start)
        tokens = _count(starts, start, end)
        if heading and tokens <= limit:
            if atoms:
                atoms[-1].cut = 0.0 if not atoms[-1].heading else AFTER_HEADING
            atoms.append(Atom(start, end, AFTER_HEADING, heading.title, heading.level))
        elif tokens > limit:
            parts = list(_parts(document.text, start, end, starts, limit))
            atoms += [Atom(a, b, AFTER_PART) for a, b in parts]
            atoms[-1].cut = cut
        elif atoms and not atoms[-1].heading and atoms[-1].cut >= AFTER_LINE and _count(starts, atoms[-1].start, end) <= limit * FEWEST_TOKENS:
            atoms[-1].end, atoms[-1].cut = end, cut
        else:
            atoms.append(Atom(start, end, cut))
    return atoms


def _pieces(text: str, headings: list[int]) -> list[tuple[int, int, float]]:
    """(start, end, cost of a cut after it) of the sentences and lines of a text, without the white space around them."""
    cuts: dict[int, float] = {
        match.end(): AFTER_SENTENCE for match in SENTENCE_END.finditer(text) if not ABBREVIATION.search(text, max(0, match.end() - 12), match.end())
    }
    cuts |= {
        match.end(): AFTER_PARAGRAPH if match[0].count("\n") > 1 else AFTER_LINE for match in re.finditer(r"[^\S\n]*\n\s*", text) if _ends_line(text, match)
    }
    cuts |= dict.fromkeys(headings, AFTER_PARAGRAPH)
    cuts[len(text)] = AFTER_PARAGRAPH
    pieces = []
    for start, end in pairwise([0, *sorted(cut for cut in cuts if cut > 0)]):
        piece = text[start:end]
        if stripped := piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            pieces.append((first, first + len(stripped), cuts[end]))
    return pieces


def _ends_line(text: str, match: re.Match[str]) -> bool:
    """Whether a line break separates: a blank line does, and so does the end of a table row or before a list item; a wrapped line's does not."""
    if match[0].count("\n") > 1:
        return True
    return " | " in text[text.rfind("\n", 0, match.start()) + 1 : match.start()] or bool(re.compile(r"[-•*#|]|\d+[.)]").match(text, match.end()))


def _parts(text: str, start: int, end: int, starts: list[int], limit: int) -> list[tuple[int, int]]:
    """About equal parts of a span, none longer than the limit: cut between words, or inside one that is too long itself."""
    tokens = starts[bisect_left(starts, start) : bisect_left(starts, end)]
    size = -(-len(tokens) // -(-len(tokens) // limit))
    parts = []
    begin, place = start, 0
    while place < len(tokens):
        after = place + size
        while after < len(tokens) and after > place + size // 2 and not text[tokens[after] - 1].isspace():
            after -= 1
        if after < len(tokens) and not text[tokens[after] - 1].isspace():
            after = place + size
        stop = tokens[after] if after < len(tokens) else end
        if text[begin:stop].strip():
            lead = len(text[begin:stop]) - len(text[begin:stop].lstrip())
            parts.append((begin + lead, begin + lead + len(text[begin:stop].strip())))
        begin, place = stop, after
    return parts


def best_cuts(atoms: list[Atom], starts: list[int], limit: int, overlap: int) -> list[tuple[int, int]]:
    """(first, last) atom of each chunk, the overlap included, with the least cost over the whole text.

    A chunk costs its cut, its headings but the first ones, and its empty share.
    """
    tokens_before = [bisect_left(starts, atom.start) for atom in atoms]
    tokens_after = [bisect_left(starts, atom.end) for atom in atoms]
    first = [_overlap_from(atoms, i, tokens_before, overlap) for i in range(len(atoms))]
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # for the atoms before each place: cost, where the last chunk's own atoms and where it begins
    for j in range(len(atoms)):
        options = []
        inside = 0
        for i in range(j, -1, -1):
            begin = first[i]
            if tokens_after[j] - tokens_before[i] > limit and i < j:
                break
            inside += i < j and bool(atoms[i + 1].heading) and not atoms[i].heading
            while begin < i == j and tokens_after[j] - tokens_before[begin] > limit:
                begin += 1  # one sentence that leaves no room for the overlap
            if begin < i and tokens_after[j] - tokens_before[begin] > limit:
                continue
            empty = max(0.0, 1 - (tokens_after[j] - tokens_before[begin]) / limit)
            options.append((best[i][0] + atoms[j].cut + HEADING_INSIDE * inside + EMPTY * empty * empty, i, begin))
        best.append(min(options))
    cuts = []
    place = len(atoms)
    while place:
        _, own, begin = best[place]
        cuts.append((begin, place - 1))
        place = own
    return cuts[::-1]


def _overlap_from(atoms: list[Atom], i: int, tokens_before: list[int], overlap: int) -> int:
    """The earliest atom that a chunk whose own text begins at atom i may begin with: whole sentences of the same section."""
    begin = i
    while begin > 0 and not atoms[begin].heading and not atoms[begin - 1].heading and tokens_before[i] - tokens_before[begin - 1] <= overlap:
        begin -= 1
    return begin


def _count(starts: list[int], start: int, end: int) -> int:
    return bisect_left(starts, end) - bisect_left(starts, start)


def load_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer without its truncation and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def make_splitter(tokenizer_file: Path, tokens: int, overlap: int) -> TextSplitter:
    """A splitter into windows of a model, counted in its tokenizer."""
    from semantic_text_splitter import TextSplitter

    return TextSplitter.from_huggingface_tokenizer(load_tokenizer(tokenizer_file), tokens, overlap=min(overlap, tokens // 2))
