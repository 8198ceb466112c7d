"""Word documents through python-docx: headings by style, list items, tables row by row."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rag.parse.blocks import Block, Parsed, tidy

if TYPE_CHECKING:
    from docx.table import Table
    from docx.text.paragraph import Paragraph

MAX_UNPACKED_BYTES = 512 * 2**20  # of the archive's parts together, as their headers declare it


def parse_docx(path: Path) -> Parsed:
    """One page (Word decides page breaks when it prints); raises ValueError for an archive that is damaged or a bomb."""
    import docx
    from docx.opc.exceptions import PackageNotFoundError
    from docx.table import Table

    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB")
            if "word/document.xml" not in archive.namelist():
                raise ValueError("not a Word document, whatever its name says")
        document = docx.Document(str(path))
    except (zipfile.BadZipFile, PackageNotFoundError, KeyError, SyntaxError) as error:  # lxml's XMLSyntaxError is a SyntaxError
        head = path.open("rb").read(8)
        encrypted = head == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # an OLE container: old .doc, or an encrypted .docx
        raise ValueError("encrypted, or an old .doc: save it as .docx without a password" if encrypted else f"a damaged .docx ({error})") from error
    blocks: list[Block] = []
    for part in document.iter_inner_content():
        blocks += _rows(part) if isinstance(part, Table) else _paragraph(part)
    title = tidy(document.core_properties.title or "") or next((b.text for b in blocks if b.kind == "heading"), blocks[0].text if blocks else path.stem)
    return Parsed("application/vnd.openxmlformats-officedocument.wordprocessingml.document", title, [blocks])


def _paragraph(paragraph: Paragraph) -> list[Block]:
    text = tidy(paragraph.text)
    if not text:
        return []
    style = paragraph.style.name or "" if paragraph.style is not None else ""
    if style == "Title":
        return [Block(text, "heading", 1)]
    if heading := re.fullmatch(r"[Hh]eading ([1-9])", style):
        return [Block(text, "heading", int(heading[1]))]
    numbered = paragraph._p.pPr is not None and paragraph._p.pPr.numPr is not None
    return [Block(f"- {text}" if numbered or style.startswith("List") else text)]


def _rows(table: Table) -> list[Block]:
    """A row a line; a merged cell stands once."""
    blocks = []
    for row in table.rows:
        cells: dict[object, str] = {}
        for cell in row.cells:
            cells.setdefault(cell._tc, tidy(cell.text).replace("\n", " "))
        if any(cells.values()):
            blocks.append(Block(" | ".join(cells.values()), "row"))
    return blocks
