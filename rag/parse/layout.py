"""A page's words to lines in reading order: columns one after the other, table rows as rows.

Words on one baseline without a wide gap make a segment, segments that overlap vertically make a row, and rows that
leave the same vertical strip of the page white make a band. A band is a table, unless it has prose to the left of such a
strip and no ruling lines across it: then it is columns, read one after the other.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

WIDE_GAP = 1.1  # of a line's height, between two words of one line that belong to different cells or columns
MIN_GUTTER = 0.6  # of a line's height
PROSE_FILL = 0.72  # mean share of a column's width that lines of prose fill
PROSE_CHARACTERS = 20  # a line, on average
SAME_BASELINE = 0.08  # of a line's height
ITEM = re.compile(r"^([-•–▪◦*‣]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)]|\d+(\.\d+)+\.?)$")


@dataclass(slots=True)
class Word:
    """A run of text without spaces, in page units (1/72 inch, y upwards)."""

    text: str
    x0: float
    x1: float
    y0: float
    y1: float
    index: int = 0  # of its first character on the page
    line: int = 0  # of the extractor; words of different lines are never one segment


@dataclass(slots=True)
class Line:
    """A line of a column, or a table's row: `cells` is empty for a line."""

    text: str
    x0: float
    x1: float
    y0: float
    y1: float
    index: int = 0
    cells: list[list[str]] = field(default_factory=list)  # the lines of each
    column: tuple[float, float] = (0.0, 0.0)  # left and right edge of the column it stands in
    bold: bool = False

    @property
    def height(self) -> float:
        """Of the line's box: about 1.2 × the font size."""
        return self.y1 - self.y0

    @property
    def middle(self) -> float:
        """Of the line's box."""
        return (self.y0 + self.y1) / 2


Row = list[Line]  # segments, left to right
Rule = tuple[float, float, float]  # x0, x1, y of a horizontal line drawn on the page


@dataclass(frozen=True, slots=True)
class Page:
    """A page's rows from the top down, its ruling lines, and the heights of its lower and upper edge where they are known."""

    rows: list[Row]
    rules: list[Rule] = field(default_factory=list)
    edges: tuple[float, float] | None = None


def may_hold_table(rows: list[Row]) -> bool:
    """Whether any row has more than one segment beside list marks: only then are ruling lines of use."""
    return any(len(row) > 1 and not ITEM.match(row[0].text) for row in rows)


def segments(words: list[Word]) -> list[Line]:
    """Words joined where the next one follows on the same line without a wide gap. Right-to-left lines stay whole: their words are in logical order."""
    result: list[Line] = []
    before: Word | None = None
    mixed = {word.line for word in words if is_right_to_left(word.text)}
    for word in words:
        height = max(word.y1 - word.y0, 1.0)
        joins = before is not None and word.line == before.line
        if joins and before is not None and word.line not in mixed:
            joins = -height < word.x0 - before.x1 < WIDE_GAP * height
        if joins:
            last = result[-1]
            last.text += " " + word.text
            last.x0, last.x1 = min(last.x0, word.x0), max(last.x1, word.x1)
            if height > 1.1 * last.height:  # it began with a note's mark
                last.y0, last.y1, last.index = word.y0, word.y1, word.index
        else:
            result.append(Line(word.text, word.x0, word.x1, word.y0, word.y1, word.index))
        before = word
    return result


def is_right_to_left(text: str) -> bool:
    """Whether a letter of a right-to-left script is in it."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text if c >= "\u0590")


def to_rows(parts: list[Line]) -> list[Row]:
    """Segments side by side are one row; rows from the top of the page down."""
    rows: list[Row] = []
    for part in sorted(parts, key=lambda p: (-p.middle, p.x0)):
        for row in reversed(rows[-3:]):
            overlap = min(part.y1, row[0].y1) - max(part.y0, row[0].y0)
            if overlap > 0.35 * min(part.height, row[0].height) and all(part.x0 >= s.x1 - 1 or part.x1 <= s.x0 + 1 for s in row):
                row.append(part)
                break
        else:
            rows.append([part])
    return [sorted(row, key=lambda s: s.x0, reverse=is_right_to_left(row[0].text)) for row in rows]


def reading_order(rows: list[Row], rules: list[Rule], depth: int = 0) -> list[Line]:
    """The lines in reading order, told by the page's (or, deeper, a column's) rows and its horizontal ruling lines."""
    lines: list[Line] = []
    edges = (min((s.x0 for r in rows for s in r), default=0.0), max((s.x1 for r in rows for s in r), default=0.0))
    place = 0
    while place < len(rows):
        end, gutters = _band(rows, place) if depth < 3 else (place, [])
        if end - place < 2:
            lines.append(_flat(rows[place], edges))
            place += 1
            continue
        band = rows[place:end]
        found = _table_rules(band, gutters, rules)
        gutter = None if len(found) >= 2 else _prose_beside(band, gutters)
        if gutter is not None:
            for column in _columns(band, [gutter]):
                lines += reading_order([row for row in column if row], rules, depth + 1)
        elif len(found) < 2 and len(band) < 3:
            lines += [_flat(row, edges) for row in band]  # two lines of justified text with wide gaps
        else:
            end = place + _trimmed(band, gutters, found)
            lines += _table(rows[place:end], gutters, found)
        place = max(end, place + 1)
    return lines


def _flat(row: Row, edges: tuple[float, float]) -> Line:
    """A row as one line of running text, as high as its longest segment: notes' marks stand higher."""
    longest = max(row, key=lambda s: len(s.text))
    return Line(
        " ".join(s.text for s in row),
        min(s.x0 for s in row),
        max(s.x1 for s in row),
        longest.y0,
        longest.y1,
        longest.index,
        column=edges,
        bold=longest.bold,
    )


def _band(rows: list[Row], place: int) -> tuple[int, list[tuple[float, float]]]:
    """The end of the band that starts at a row, and the white strips (x0, x1) that all its rows leave; (place, []) where none starts."""
    first = [s for s in rows[place] if not ITEM.match(s.text)]
    if len(first) < 2 or len(first) < len(rows[place]):
        return place, []
    gutters = [(a.x1, b.x0) for a, b in pairwise(rows[place]) if b.x0 > a.x1]
    height = median(s.height for s in rows[place])
    end, full = place + 1, 1
    while end < len(rows):
        row = rows[end]
        if min(s.y0 for s in rows[end - 1]) - max(s.y1 for s in row) > 2.5 * height:
            break
        narrowed = [strip for strip in (_without(gutter, row) for gutter in gutters) if strip[1] - strip[0] > MIN_GUTTER * height]
        if not narrowed or (len(row) > 1 and ITEM.match(row[0].text) and len(row) < 3):
            break
        if len(narrowed) < len(gutters) and full > 2 and len(row) == 1:
            break  # a line of text under a table reaches over one of its gaps
        gutters, end, full = narrowed, end + 1, full + (len(row) > 1)
    return (end, gutters) if full >= 2 and gutters else (place, [])


def _without(gutter: tuple[float, float], row: Row) -> tuple[float, float]:
    """What of a white strip stays white beside a row."""
    left, right = gutter
    for s in row:
        if s.x0 <= left and s.x1 >= right:
            return (0.0, 0.0)
        if s.x0 < right and s.x1 > left:
            left, right = (max(left, s.x1), right) if s.x0 <= left else (left, min(right, s.x0))
    return left, right


def _columns(band: list[Row], gutters: list[tuple[float, float]]) -> list[list[Row]]:
    """The band's rows of each column, empty where a column has nothing beside the others."""
    bounds = [float("-inf"), *((a + b) / 2 for a, b in gutters), float("inf")]
    return [[[s for s in row if low <= (s.x0 + s.x1) / 2 < high] for row in band] for low, high in pairwise(bounds)]


def _prose_beside(band: list[Row], gutters: list[tuple[float, float]]) -> tuple[float, float] | None:
    """The white strip that has running text to its left and, to its right, more of it or a box that keeps lines of its own."""
    for gutter in gutters:
        left, right = _columns(band, [gutter])
        if not _is_prose(left):
            continue
        pairs = [(a[0], b[0]) for a, b in zip(left, right, strict=True) if b and a]
        level = sum(abs(a.y0 - b.y0) < SAME_BASELINE * a.height for a, b in pairs)
        if _is_prose(right) or level < 0.8 * sum(map(bool, right)):
            return gutter
    return None


def _is_prose(column: list[Row]) -> bool:
    """Whether a column's lines fill it, as those of running text do."""
    lines = [(row[0].x0, row[-1].x1, sum(len(s.text) for s in row)) for row in column if row]
    if len(lines) < 3 or sum(length for *_, length in lines) < PROSE_CHARACTERS * len(lines):
        return False
    left, right = min(a for a, *_ in lines), max(b for _, b, _ in lines)
    return sum((b - a) / max(right - left, 1.0) for a, b, _ in lines) / len(lines) >= PROSE_FILL


def _table_rules(band: list[Row], gutters: list[tuple[float, float]], rules: list[Rule]) -> list[float]:
    """Heights of the ruling lines that run under several of the band's columns, the first among them, from the top down, each once.

    An underlined word is no ruling line: one runs under most of its column.
    """
    columns = [(min(s.x0 for s in parts), max(s.x1 for s in parts)) for column in _columns(band, gutters) if (parts := [s for row in column for s in row])]
    top, bottom = max(s.y1 for s in band[0]), min(s.y0 for s in band[-1])
    height = median(s.height for r in band for s in r)
    crossing: list[tuple[float, set[int]]] = []
    for x0, x1, y in sorted(rules, key=lambda rule: -rule[2]):
        if not bottom - height < y < top + height:
            continue
        under = {n for n, (left, right) in enumerate(columns) if min(x1, right) - max(x0, left) > 0.6 * (right - left)}
        if crossing and crossing[-1][0] - y <= 0.4 * height:
            crossing[-1][1].update(under)
        else:
            crossing.append((y, under))
    return [y for y, under in crossing if 0 in under and len(under) > 1]


def _trimmed(band: list[Row], gutters: list[tuple[float, float]], rules: list[float]) -> int:
    """How many of a band's rows are the table's: text under it that happens to be short is not."""
    count = len(band)
    while count > 2:
        row = band[count - 1]
        beneath = bool(rules) and row[0].middle < rules[-1]
        single = len(row) == 1 and row[0].x1 < gutters[0][0] + 1
        if not (beneath or (single and not rules)):
            break
        count -= 1
    return count


def _table(band: list[Row], gutters: list[tuple[float, float]], rules: list[float]) -> list[Line]:
    """One line for each row of a table, however many lines its cells take."""
    columns = _columns(band, gutters)
    result = []
    for group in _row_groups(band, columns, rules):
        cells = [[s.text for i in group for s in column[i]] for column in columns]
        parts = [s for i in group for s in band[i]]
        box = (min(s.x0 for s in parts), max(s.x1 for s in parts), min(s.y0 for s in parts), max(s.y1 for s in parts))
        result.append(Line(" | ".join(" ".join(cell) for cell in cells), *box, index=parts[0].index, cells=cells))
    return result


def _row_groups(band: list[Row], columns: list[list[Row]], rules: list[float]) -> list[list[int]]:
    """Places of the rows that make each row of a table: between ruling lines, else by wide gaps, else by a filled first cell."""
    tops, bottoms = [max(s.y1 for s in row) for row in band], [min(s.y0 for s in row) for row in band]
    middles = [median(s.middle for s in row) for row in band]
    inner = [y for y in rules if middles[0] > y > middles[-1]]
    if inner:
        starts = {next(i for i, middle in enumerate(middles) if middle < y) for y in inner}
    else:
        gaps = [bottoms[i - 1] - tops[i] for i in range(1, len(band))]
        height = median(s.height for r in band for s in r)
        spread = max(gaps) - min(gaps)
        if spread > 0.3 * height:
            wide = min(gaps) + spread / 2
            starts = {i for i, gap in enumerate(gaps, 1) if gap > wide or (columns[0][i] and len(band[i]) > 1 and gap > min(gaps) + spread / 4)}
        else:
            starts = {i for i in range(1, len(band)) if columns[0][i]}
    groups: list[list[int]] = []
    for i in range(len(band)):
        if i == 0 or i in starts:
            groups.append([])
        groups[-1].append(i)
    return groups
