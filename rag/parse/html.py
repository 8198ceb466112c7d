"""HTML through Resiliparse: boilerplate (navigation, banners, footers) off, headings, lists and table rows kept.

What is left out is told by elements and names alone. Resiliparse's own main-content rules guess by shape too, and lose short lists.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from rag.parse.blocks import Block, Parsed, tidy

MAIN = "main, [role=main], article"
BOILERPLATE = [  # whole names only: a page's wrapper may well be called "with-sidebar"
    *("nav", "aside", "footer", "dialog", "template", "body > header", "[role=navigation]", "[role=banner]", "[role=contentinfo]", "[role=search]"),
    *("[aria-hidden=true]", ".navbar", ".sidebar", ".breadcrumb", ".breadcrumbs", ".footer", ".cookie-banner", ".cookie-notice", ".cookie-consent"),
]
CELL = "\t\t"  # what Resiliparse puts between the cells of a row
MARKUP = re.compile(r"<(/?)(h[1-6]|p|ul|ol|li|pre|blockquote|br)\b[^>]*>")


def parse_html(path: Path) -> Parsed:
    """The page's main content as one page of blocks."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    content = path.read_bytes()
    tree = HTMLTree.parse(bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8"))
    mains = tree.document.query_selector_all(MAIN) if tree.document else []
    body = HTMLTree.parse(mains[0].html) if len(mains) == 1 else tree
    blocks = html_blocks(extract_plain_text(body, preserve_formatting="minimal_html", alt_texts=False, skip_elements=BOILERPLATE))
    if not blocks:  # a page that is boilerplate by its names still has its words
        blocks = html_blocks(extract_plain_text(tree, preserve_formatting="minimal_html", alt_texts=False))
    title = tidy(tree.title or "") or next((b.text for b in blocks if b.kind == "heading"), path.stem)
    return Parsed("text/html", title, [blocks])


def html_blocks(marked: str) -> list[Block]:
    """Blocks from Resiliparse's minimal HTML, whose only tags are headings, paragraphs, lists, <pre> and <br>."""
    blocks: list[Block] = []
    lists: list[int] = []  # per open list: the number of its last item, or -1 where it has bullets
    level, prefix, place = 0, "", 0

    def take(text: str) -> None:
        nonlocal prefix
        for part in re.split(r"\n\s*\n", html.unescape(text)):
            for line in [part] if CELL not in part else part.split("\n"):
                if CELL in line:
                    blocks.append(Block(" | ".join(tidy(cell).replace("\n", " ") for cell in line.strip("\n").split(CELL)), "row"))
                elif clean := tidy(line):
                    blocks.append(Block(clean, "heading", level) if level else Block(prefix + clean))
                    prefix = ""

    for mark in MARKUP.finditer(marked):
        closing, tag = mark[1] == "/", mark[2]
        if tag == "br":
            continue
        take(marked[place : mark.start()].replace("<br>", "\n"))
        place = mark.end()
        if tag[0] == "h":
            level = 0 if closing else int(tag[1])
        elif tag in ("ul", "ol"):
            lists = lists[:-1] if closing else [*lists, 0 if tag == "ol" else -1]
        elif tag == "li" and not closing:
            lists[-1:] = [lists[-1] + 1 if lists and lists[-1] >= 0 else -1]
            prefix = "  " * (len(lists) - 1) + (f"{lists[-1]}. " if lists[-1] > 0 else "- ")
    take(marked[place:].replace("<br>", "\n"))
    return blocks
