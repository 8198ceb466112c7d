"""What every parser makes of a file: blocks of text by page, and their assembly into page texts with heading offsets."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_CHARACTERS = 100_000_000  # of one file's text: a bomb's output is refused before it is carried about
LIGATURES = {
    code: unicodedata.normalize("NFKC", chr(code))
    for span in (range(0xFB00, 0xFB07), range(0xFB50, 0xFDD0), range(0xFDF0, 0xFDFD), range(0xFE70, 0xFEFD))
    for code in span
    if unicodedata.decomposition(chr(code)).startswith(("<compat>", "<initial>", "<medial>", "<final>", "<isolated>"))
}  # Latin ligatures and Arabic presentation forms; nothing else is normalised, so that quotes stay as printed


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, a heading (level 1 is the outermost), or one row of a table."""

    text: str
    kind: Literal["text", "heading", "row"] = "text"
    level: int = 0


@dataclass(frozen=True)
class Parsed:
    """One document: blocks by page, and what the file says of itself."""

    media_type: str
    title: str
    pages: list[list[Block]]
    labels: list[str] = field(default_factory=list)  # printed page numbers, where they are not 1, 2, 3, …
    metadata: dict[str, Any] = field(default_factory=dict)  # of a JSONL row: source, tags, boost, validity
    key: str = ""  # tells the documents of one file apart
    content: str = ""  # what the document's identity is made of, where one file holds several


def tidy(text: str) -> str:
    """Printable text on one line each: no control characters, soft hyphens or odd spaces; ligatures spelt out."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = text.translate(LIGATURES).replace("\u00ad", "").replace("\ufffe", "-").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+", " ", text)
    return "".join(c for c in text if c == "\n" or c in "\u200c\u200d" or (c.isprintable() and c != "\ufffd")).strip()


def assemble(parsed: Parsed) -> dict[str, Any]:
    """The document as JSON: page texts, what joins each page to the one before, and headings as [page, offset, level, title].

    Raises ValueError where the file holds no text, or too much of it.
    """
    pages, joins, headings = [], [], []
    last: Block | None = None
    for number, blocks in enumerate(parsed.pages):
        text = ""
        before = None
        for block in blocks:
            if before is not None:
                text += "\n" if before.kind == block.kind == "row" else "\n\n"
            if block.kind == "heading":
                headings.append([number, len(text), block.level, block.text])
            text += block.text
            before = block
        joins.append(" " if last and blocks and runs_on(last, blocks[0]) else "\n\n")
        last = before or last
        pages.append(text)
    total = sum(map(len, pages))
    if not total:
        raise ValueError("no text in it" + (": a scan? run it through OCR, or set ingest.parser=docling" if parsed.media_type == "application/pdf" else ""))
    if total > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS:,} characters of text")
    return {
        "media_type": parsed.media_type,
        "title": " ".join(parsed.title.split())[:200],
        "pages": pages,
        "joins": joins,
        "headings": headings,
        "labels": parsed.labels,
        "metadata": parsed.metadata,
        "key": parsed.key,
        "content": parsed.content,
    }


def runs_on(last: Block, first: Block) -> bool:
    """Whether a paragraph goes on over a page break."""
    if last.kind != "text" or first.kind != "text":
        return False
    return first.text[:1].islower() or not last.text.endswith((".", "!", "?", ":", ";", "”", '"'))
