"""Set the Markdown handbooks in sources/ as PDFs in pdf/, and find the pages of quotes in them.

    python samples/ai-governance/make.py            make the PDFs
    python samples/ai-governance/make.py --check    exit 1 if the committed PDFs say something else
    python samples/ai-governance/make.py --pages    fill documents and pages in questions/*.jsonl

Needs markdown-it-py, mdit-py-plugins, WeasyPrint, pypdfium2 and the DejaVu fonts.
"""

import argparse
import html
import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pypdfium2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.container import container_plugin

HERE = Path(__file__).resolve().parent
PDFS, QUESTIONS = HERE / "pdf", HERE / "questions"

FIELDS = ("id", "question", "answer", "quotes", "documents", "pages", "query", "type", "needs")

PAGE = """<!doctype html>
<html lang="en-GB">
<head><title>{title}</title><meta name="author" content="The Understudy authors"></head>
<body>
<header><p class="series">AI Governance Handbooks</p><p>Handbook {number}</p></header>
{body}</body>
</html>
"""

# pdfium drops a hyphen that ends a line and joins the halves ("highrisk"), so words with hyphens
# stay on one line; for the reader's sake so do those with dashes or slashes, and article numbers.
UNBREAKABLE = re.compile(r"\S+- \S+|\S*[\w)][-\u2013/]\S+|\bArticle \S+")

NOTE = re.compile(r"^\[\^(\w+)\]: +(.+(?:\n(?!\[\^).+)*)", re.MULTILINE)

# A note's mark, the word it belongs to, and the stop that some authors put after the mark.
MARKED_WORD = re.compile(r'((?:<span class="whole">[^<]*</span>|[^\s<>])*)\[\^(\w+)\]([.,;]?)')


class SampleError(Exception):
    """Sources, PDFs or questions are not as they must be; the message lists every fault."""


def render_text(_: Any, tokens: list[Token], index: int, *__: Any) -> str:
    """A renderer rule: the escaped text with its unbreakable words marked for the style sheet."""
    text = html.escape(tokens[index].content, quote=False)
    return UNBREAKABLE.sub(lambda word: f'<span class="whole">{word[0]}</span>', text)


def parser() -> MarkdownIt:
    """Markdown as the handbooks use it; all else (links, emphasis, HTML) is plain text."""
    markdown = MarkdownIt("zero").enable(["heading", "list", "table"])
    markdown.use(container_plugin, name="columns")
    markdown.add_render_rule("text", render_text)
    return markdown


def place_notes(body: str, notes: dict[str, str]) -> str:
    """The body with each note's text at its mark, which the style sheet sends to the page's foot.

    The mark stands after the punctuation and is glued to its word, or it could open a line.
    """

    def with_note(mark: re.Match[str]) -> str:
        note = f'<span class="footnote">{notes[mark[2]]}</span>'
        return f'<span class="whole">{mark[1]}{mark[3]}{note}</span>'

    return MARKED_WORD.sub(with_note, body)


def render_html(source: str, number: int) -> str:
    """The HTML page of one handbook."""
    title = re.match(r"# (.+)\n", source)
    notes = NOTE.findall(source)
    text = NOTE.sub("", source)
    if title is None or text.count(":::") % 2:
        raise SampleError("no # title in the first line, or a ::: without its end")
    if sorted(re.findall(r"\[\^(\w+)\]", text)) != sorted(label for label, _ in notes):
        raise SampleError("not every footnote has exactly one mark and one text")
    markdown = parser()
    texts = {label: markdown.renderInline(note) for label, note in notes}
    body = place_notes(markdown.render(text), texts)
    return PAGE.format(title=html.escape(title[1]), number=number, body=body)


def make_pdf(page: str, identifier: str) -> bytes:
    """The page as a PDF: the same bytes every time on one machine."""
    from weasyprint import HTML  # slow to import, and --pages does without

    os.environ["SOURCE_DATE_EPOCH"] = "0"  # else the embedded fonts carry the time of writing
    pdf: bytes = HTML(string=page).write_pdf(
        stylesheets=[HERE / "style.css"],
        pdf_identifier=identifier.encode(),  # else random
        pdf_tags=True,
    )
    return pdf


def make_pdfs() -> dict[str, bytes]:
    """Every handbook's PDF by its file name."""
    pdfs = {}
    for path in sorted((HERE / "sources").glob("[0-9][0-9]-*.md")):
        try:
            page = render_html(path.read_text(encoding="utf-8"), int(path.stem[:2]))
        except SampleError as error:
            raise SampleError(f"{path.name}: {error}") from error
        pdfs[f"{path.stem}.pdf"] = make_pdf(page, path.stem)
    return pdfs


def read_pages(pdf: Path | bytes) -> list[str]:
    """Each page's text with its white space collapsed."""
    with pypdfium2.PdfDocument(pdf) as document:
        return [" ".join(page.get_textpage().get_text_range().split()) for page in document]


def read_committed() -> dict[str, list[str]]:
    """The pages' texts of every PDF in pdf/ by its file name."""
    return {path.name: read_pages(path) for path in sorted(PDFS.glob("*.pdf"))}


def write_pdfs() -> None:
    """Make every PDF; one that has no source any more goes."""
    pdfs = make_pdfs()
    PDFS.mkdir(exist_ok=True)
    for name, pdf in pdfs.items():
        (PDFS / name).write_bytes(pdf)
        print(f"pdf/{name}: {len(read_pages(pdf))} pages")
    for path in PDFS.glob("*.pdf"):
        if path.name not in pdfs:
            path.unlink()
            print(f"pdf/{path.name}: removed, it has no source")


def check_pdfs() -> None:
    """Compare what the committed PDFs say, page by page, with what would be made now."""
    made = {name: read_pages(pdf) for name, pdf in make_pdfs().items()}
    committed = read_committed()
    faults = [f"pdf/{name}: is not there" for name in sorted(made.keys() - committed.keys())]
    faults += [f"pdf/{name}: has no source" for name in sorted(committed.keys() - made.keys())]
    for name in sorted(made.keys() & committed.keys()):
        pairs = zip_longest(committed[name], made[name], fillvalue="")
        for number, (old, new) in enumerate(pairs, start=1):
            if old != new:
                faults.append(f"pdf/{name} page {number}: {first_difference(old, new)}")
    if faults:
        raise SampleError("\n".join(faults))


def first_difference(old: str, new: str) -> str:
    """Where two texts part, with some words of both."""
    parting = next((at for at, (a, b) in enumerate(zip_longest(old, new)) if a != b), 0)
    start = max(0, parting - 20)
    return f"committed {old[start : start + 60]!r}, made now {new[start : start + 60]!r}"


def fill_pages() -> None:
    """Write each quote's document and page into the question files, if every quote is found."""
    texts = read_committed()
    files = {
        path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(QUESTIONS.glob("*.jsonl"))
    }
    faults = [fault for rows in files.values() for row in rows for fault in locate(row, texts)]
    if faults:
        raise SampleError("\n".join(faults))
    for path, rows in files.items():
        lines = [json.dumps(in_order(row), ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"questions/{path.name}: {len(rows)} questions")


def locate(row: dict[str, Any], texts: dict[str, list[str]]) -> Iterator[str]:
    """Set the row's documents and pages, one of each for a quote; yield each quote not found."""
    names = row.get("documents", [])
    if len(names) == 1:
        names = names * len(row["quotes"])
    row["documents"], row["pages"] = names, []
    for name, quote in zip_longest(names, row["quotes"], fillvalue=""):
        wanted = " ".join(quote.split())
        pages = [n for n, text in enumerate(texts.get(name, []), start=1) if wanted in text]
        if wanted and pages:
            row["pages"].append(pages[0])
        else:
            yield f"{row['id']}: on no page of {name or 'a named document'}: {quote!r}"


def in_order(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its fields in the files' order; any other (`document`) comes last."""
    return {key: row[key] for key in (*FIELDS, *row) if key in row}


def main() -> int:
    """Run the chosen step; on a fault say all of them and return 1."""
    options = argparse.ArgumentParser(description="Make the sample library's PDFs from sources/.")
    step = options.add_mutually_exclusive_group()
    step.add_argument("--check", action="store_true", help="exit 1 if a PDF in pdf/ would change")
    step.add_argument("--pages", action="store_true", help="fill in the pages in questions/*.jsonl")
    chosen = options.parse_args()
    try:
        (check_pdfs if chosen.check else fill_pages if chosen.pages else write_pdfs)()
    except SampleError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
