"""The report and the review page as a screen reader takes them: headings in order, named tables and landmarks, nothing empty, nothing doubled.

axe-core 4.10 in a real Chromium found nothing else in either, light and dark (docs/evaluation.md); it is not part of the tests.
"""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

from rag.eval.labels import Label, add_label
from rag.eval.opinions import add_opinions
from tests.rag.eval.conftest import RUN_MODELS
from tests.rag.eval.test_review import open_review, through
from understudy.workspace import Workspace


class Outline(HTMLParser):
    """What assistive technology navigates by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.landmarks: list[str] = []  # names; of a labelled element, the id of its label
        self.empty_headers = 0
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self._in_header = False
        self._header = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "th":
            self._header = ""
            self._in_header = True
        if "id" in about:
            self.ids.append(about["id"])
        if about.get("role") == "region":
            self.landmarks.append(about["aria-label"])
        self.labelled |= set(about.get("aria-labelledby", "").split())
        if tag == "svg":
            assert about["role"] == "img" and about["aria-labelledby"]
        if tag == "label" and "for" in about:
            self.labelled.add(about["for"])

    def handle_data(self, data: str) -> None:
        if self._in_header:
            self._header += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "th":
            self._in_header = False
            self.empty_headers += not self._header.strip()


def check(page: str) -> Outline:
    outline = Outline(page)
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(later <= before + 1 for before, later in zip(outline.headings, outline.headings[1:], strict=False)), outline.headings
    assert not outline.empty_headers and outline.labelled <= set(outline.ids)
    assert not [name for name, count in Counter([*outline.ids, *outline.landmarks]).items() if count > 1]
    return outline


def test_the_report_with_opinions(finished_run: Workspace) -> None:
    folder = finished_run.reports / "abc123"
    check((folder / "report.html").read_text())
    a, b = RUN_MODELS
    add_label(folder, Label(question_id="q00", question="?", tenant="default", a=a, b=b, shown_first=a, choice="b", created_at=0.0))
    add_opinions(folder)
    assert "Table of agreement" in check((folder / "report.html").read_text()).landmarks


def test_the_review_page(finished_run: Workspace) -> None:
    review = open_review(finished_run)
    for path in ("1", "done"):
        page = through(review, lambda client, path=path: client.get(f"/{review.secret}/{path}")).text
        check(page)
        assert '<html lang="en">' in page and "<title>" in page
