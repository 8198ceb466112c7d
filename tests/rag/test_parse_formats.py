"""HTML, Markdown, text, Word and JSONL: headings, tables and boilerplate; and files that are not what they say."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rag.parse import docx as docx_module
from rag.parse.formats import parse

PAGE = """<!doctype html><html><head><title>Leave policy</title><meta charset="utf-8"><style>p {color: red}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<div class="cookie-banner">We use cookies</div>
<main><h1>Leave policy</h1><p>Staff take <b>25 days</b> &amp; more.</p><h2>Carrying &lt;over&gt;</h2><p>At most five days.</p>
<ul><li>Ask by November.</li><li>Wait.<ol><li>One week</li><li>Two weeks</li></ol></li></ul>
<table><tr><th>Grade</th><th>Days</th></tr><tr><td>A</td><td>25</td></tr></table><pre>code  here</pre></main>
<footer>© ACME <a href="/imprint">Imprint</a></footer><script>alert(1)</script></body></html>"""


def read(file: Path, content: str | bytes) -> dict[str, Any]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return parse(file)[0]


def headings(found: dict[str, Any]) -> list[tuple[int, str]]:
    for page, offset, _, title in found["headings"]:
        assert found["pages"][page][offset:].startswith(title)
    return [(level, title) for _, _, level, title in found["headings"]]


def test_html_loses_its_boilerplate_and_keeps_its_headings(tmp_path: Path) -> None:
    found = read(tmp_path / "page.html", PAGE)
    text = found["pages"][0]
    assert found["title"] == "Leave policy"
    assert headings(found) == [(1, "Leave policy"), (2, "Carrying <over>")]
    assert "Staff take 25 days & more." in text
    assert "Grade | Days\nA | 25" in text
    assert "- Ask by November." in text
    assert "1. One week" in text
    assert "code here" in text
    assert not any(word in text for word in ("Home", "cookies", "alert", "color", "Imprint"))


def test_html_in_another_encoding_is_read_in_it(tmp_path: Path) -> None:
    content = "<html><head><meta charset=iso-8859-1></head><body><main><p>Über die Straße gehen die Schüler.</p></main></body></html>"
    assert read(tmp_path / "page.htm", content.encode("latin-1"))["pages"] == ["Über die Straße gehen die Schüler."]


def test_markdown_headings_are_those_outside_of_code(tmp_path: Path) -> None:
    text = "---\ntitle: 'The rules'\n---\n# One #\n\nText\nof it.\n\n```sh\n# no heading\n```\nTwo\n---\n#hashtag\n\n### Three\n"
    found = read(tmp_path / "rules.md", text)
    assert found["title"] == "The rules"
    assert headings(found) == [(1, "# One"), (2, "Two"), (3, "### Three")]
    assert "# no heading" in found["pages"][0]


def test_text_keeps_its_lines_and_its_form_feeds_are_pages(tmp_path: Path) -> None:
    found = read(tmp_path / "a.txt", "First line\nsecond line\n\nNext.\fOther page, cut\fin two.")
    assert found["pages"] == ["First line\nsecond line\n\nNext.", "Other page, cut", "in two."]
    assert found["joins"][2] == " "


def test_word_headings_lists_and_tables(tmp_path: Path) -> None:
    import docx

    document = docx.Document()
    document.add_heading("Guard rails", 0)
    document.add_heading("Scope", 1)
    document.add_paragraph("It covers everyone.")
    document.add_paragraph("First point", style="List Bullet")
    table = document.add_table(rows=2, cols=3)
    for cell, text in zip(table._cells, ("Class", "Meaning", "Answer", "S1", "Loss\nof life", "at once"), strict=True):
        cell.text = text
    table.rows[1].cells[1].merge(table.rows[1].cells[2])
    document.add_heading("Details", 2)
    document.save(str(tmp_path / "rails.docx"))
    found = parse(tmp_path / "rails.docx")[0]
    assert headings(found) == [(1, "Guard rails"), (1, "Scope"), (2, "Details")]
    assert "- First point" in found["pages"][0]
    assert "Class | Meaning | Answer\nS1 | Loss of life at once" in found["pages"][0]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docx_module, "MAX_UNPACKED_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * (2**20 + 1))
    with pytest.raises(ValueError, match="unpacks to more than"):
        parse(tmp_path / "bomb.docx")


def test_entities_that_multiply_are_refused(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    schemas = "http://schemas.openxmlformats.org"
    word = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{schemas}/package/2006/content-types"><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{word}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{schemas}/package/2006/relationships"><Relationship Id="r" Target="word/document.xml" '
        f'Type="{schemas}/officeDocument/2006/relationships/officeDocument"/></Relationships>',
        "word/document.xml": f'<!DOCTYPE x [<!ENTITY l0 "laugh">{laughs}]>'
        f'<w:document xmlns:w="{schemas}/wordprocessingml/2006/main"><w:body>&l11;</w:body></w:document>',
    }
    with zipfile.ZipFile(tmp_path / "laughs.docx", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"damaged|no text"):
        parse(tmp_path / "laughs.docx")


def test_jsonl_is_a_document_a_line(tmp_path: Path) -> None:
    rows = [
        {"text": "# Kiln\n\nFired on Tuesdays.", "id": "k", "source": "https://example.org/kiln", "metadata": {"tags": ["craft"], "team": "clay", "boost": 2}},
        {"text": "Plain.", "title": "T"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    first, second = parse(tmp_path / "rows.jsonl")
    assert first["title"] == "Kiln"
    assert first["metadata"] == {"tags": ["craft", "team=clay"], "boost": 2, "source": "https://example.org/kiln"}
    assert (first["key"], second["key"]) == ("k", "3")
    assert (second["title"], second["metadata"]) == ("T", {"source": "rows.jsonl#3"})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.pdf", b"", "empty"),
        ("text.pdf", b"just words, no PDF", "not a PDF"),
        ("login.pdf", b"<!DOCTYPE html><html>Please log in</html>", "an HTML page"),
        ("broken.pdf", b"%PDF-1.7\nnonsense", "damaged"),
        ("page.docx", b"PK\x03\x04", "damaged .docx"),
        ("old.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "encrypted, or an old .doc"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("binary.txt", b"a\0b", "binary"),
        ("blank.md", b"\n \n", "empty"),
        ("image.png", b"\x89PNG", "unsupported"),
        ("rows.jsonl", b'{"text": "a"}\nnot json', "line 2 is not JSON"),
        ("rows.jsonl", b'{"title": "a"}', "line 1 is not an object with a"),
        ("nothing.html", b"<html><body><script>x</script></body></html>", "no text"),
    ],
)
def test_bad_files_give_their_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        parse(tmp_path / name)


def test_a_pdf_by_another_name_is_read_as_one(tmp_path: Path) -> None:
    from tests.rag.pdfs import Pdf, Text

    pdf = Pdf()
    pdf.page(Text(72, 700, "Printed words."))
    assert read(tmp_path / "saved.txt", pdf.write())["media_type"] == "application/pdf"


def test_docling_is_an_extra_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from rag.parse.docling import require_docling
    from understudy.errors import UsageError

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError) as raised:
        require_docling()
    assert "understudy[docling]" in raised.value.remedy
