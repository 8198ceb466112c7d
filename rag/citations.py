"""Where a quote stands, verbatim, in a text: whitespace may differ, nothing else may."""

from __future__ import annotations

import re

from understudy.records import Chunk, Citation

SENTENCE_WORDS = 60  # a longer sentence is quoted in part
BEGINNING_WORDS = 4  # fewer identify no sentence
FOOTNOTE = r"(?<=[^\W\d][.!?]\d)|(?<=[^\W\d][.!?]\d\d)"  # a mark after the full stop: "without VAT.1 Article 5 forbids"
LINE_BREAK = re.compile(r"\n\s*\n|\n(?=[^\n]* \| )")  # before a paragraph, and before a table's row
SENTENCE_BREAK = re.compile(rf"(?:(?<=[.!?])|{FOOTNOTE})[\"”’)]*\s+(?=[\"“‘(]?[^\Wa-z])|{LINE_BREAK.pattern}")


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """The [start, end) of `quote` in `text`, runs of whitespace being equal, or None.

    A quote of fewer than three words proves nothing and is never found.
    """
    words = quote.split()
    if len(words) < 3:
        return None
    match = re.search(r"\s+".join(re.escape(word) for word in words), text)
    return (match.start(), match.end()) if match else None


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """The [start, end) of the whole sentences that [start, end) of `text` lies in.

    A sentence ends at a full stop, question or exclamation mark (and a footnote's mark) before a space, at a blank line, or before a
    table's row; any other single line break ends nothing, because PDFs break lines anywhere. A span that would grow beyond
    SENTENCE_WORDS, as in a long list without full stops, is returned as it is.
    """
    breaks = sentence_breaks(text)
    first = max(b for b in breaks if b <= start)
    last = min(b for b in breaks if b >= end)
    whole = text[first:last]
    if len(whole.split()) > SENTENCE_WORDS:
        return start, end
    return first + len(whole) - len(whole.lstrip()), first + len(whole.rstrip())


def sentence_breaks(text: str) -> list[int]:
    """Where sentences begin, and the end of the text."""
    return [0, *(match.end() for match in SENTENCE_BREAK.finditer(text)), len(text)]


def complete_quote(beginning: str, texts: list[str]) -> str | None:
    """The quote that `beginning`, whose last word may not be whole, goes on to: up to the end of its sentence in the texts, on one line.

    Words at its end that stand nowhere after those before them are dropped. None where fewer than BEGINNING_WORDS are left, or those go on
    in different ways.
    """
    words = beginning.split()[:-1]
    while len(words) >= BEGINNING_WORDS:
        pattern = re.compile(r"\s+".join(re.escape(word) for word in words))
        if found := [" ".join(text[m.start() : sentence_around(text, *m.span())[1]].split()) for text in texts for m in pattern.finditer(text)]:
            longest = max(found, key=len)
            is_one = all(longest.startswith(quote) for quote in found)  # passages overlap, and may end within a sentence
            return longest if is_one and len(longest.split()) > len(words) else None
        words.pop()
    return None


def locate(quote: str, chunks: list[Chunk], page_starts: dict[str, list[int]]) -> Citation | None:
    """The citation for a quote, from the first chunk that holds it; `page_starts` is by document id."""
    for chunk in chunks:
        span = find_quote(quote, chunk.text)
        if span:
            start, end = chunk.start + span[0], chunk.start + span[1]
            page = page_of(start, page_starts.get(chunk.document_id, [0]))
            return Citation(
                chunk_id=chunk.id, document_id=chunk.document_id, document=chunk.document, quote=chunk.text[span[0] : span[1]], page=page, start=start, end=end
            )
    return None


def page_of(offset: int, starts: list[int]) -> int:
    """The physical, 1-based page that holds a code point offset."""
    from bisect import bisect_right

    return max(1, bisect_right(starts, offset))
