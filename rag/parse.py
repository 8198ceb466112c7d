"""Turn one file into pages of text. Run as a child process, because PDF parsers hang, crash and balloon:

python -m rag.parse FILE   →  {"media_type", "title", "pages": [text, …]} or {"error"} on stdout
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

MARGIN_LINES = 2  # running headers and footers stand within so many lines of a page's edge


def parse(path: Path) -> dict[str, Any]:
    """Pages of clean text; raises ValueError with the reason where there is none."""
    head = path.open("rb").read(1024)
    if not head.strip():
        raise ValueError("the file is empty")
    if b"%PDF-" in head:
        return _parse_pdf(path)
    if path.suffix.lower() == ".pdf":
        raise ValueError("not a PDF, whatever its name says")
    if path.suffix.lower() in (".txt", ".md", ".markdown"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("not UTF-8 text") from error
        title = next((line.lstrip("# ").strip() for line in text.splitlines() if line.strip()), path.stem)
        return {"media_type": "text/markdown" if path.suffix != ".txt" else "text/plain", "title": title[:200], "pages": [_tidy(text)]}
    raise ValueError(f"unsupported file type {path.suffix or '(none)'}: PDF, .txt and .md are read")


def _parse_pdf(path: Path) -> dict[str, Any]:
    import pypdfium2
    import pypdfium2.raw as pdfium

    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        locked = getattr(error, "err_code", None) == pdfium.FPDF_ERR_PASSWORD or "password" in str(error).lower()
        raise ValueError("the PDF is encrypted: remove its password first" if locked else f"a damaged PDF ({error})") from error
    raw = [page.get_textpage().get_text_bounded() for page in pdf]
    if not any(text.strip() for text in raw):
        raise ValueError("no text in it: a scan? run it through OCR first")
    title = pdf.get_metadata_dict().get("Title", "").strip() or path.stem
    lines = [[_tidy(line) for line in text.splitlines()] for text in raw]
    return {"media_type": "application/pdf", "title": title[:200], "pages": [unwrap(page) for page in without_running_lines(lines)]}


def without_running_lines(pages: list[list[str]]) -> list[list[str]]:
    """Pages without the headers and footers that, page numbers aside, stand on most of them."""
    pages = [[line for line in page if line] for page in pages]
    if len(pages) < 3:
        return pages

    def edges(page: list[str]) -> set[str]:
        return {_mask(line) for line in page[:MARGIN_LINES] + page[-MARGIN_LINES:]}

    counts = Counter(edge for page in pages for edge in edges(page))
    running = {edge for edge, count in counts.items() if count > len(pages) * 0.6}
    kept = []
    for page in pages:
        last = len(page) - MARGIN_LINES
        kept.append([line for n, line in enumerate(page) if not ((n < MARGIN_LINES or n >= last) and _mask(line) in running)])
    return kept


def unwrap(lines: list[str]) -> str:
    """Paragraphs from a page's lines: broken lines joined by a space, paragraphs by a blank line.

    A line ends its paragraph when it is clearly shorter than the page's full lines, or when it ends a
    sentence and the next line starts a list item or a new sentence after a short line.
    """
    if not lines:
        return ""
    full = sorted(len(line) for line in lines)[int(len(lines) * 0.8)]
    text = lines[0]
    for before, line in pairwise(lines):
        short = len(before) < 0.75 * full
        starts_item = bool(re.match(r"([-•–*]|\d+[.)]|[a-z][.)])\s", line))
        ends = before.endswith((".", "!", "?", ":", ";"))
        starts_anew = line[:1].isupper() or line[:1].isdigit()
        text += "\n\n" if starts_item or (short and (ends or starts_anew)) else " "
        text += line
    return text


def _mask(line: str) -> str:
    return re.sub(r"\d+", "#", line)


def _tidy(text: str) -> str:
    """Printable text: no control characters, soft hyphens or odd spaces; line breaks stay."""
    text = text.replace("\u00ad", "").replace("\ufffe", "-").replace("\r\n", "\n")
    text = re.sub(r"[^\S\n]+", " ", text)
    return "".join(c for c in text if c == "\n" or (c.isprintable() and c != "\ufffd")).strip()


def main() -> None:
    """Parse the file named on the command line; the reason for a refusal goes out as JSON too."""
    try:
        parsed = parse(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        parsed = {"error": str(error)}
    json.dump(parsed, sys.stdout)


if __name__ == "__main__":
    main()
