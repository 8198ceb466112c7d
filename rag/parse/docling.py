"""Docling, an optional extra for scanned pages and layouts that geometry alone does not tell (ingest.parser: docling)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rag.parse.blocks import Block, Parsed
from rag.parse.text import markdown_blocks
from understudy.errors import UsageError


def require_docling() -> None:
    """Raise UsageError with the one-line remedy where Docling is not installed."""
    if importlib.util.find_spec("docling") is None:
        raise UsageError("ingest.parser is docling, and Docling is not installed", "pip install 'understudy[docling]', or set ingest.parser=auto")


def parse_docling(path: Path) -> Parsed:
    """Docling's Markdown of each page; its models must lie where DOCLING_ARTIFACTS_PATH says, because nothing is fetched here."""
    from docling.document_converter import DocumentConverter

    document = DocumentConverter().convert(path, raises_on_error=True).document
    numbers = sorted(document.pages)
    pages: list[list[Block]] = [markdown_blocks(document.export_to_markdown(page_no=number)) for number in numbers]
    if not pages:
        pages = [markdown_blocks(document.export_to_markdown())]
    return Parsed("application/pdf" if path.suffix.lower() == ".pdf" else "text/markdown", document.name or path.stem, pages)
