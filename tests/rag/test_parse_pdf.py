"""PDFs written for the purpose, through the real PDFium: what a page says, in the order a person reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rag.parse.blocks import tidy
from rag.parse.formats import parse
from rag.parse.pages import Hyphens
from tests.rag.pdfs import Pdf, Text, column


def read(tmp_path: Path, pdf: Pdf) -> dict[str, Any]:
    file = tmp_path / "made.pdf"
    file.write_bytes(pdf.write())
    return parse(file)[0]


LEFT = [
    "The harbour opens at five in the",
    "morning and closes at nine. Boats",
    "that arrive later wait outside until",
    "the next day. The pilot boards them",
    "at the outer buoy near the light.",
]
RIGHT = [
    "Fees depend on the length of a boat",
    "and on the days it stays. They are",
    "paid before leaving, in the office at",
    "the end of the pier. Members of the",
    "club pay half of what others pay.",
]


@pytest.mark.parametrize("interleaved", [False, True])
def test_columns_are_read_one_after_the_other(tmp_path: Path, interleaved: bool) -> None:
    left, right = column(60, 700, LEFT), column(320, 700, RIGHT)
    texts = [text for pair in zip(left, right, strict=True) for text in pair] if interleaved else left + right
    pdf = Pdf()
    pdf.page(Text(60, 760, "Notice to all masters of boats that call at the harbour in the summer months"), *texts)
    text = read(tmp_path, pdf)["pages"][0]
    assert " ".join(LEFT) in text
    assert " ".join(RIGHT) in text
    assert text.index("outer buoy") < text.index("Fees depend")


def test_columns_whose_lines_do_not_align_are_still_columns(tmp_path: Path) -> None:
    pdf = Pdf()
    pdf.page(*column(60, 700, LEFT), *column(320, 693, RIGHT))
    text = " ".join(read(tmp_path, pdf)["pages"][0].split())
    assert " ".join([*LEFT, *RIGHT]) == text


@pytest.mark.parametrize("ruled", [False, True])
def test_table_rows_stay_rows(tmp_path: Path, ruled: bool) -> None:
    rows = [("Class", "Meaning", "Answer"), ("S1", "Loss of life", "30 minutes"), ("S2", "Serious", "three hours"), ("S3", "Slight", "next day")]
    texts = [Text(x, 700 - n * 30, cell) for n, row in enumerate(rows) for x, cell in zip((72, 160, 330), row, strict=True)]
    texts.append(Text(160, 658, "or limb"))  # the second line of a cell
    drawing = "\n".join(f"72 {715 - n * 30} m 480 {715 - n * 30} l S" for n in range(5)) if ruled else ""
    pdf = Pdf()
    pdf.page(*texts, Text(72, 550, "After the table comes text that goes on and on over the whole width."), drawing=drawing)
    text = read(tmp_path, pdf)["pages"][0]
    assert "Class | Meaning | Answer\nS1 | Loss of life or limb | 30 minutes\nS2 | Serious | three hours\nS3 | Slight | next day\n\nAfter the table" in text


def test_headings_by_size_and_weight_make_levels(tmp_path: Path) -> None:
    body = column(72, 640, ["A body of text runs here, and it is long enough to be the usual size.", "It goes on in a second line and ends."])
    pdf = Pdf()
    pdf.page(Text(72, 740, "Harbour rules", 20), Text(72, 700, "Fees", 15), Text(72, 665, "Boats of members", 11, "F2"), *body)
    found = read(tmp_path, pdf)
    assert [(level, title) for _, _, level, title in found["headings"]] == [(1, "Harbour rules"), (2, "Fees"), (3, "Boats of members")]
    for page, offset, _, title in found["headings"]:
        assert found["pages"][page][offset:].startswith(title)


def with_outline(pdf: Pdf, items: str) -> None:
    """Bookmarks A and B, each pointing where `items` says."""
    first = max(pdf.objects) + 2
    root = pdf.add(f"<</Type/Outlines/First {first} 0 R/Last {first + 1} 0 R/Count 2>>")
    for number, title in enumerate(("Scope", "Fees")):
        links = items.format(first=first, second=first + 1, own=first + number)
        pdf.add(f"<</Title({title})/Parent {root} 0 R/Dest[{pdf.pages[0]} 0 R/Fit]{links}>>")
    pdf.catalog += f"/Outlines {root} 0 R"


@pytest.mark.parametrize("links", ["/Next {first} 0 R", "/First {own} 0 R", "/First {second} 0 R/Next {first} 0 R"])
def test_a_cyclic_outline_ends(tmp_path: Path, links: str) -> None:
    pdf = Pdf()
    pdf.page(Text(72, 740, "Scope"), *column(72, 700, ["Text of the first part, which is long enough to be body text.", "More of it."]))
    with_outline(pdf, links)
    found = read(tmp_path, pdf)
    assert found["headings"][0] == [0, 0, 1, "Scope"]


def test_ligatures_are_spelt_out_and_nothing_else_is_normalised(tmp_path: Path) -> None:
    pdf = Pdf()
    pdf.page(Text(72, 700, "The of\x01ce \x02oor is open, x\xb2 stays.", font="F3"))
    assert read(tmp_path, pdf)["pages"] == ["The ofﬁce floor is open, x² stays.".replace("ﬁ", "fi")]
    assert tidy("ﬁﬂﬀ x² ½ Ⅳ ﻻ") == "fiflff x² ½ Ⅳ لا"


def test_words_divided_at_a_line_end_become_whole() -> None:
    hyphens = Hyphens(["A high risk is a risk.", "Every state-run port", "gives information."])
    assert hyphens.join(["The infor-", "mation on state-", "run ports and high-", "risk cargo, see 3-", "4 and Baden-", "Baden."]) == (
        "The information on state-run ports and high-risk cargo, see 3- 4 and Baden- Baden."
    )


def test_lines_of_scripts_without_spaces_are_joined_without_one() -> None:
    assert Hyphens([]).join(["港口五点", "开放，", "九点关闭。See", "notice", "한국어", "문장"]) == "港口五点开放，九点关闭。See notice 한국어 문장"


def test_a_hyphen_that_pdfium_marks_is_joined(tmp_path: Path) -> None:
    pdf = Pdf()
    pdf.page(*column(72, 700, ["All the boats that come in late are given infor-", "mation about berths at once by the pilot."]))
    assert "information about berths" in read(tmp_path, pdf)["pages"][0]


def test_running_lines_go_even_where_they_alternate(tmp_path: Path) -> None:
    pdf = Pdf()
    for number in range(1, 9):
        side = Text(72, 810, f"Chapter two {number}") if number % 2 else Text(400, 810, f"{number} Harbour rules")
        pdf.page(
            side,
            *column(72, 700, [f"Page {['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight'][number - 1]} says its own."]),
            Text(290, 30, f"- {number} -"),
        )
    pages = read(tmp_path, pdf)["pages"]
    assert pages[0] == "Page one says its own."
    assert pages[7] == "Page eight says its own."


def test_forms_that_repeat_themselves_keep_their_text(tmp_path: Path) -> None:
    pdf = Pdf()
    for number in range(1, 6):
        pdf.page(Text(72, 815, "Register"), Text(72, 600, f"Entry {number}"), Text(72, 580, "It is kept for ten years."), Text(290, 30, f"{number}"))
    assert read(tmp_path, pdf)["pages"] == [f"Entry {n}\n\nIt is kept for ten years." for n in range(1, 6)]
    slides = Pdf()
    for number in range(1, 6):
        slides.page(Text(72, 815, f"Slide {number}"))
    assert read(tmp_path, slides)["pages"][4] == "Slide 5"


def test_page_labels_are_kept_where_they_differ(tmp_path: Path) -> None:
    pdf = Pdf(catalog="/PageLabels<</Nums[0<</S/r>>2<</S/D/St 1>>]>>")
    for text in ("Preface", "Contents", "Body"):
        pdf.page(Text(72, 700, text))
    assert read(tmp_path, pdf)["labels"] == ["i", "ii", "1"]
    plain = Pdf()
    plain.page(Text(72, 700, "Body"))
    assert read(tmp_path, plain)["labels"] == []


def test_right_to_left_text_stays_in_logical_order(tmp_path: Path) -> None:
    pdf = Pdf()
    pdf.hebrew()
    pdf.page(Text(300, 700, "cba", font="F4"), Text(270, 700, "fed", font="F4"), Text(72, 600, "Then English."))  # drawn right to left: abc def
    text = read(tmp_path, pdf)["pages"][0]
    assert text.startswith("אבג דהו")
    assert text.endswith("Then English.")


def test_a_page_that_pdfium_cannot_read_goes_to_pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pypdfium2

    pdf = Pdf()
    for text in ("First page.", "Second page.", "Third page."):
        pdf.page(Text(72, 700, text))
    whole = pypdfium2.PdfDocument.get_page

    def refuses(self: Any, index: int) -> Any:
        if index == 1:
            raise pypdfium2.PdfiumError("Failed to load page.")
        return whole(self, index)

    monkeypatch.setattr(pypdfium2.PdfDocument, "get_page", refuses)
    monkeypatch.setattr(pypdfium2.PdfDocument, "__getitem__", refuses)
    assert read(tmp_path, pdf)["pages"] == ["First page.", "Second page.", "Third page."]


def test_text_at_an_angle_is_read_in_the_order_of_the_content(tmp_path: Path) -> None:
    pdf = Pdf()
    lines = [f"BT /F1 11 Tf 0 1 -1 0 {100 + 14 * n} 72 Tm ({text}) Tj ET" for n, text in enumerate(("The first line", "and the second."))]
    pdf.raw_page(pdf.stream("\n".join(lines).encode()), "/Rotate 90")
    assert " ".join(read(tmp_path, pdf)["pages"][0].split()) == "The first line and the second."


def test_list_marks_set_apart_stand_before_their_items(tmp_path: Path) -> None:
    items = ["Is anyone in danger now, and can it be stopped?", "Which version is running?", "How many people are affected?"]
    pdf = Pdf()
    pdf.page(*column(100, 700, items), *column(72, 700, ["1.", "2.", "3."]))
    assert read(tmp_path, pdf)["pages"] == ["\n\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))]


def test_a_box_of_facts_beside_text_is_read_after_it(tmp_path: Path) -> None:
    facts = [("Opened", "1869"), ("Berths", "three hundred"), ("Depth", "4 metres"), ("Master", "J. Berg"), ("Fees", "by length")]
    box = [Text(x, 705 - 17 * n, cell) for n, fact in enumerate(facts) for x, cell in zip((380, 450), fact, strict=True)]
    pdf = Pdf()
    pdf.page(*column(60, 700, LEFT), *box)
    text = read(tmp_path, pdf)["pages"][0]
    assert text == " ".join(LEFT) + "\n\n" + "\n".join(" | ".join(fact) for fact in facts)


def test_notes_marks_above_the_line_break_nothing(tmp_path: Path) -> None:
    words = [Text(60, 700, "The harbour opens at five and closes at nine in all months."), Text(360, 705, "[12]", 7), Text(380, 700, "Boats that arrive"),
             Text(60, 686, "later wait outside, at the outer buoy, for the morning and for the pilot to come aboard.")]  # fmt: skip
    pdf = Pdf()
    pdf.page(*words, *column(60, 672, ["It is lit all night, and the bell on it rings in every wind that raises a sea there."]))
    text = read(tmp_path, pdf)["pages"][0]
    assert "\n" not in text
    assert "all months. [12] Boats that arrive later wait" in text
