"""Plain text, Markdown and JSONL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from rag.parse.blocks import Block, Parsed, tidy

FENCE = re.compile(r"^ {0,3}(```|~~~)")
ATX = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$")
SETEXT = re.compile(r"^ {0,3}(=+|-{2,})[ \t]*$")


def read_text(path: Path) -> str:
    """A UTF-8 file's text (UTF-16 where a byte order mark says so); raises ValueError otherwise."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    if "\0" in text:
        raise ValueError("binary data, not text")
    return text


def parse_plain(path: Path) -> Parsed:
    """One page, paragraph by paragraph; a form feed starts a new page."""
    pages = [plain_blocks(page) for page in read_text(path).split("\f")]
    first = next((block.text for page in pages for block in page), "")
    return Parsed("text/plain", first.splitlines()[0] if first else path.stem, pages)


def parse_markdown(path: Path) -> Parsed:
    """Text as written, with its headings recognised; front matter gives the title and is left out."""
    text = read_text(path)
    title = ""
    if front := re.match(r"---\r?\n(.*?)\r?\n(?:---|\.\.\.)\r?\n", text, re.DOTALL):
        named = re.search(r"^title:[ \t]*(.+)$", front[1], re.MULTILINE)
        title, text = named[1].strip().strip("\"'") if named else "", text[front.end() :]
    blocks = markdown_blocks(text)
    title = title or next((b.text.lstrip("# ") for b in blocks if b.kind == "heading"), blocks[0].text.splitlines()[0] if blocks else path.stem)
    return Parsed("text/markdown", title, [blocks])


def plain_blocks(text: str) -> list[Block]:
    """Paragraphs between blank lines; lines stay as they are."""
    return [Block(part.strip("\n")) for part in re.split(r"\n[ \t]*\n+", tidy(text)) if part.strip()]


def markdown_blocks(text: str) -> list[Block]:
    """Paragraphs and headings (with their marks, as written); nothing inside a fenced block is a heading."""
    blocks: list[Block] = []
    lines: list[str] = []
    fence = ""

    def close() -> None:
        if part := tidy("\n".join(lines)):
            blocks.append(Block(part))
        lines.clear()

    for line in text.splitlines():
        if fence or FENCE.match(line):
            mark = FENCE.match(line)
            fence = ("" if mark and mark[1] == fence else fence) if fence else (mark[1] if mark else "")
            lines.append(line)
            if not fence:
                close()
        elif heading := ATX.match(line):
            close()
            if title := tidy(heading[2]):
                blocks.append(Block(f"{heading[1]} {title}", "heading", len(heading[1])))
        elif len(lines) == 1 and lines[0].strip() and (underline := SETEXT.match(line)):
            title = tidy(lines.pop())
            blocks.append(Block(title, "heading", 1 if underline[1][0] == "=" else 2))
        elif line.strip():
            lines.append(line)
        else:
            close()
    close()
    return blocks


def parse_jsonl(path: Path) -> Iterator[Parsed]:
    """One document a line: {"text", "title", "source", "id", "metadata"}; raises ValueError naming the first bad line.

    `metadata` takes tags, boost, valid_from and valid_until as a sidecar file does; every other scalar becomes the tag `key=value`.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("metadata", {}), dict):
            raise ValueError(f'line {number} is not an object with a "text" (and perhaps a "metadata" object)')
        known = {"tags", "boost", "valid_from", "valid_until"}
        given = row.get("metadata", {})
        metadata = {key: value for key, value in given.items() if key in known}
        tags = [f"{key}={value}" for key, value in given.items() if key not in known and isinstance(value, str | int | float | bool)]
        if tags:
            metadata["tags"] = [*metadata.get("tags", []), *tags]
        metadata["source"] = str(row.get("source") or f"{path.name}#{row.get('id', number)}")
        blocks = markdown_blocks(row["text"])
        title = str(row.get("title") or (blocks[0].text.lstrip("# ").splitlines()[0] if blocks else metadata["source"]))
        yield Parsed("application/jsonl", title, [blocks], metadata=metadata, key=str(row.get("id") or row.get("source") or number), content=line)
