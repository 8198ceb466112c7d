"""Lines of all pages to blocks: running headers and footers go, broken lines become paragraphs, large or bold lines headings."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from statistics import quantiles

from rag.parse.blocks import Block, tidy
from rag.parse.layout import Line, Page, Row

MARGIN_ROWS = 2  # running headers and footers stand among so many rows at a page's top and foot
MARGIN_SHARE = 0.12  # of the page's height
LIST_ITEM = re.compile(r"([-•–▪◦*‣]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])\s")
BREAK = re.compile(r"([^\W\d_]+)-$")  # a word divided at a line's end
DIVIDED = re.compile(r"([^\W\d_]+)\ufffe([^\W\d_]+)")  # the same where PDFium has put the halves together
HEADING_CHARACTERS = 160


def without_running_rows(pages: list[Page]) -> list[list[Row]]:
    """Pages without the headers and footers that, numbers aside, stand on most pages, or on most odd or even ones.

    A page that would have nothing left keeps all it has: forms and registers repeat themselves.
    """
    margins = [[n for n in range(len(page.rows)) if _in_margin(page, n)] for page in pages]
    masks = [{_mask(page.rows[n]) for n in places} for page, places in zip(pages, margins, strict=True)]
    running: set[str] = set()
    for chosen in (masks, masks[::2], masks[1::2]):
        counts = Counter(mask for page in chosen for mask in page)
        running |= {mask for mask, count in counts.items() if count >= 3 and count > 0.6 * len(chosen)}
    result = []
    for page, places in zip(pages, margins, strict=True):
        gone = {n for n in places if _mask(page.rows[n]) in running}
        result.append([row for n, row in enumerate(page.rows) if n not in gone] if len(gone) < len(page.rows) else page.rows)
    return result


def _in_margin(page: Page, place: int) -> bool:
    """Whether a row is one of the first or last, and near the page's edge where that is known."""
    if MARGIN_ROWS <= place < len(page.rows) - MARGIN_ROWS:
        return False
    if page.edges is None:
        return True
    bottom, top = page.edges
    share = (page.rows[place][0].middle - bottom) / max(top - bottom, 1.0)
    return share < MARGIN_SHARE or share > 1 - MARGIN_SHARE


def _mask(row: Row) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", " ".join(segment.text for segment in row))


def to_blocks(pages: list[list[Line]], outline: dict[int, dict[str, int]]) -> list[list[Block]]:
    """Blocks of each page. `outline` holds the bookmarks: page → title without spaces → level; fonts tell headings where there are none."""
    body = _body_height(line for page in pages for line in page)
    pitch = _usual_pitch(pages)
    hyphens = Hyphens(line.text for page in pages for line in page)
    levels = {} if outline else _heading_sizes(pages, body)
    blocks = []
    for number, page in enumerate(pages):
        found: list[Block] = []
        for group in _paragraphs(page, pitch):
            if group[0].cells:
                found.append(Block(" | ".join(hyphens.join(cell) for cell in group[0].cells), "row"))
                continue
            text = hyphens.join([line.text for line in group])
            if not text:
                continue
            level = outline.get(number, {}).get(squeezed(text), 0) or _level(group, text, levels)
            found.append(Block(text, "heading", level) if level else Block(text))
        blocks.append(found)
    return blocks


def squeezed(text: str) -> str:
    """Text without spaces and case, for comparing titles."""
    return "".join(text.split()).casefold()


def _is_unspaced(character: str) -> bool:
    """Whether a character is of a script that writes no spaces between words, as Chinese and Japanese do."""
    return unicodedata.east_asian_width(character) in "WF" and not "\uac00" <= character <= "\ud7a3"


class Hyphens:
    """Makes words whole that a line's end divides, by the words that the document itself uses."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._words: set[str] = set()
        for text in texts:
            text = DIVIDED.sub(" ", text)
            self._words.update(word.casefold() for word in re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*(?![\w-])", text))

    def join(self, lines: list[str]) -> str:
        """The lines as running text, tidied."""
        text = ""
        for line in (tidy(DIVIDED.sub(lambda word: word[1] + ("-" if self._keeps(word[1], word[2]) else "") + word[2], line)) for line in lines):
            broken = BREAK.search(text)
            following = re.match(r"[^\W\d_]+", line)
            if broken and following and following[0][0].islower():
                text = text + line if self._keeps(broken[1], following[0]) else text[:-1] + line
            else:
                text += (" " if text and line and not (_is_unspaced(text[-1]) and _is_unspaced(line[0])) else "") + line
        return text

    def _keeps(self, first: str, second: str) -> bool:
        """Whether the hyphen is the word's own: "high-risk" is, "infor-mation" is not."""
        if (first + second).casefold() in self._words:
            return False
        if f"{first}-{second}".casefold() in self._words:
            return True
        return first.casefold() in self._words and second.casefold() in self._words


def _body_height(lines: Iterable[Line]) -> float:
    """The line height that most of the document's characters are set in."""
    counts: Counter[float] = Counter()
    for line in lines:
        counts[round(line.height * 2) / 2] += len(line.text)
    return counts.most_common(1)[0][0] if counts else 0.0


def _usual_pitch(pages: list[list[Line]]) -> float:
    """Distance between lines of a paragraph, in line heights: the lower quartile over neighbours of one size."""
    ratios = [
        (a.middle - b.middle) / max(b.height, 1.0)
        for page in pages[:200]
        for a, b in pairwise(page)
        if not a.cells and not b.cells and abs(a.height - b.height) < 0.1 * b.height and 0.5 < (a.middle - b.middle) / max(b.height, 1.0) < 3
    ]
    return quantiles(ratios, n=4)[0] if len(ratios) > 3 else 1.2


def _paragraphs(page: list[Line], pitch: float) -> list[list[Line]]:
    groups: list[list[Line]] = []
    for line in page:
        if groups and not _breaks(groups[-1][-1], line, pitch):
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def _breaks(before: Line, line: Line, pitch: float) -> bool:
    """Whether a line starts a new paragraph."""
    if before.cells or line.cells:
        return True
    height = max(line.height, before.height, 1.0)
    runs_on = line.text[:1].islower() and not before.text.endswith((".", "!", "?", ":"))
    if LIST_ITEM.match(line.text) or (not runs_on and (abs(line.height - before.height) > 0.12 * height or line.bold != before.bold)):
        return True
    distance = before.middle - line.middle
    if distance < 0 and before.column != line.column:  # the next column goes on where this one stopped, unless a paragraph ended there
        return before.text.endswith((".", "!", "?", ":")) and before.x1 < before.column[1] - 1.5 * height
    if distance > (pitch + 0.25) * height or distance < 0:
        return True
    left, right = line.column
    short = before.x1 < right - 0.25 * (right - left)
    ends = before.text.endswith((".", "!", "?", ":", ";", "”", '"'))
    indented = line.x0 > before.x0 + 0.8 * height and before.x1 > right - 0.25 * (right - left) and line.text[:1].isupper()
    half_empty = before.x1 < right - 0.5 * (right - left) and not line.text[:1].islower()
    return half_empty or (ends and (short or indented))


def _heading_sizes(pages: list[list[Line]], body: float) -> dict[tuple[float, bool], int]:
    """Level of each style (height in half points, bold) that headings are set in: larger comes first, then bold."""
    styles = {_style(line) for page in pages for line in page if not line.cells and _stands_out(line, body) and len(line.text) <= HEADING_CHARACTERS}
    return {style: min(level, 6) for level, style in enumerate(sorted(styles, reverse=True), 1)}


def _stands_out(line: Line, body: float) -> bool:
    return line.height > 1.15 * body or (line.bold and line.height > 0.95 * body)


def _style(line: Line) -> tuple[float, bool]:
    return round(line.height * 2) / 2, line.bold


def _level(group: list[Line], text: str, levels: dict[tuple[float, bool], int]) -> int:
    """The heading level of a paragraph, 0 for body text."""
    if len(text) > HEADING_CHARACTERS or text.endswith((".", ",", ";")) or not any(c.isalpha() for c in text):
        return 0
    return levels.get(_style(group[0]), 0)
