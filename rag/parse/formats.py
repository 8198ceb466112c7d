"""Which parser reads a file: by its content where that is plain, by its name otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rag.parse.blocks import Parsed, assemble

TEXT = {".txt": "text/plain", ".text": "text/plain", ".md": "text/markdown", ".markdown": "text/markdown"}
HTML = (".html", ".htm", ".xhtml")
SUFFIXES = (".pdf", ".docx", ".jsonl", *HTML, *TEXT)


def parse(path: Path, parser: str = "auto") -> list[dict[str, Any]]:
    """The documents of a file, assembled; raises ValueError with the reason where there are none."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(1024)
    if not head.strip():
        raise ValueError("the file is empty")
    if parser == "docling" and suffix not in (".jsonl", *TEXT):
        from rag.parse.docling import parse_docling

        return [assemble(parse_docling(path))]
    if b"%PDF-" in head:
        from rag.parse.pdf import parse_pdf

        return [assemble(parse_pdf(path))]
    if suffix == ".jsonl":
        from rag.parse.text import parse_jsonl

        return [assemble(parsed) for parsed in parse_jsonl(path)]
    return [assemble(_parse_other(path, suffix, head))]


def _parse_other(path: Path, suffix: str, head: bytes) -> Parsed:
    if suffix == ".pdf":
        raise ValueError("an HTML page, not a PDF, whatever its name says" if looks_like_html(head) else "not a PDF, whatever its name says")
    if suffix == ".docx":
        from rag.parse.docx import parse_docx

        return parse_docx(path)
    if suffix in HTML or (suffix == "" and looks_like_html(head)):
        from rag.parse.html import parse_html

        return parse_html(path)
    if suffix in TEXT:
        from rag.parse.text import parse_markdown, parse_plain

        return parse_markdown(path) if TEXT[suffix] == "text/markdown" else parse_plain(path)
    raise ValueError(f"unsupported file type {suffix or '(none)'}: PDF, HTML, Markdown, text, .docx and .jsonl are read")


def looks_like_html(head: bytes) -> bool:
    """Whether a file's first bytes are a web page's."""
    return head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<body"))
