"""PDF through PDFium, page by page; a page that it cannot read goes to pypdf."""

from __future__ import annotations

import ctypes
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pypdfium2
import pypdfium2.raw as pdfium

from rag.parse.blocks import Parsed, tidy
from rag.parse.layout import Line, Page, Row, Rule, Word, may_hold_table, reading_order, segments, to_rows
from rag.parse.pages import squeezed, to_blocks, without_running_rows

if TYPE_CHECKING:
    from pypdf import PdfReader

MAX_BOOKMARKS = 20_000
BOLD = 600  # font weight from which a line counts as bold
MAX_FALLBACKS = 20  # pages in a row that pypdf reads nothing from, as in a scan, before it is asked no more
DIVIDED = "\ufffe\x02"  # PDFium's marks of a hyphen at a line's end, the word's two halves being joined
RULE_HEIGHT = 2.5  # page units; a thicker box is no ruling line


def parse_pdf(path: Path) -> Parsed:
    """Every page in reading order; raises ValueError with the reason where the file cannot be opened."""
    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        locked = getattr(error, "err_code", None) == pdfium.FPDF_ERR_PASSWORD or "password" in str(error).lower()
        raise ValueError("the PDF is encrypted: remove its password first" if locked else f"a damaged PDF ({error})") from error
    if not len(pdf):
        raise ValueError("a PDF without pages")
    fallback = Fallback(path)
    pages = [_read_page(pdf, number) for number in range(len(pdf))]
    pages = [page if page.rows else Page(fallback.rows(number)) for number, page in enumerate(pages)]
    lines = [reading_order(rows, page.rules) for rows, page in zip(without_running_rows(pages), pages, strict=True)]
    title = tidy(pdf.get_metadata_dict().get("Title", "")) or path.stem
    return Parsed("application/pdf", title, to_blocks(lines, _outline(pdf)), labels=_labels(pdf))


def _read_page(pdf: Any, number: int) -> Page:
    """A page; without rows where PDFium reads nothing."""
    try:
        page = pdf[number]
        textpage = page.get_textpage()
    except pypdfium2.PdfiumError:
        return Page([])
    words, upright = _words(textpage.raw)
    if upright:
        parts = segments(words)
        for part in parts:
            part.bold = _is_bold(textpage.raw, part.index)
        rows = to_rows(parts)
    else:  # text at an angle stays in the order of the page's content
        by_line: dict[int, list[str]] = {}
        for word in words:
            by_line.setdefault(word.line, []).append(word.text)
        rows = plain_rows([" ".join(texts) for texts in by_line.values()])
    _, bottom, _, top = page.get_bbox()
    found = Page(rows, _rules(page) if may_hold_table(rows) else [], (bottom, top) if upright else None)
    textpage.close()
    page.close()
    return found


def plain_rows(texts: list[str]) -> list[Row]:
    """Lines of which only the text and the order are known, as if set evenly down a page."""
    right = float(max((len(text) for text in texts), default=0))
    return [[Line(t, 0.0, float(len(t)), -1.2 * n, -1.2 * n + 1, column=(0.0, right))] for n, t in enumerate(texts) if t.strip()]


def _is_bold(textpage: Any, index: int) -> bool:
    """Whether a character is set bold; many fonts say so in their name alone."""
    name = ctypes.create_string_buffer(128)
    pdfium.FPDFText_GetFontInfo(textpage, index, name, 128, ctypes.c_int())
    return bool(re.search(rb"bold|black|heavy", name.value, re.IGNORECASE)) or pdfium.FPDFText_GetFontWeight(textpage, index) >= BOLD


def _words(textpage: Any) -> tuple[list[Word], bool]:
    """The page's words in PDFium's order (logical for right-to-left text), and whether most stand upright."""
    text = _characters(textpage)
    box, reference = _new_box()
    measure = pdfium.FPDFText_GetLooseCharBox
    words: list[Word] = []
    line = turned = 0
    for match in re.finditer(r"\n|[^\s\0]+", text):
        if match[0] == "\n":
            line += 1
            continue
        start, end = match.span()
        if not measure(textpage, start, reference):
            continue
        x0, x1, y0, y1 = box.left, box.right, box.bottom, box.top
        last = next((n for n, c in enumerate(match[0]) if c in DIVIDED), end - start) + start - 1  # the rest stands on the next line
        if last > start and measure(textpage, last, reference):
            x0, x1 = min(x0, box.left), max(x1, box.right)
        if not words or words[-1].line != line:
            turned += 1 if abs(pdfium.FPDFText_GetCharAngle(textpage, start)) > 0.1 else -1
        words.append(Word(match[0].replace("\x02", "\ufffe"), x0, x1, y0, y1, start, line))
    return words, turned <= 0


def _new_box() -> tuple[Any, Any]:
    box = pdfium.FS_RECTF()
    return box, ctypes.byref(box)


def _characters(textpage: Any) -> str:
    """The page's text, one code point for each of PDFium's characters."""
    count = pdfium.FPDFText_CountChars(textpage)
    if count <= 0:
        return ""
    buffer = (ctypes.c_ushort * (2 * count + 1))()
    written = pdfium.FPDFText_GetText(textpage, 0, count, buffer)
    text = bytes(buffer)[: 2 * max(written - 1, 0)].decode("utf-16-le", errors="replace")
    if len(text) != count:  # characters without a code point, or beyond the basic plane
        codes = (pdfium.FPDFText_GetUnicode(textpage, n) for n in range(count))
        text = "".join(chr(code) if code < 0x110000 else "\ufffd" for code in codes)
    return text


def _rules(page: Any) -> list[Rule]:
    """The horizontal lines drawn on a page: thin paths, and the edges of boxes."""
    found = []
    left, bottom, right, top = (ctypes.c_float() for _ in range(4))
    for number in range(min(pdfium.FPDFPage_CountObjects(page.raw), 5000)):
        drawn = pdfium.FPDFPage_GetObject(page.raw, number)
        if pdfium.FPDFPageObj_GetType(drawn) != pdfium.FPDF_PAGEOBJ_PATH:
            continue
        if pdfium.FPDFPageObj_GetBounds(drawn, *map(ctypes.byref, (left, bottom, right, top))) and right.value - left.value > 8:
            edges = {(top.value + bottom.value) / 2} if top.value - bottom.value < RULE_HEIGHT else {top.value, bottom.value}
            found += [(left.value, right.value, y) for y in edges]
    return found


def _labels(pdf: Any) -> list[str]:
    """Printed page labels (i, ii, 1, A-3 …), or [] where they are the page numbers."""
    labels = [pdf.get_page_label(number) or "" for number in range(len(pdf))]
    plain = all(label in ("", str(number)) for number, label in enumerate(labels, 1))
    return [] if plain else [tidy(label)[:40] for label in labels]


def _outline(pdf: Any) -> dict[int, dict[str, int]]:
    """Bookmarks by page: title without spaces → level. PDFium's walk stops at cycles."""
    found: dict[int, dict[str, int]] = {}
    try:
        for bookmark in islice(pdf.get_toc(max_depth=6), MAX_BOOKMARKS):
            target = bookmark.get_dest()
            page = target.get_index() if target else None
            if page is not None and (title := squeezed(tidy(bookmark.get_title()))):
                found.setdefault(page, {}).setdefault(title, bookmark.level + 1)
    except pypdfium2.PdfiumError:
        return found
    return found


class Fallback:
    """pypdf, opened when the first page needs it; a page that it cannot read either is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: PdfReader | None = None
        self._tries = MAX_FALLBACKS

    def rows(self, number: int) -> list[Row]:
        """The lines of one page (0-based)."""
        if self._tries <= 0:
            return []
        try:
            if self._reader is None:
                from pypdf import PdfReader

                self._reader = PdfReader(self._path)
            text = self._reader.pages[number].extract_text() or ""
        except Exception:  # pypdf raises whatever its parsing ran into
            text = ""
        self._tries = MAX_FALLBACKS if text.strip() else self._tries - 1
        return plain_rows(text.splitlines())
