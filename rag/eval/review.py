"""The page on which people compare blind answers: local, by keyboard, each label on disk before the next pair is shown.

Whoever opens it must know its secret path, and say one of the server's own names as Host, so that neither another page (CSRF) nor a
foreign name that was pointed at this machine (DNS rebinding) can read or label anything.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rag.eval.contest import PREFERENCES, Contest, says_the_same, view_pair
from rag.eval.labels import LONGEST_NOTE, Label, add_label, labels_of
from rag.eval.opinions import summarise_people
from rag.eval.page import source_hash, templates
from understudy.digests import digest_of
from understudy.errors import StorageError
from understudy.records import Chunk, Trace

HERE = Path(__file__).parent
LONGEST_BODY = 64 * 1024  # bytes
CHOICES = {"first": "Answer 1 is better", "second": "Answer 2 is better", "both": "Both are good", "neither": "Both are bad"}  # keys 1 to 4


@dataclass(frozen=True)
class Review:
    """The pairs to look at, in the order in which they are shown."""

    contest: Contest
    pairs: Sequence[tuple[Trace, Trace]]  # of every question of the contest
    chunks: Mapping[str, Chunk]
    shown: list[int]  # places of questions
    same: int  # questions that are not asked about, since both models say the same
    seed: int
    reviewer: str = ""
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    def labels(self) -> dict[str, Label]:
        """The labels that this reviewer has given so far; another's would not be blind."""
        return labels_of(self.contest.folder, self.contest.a, self.contest.b).get(self.reviewer, {})

    def is_swapped(self, place: int) -> bool:
        """Whether the second model's answer is shown first; drawn by seed and question."""
        return is_drawn(self.seed, self.contest.ids[place])

    def waiting(self) -> list[int]:
        """Positions, from 0, of the pairs that have no label yet."""
        labels = self.labels()
        return [position for position, place in enumerate(self.shown) if self.contest.ids[place] not in labels]

    def summary(self) -> dict[str, Any]:
        """What was found so far; the command's JSON."""
        waiting = len(self.waiting())
        about = {"asked": len(self.shown), "waiting": waiting, "same": self.same, "seed": self.seed, "reviewer": self.reviewer}
        return {**summarise_people(self.contest), **about}


def draw_review(contest: Contest, pairs: Sequence[tuple[Trace, Trace]], chunks: Mapping[str, Chunk], count: int, seed: int, reviewer: str = "") -> Review:
    """`count` of the questions that the models answer differently, drawn by seed; more questions of the same seed begin with the same ones.

    Every reviewer of a seed sees the same pairs.
    """
    differing = [place for place, pair in enumerate(pairs) if not says_the_same(pair)]
    drawn = sorted(differing, key=lambda place: digest_of([seed, contest.ids[place]]))
    return Review(contest, pairs, chunks, drawn[:count], len(pairs) - len(differing), seed, reviewer)


def is_drawn(seed: int, question_id: str) -> bool:
    """A coin that falls the same way for the same seed and question."""
    return int(digest_of([seed, "order", question_id])[:8], 16) % 2 == 1


def build_app(review: Review, hosts: Iterable[str], finish: Callable[[], None]) -> ASGIApp:
    """The review as an ASGI application under `/SECRET/`; `hosts` are the Host headers that are its own, `finish` ends the server."""
    pages = _Pages(review, finish)
    routes = [
        Route("/", pages.begin),
        Route("/done", pages.done),
        Route("/finish", pages.finish, methods=["POST"]),
        Route("/{number:int}", pages.show),
        Route("/{number:int}", pages.label, methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes), f"/{review.secret}", frozenset(hosts))


class _Guard:
    """Lets a request through that knows the secret and names this server; every reply carries the page's policy."""

    def __init__(self, app: ASGIApp, prefix: str, hosts: frozenset[str]) -> None:
        self._app, self._prefix, self._hosts = app, prefix, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        start, slash, path = request.url.path.removeprefix("/").partition("/")
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts:
            await _refusal(421, "this server goes by another name")(scope, receive, send)
        elif origin is not None and origin.removeprefix("http://") not in self._hosts:
            await _refusal(403, "requests from other pages are refused")(scope, receive, send)
        elif not (slash and secrets.compare_digest(f"/{start}".encode(), self._prefix.encode())):
            await _refusal(404, "open the address that the command printed")(scope, receive, send)
        else:
            await self._app({**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}, receive, send)


class _Pages:
    def __init__(self, review: Review, finish: Callable[[], None]) -> None:
        self._review, self._finish = review, finish
        self._style = "".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "review.css"))
        self._script = (HERE / "review.js").read_text(encoding="utf-8")
        self._environment = templates()

    async def begin(self, _: Request) -> Response:
        """On to the first pair without a label."""
        return self._next(-1)

    async def show(self, request: Request) -> Response:
        """One pair, in the order drawn."""
        review, position = self._review, request.path_params["number"] - 1
        if not 0 <= position < len(review.shown):
            return _refusal(404, "there is no such pair")
        place = review.shown[position]
        pair = review.pairs[place]
        answers, passages = view_pair(pair[::-1] if review.is_swapped(place) else pair, review.chunks)
        labels = review.labels()
        label = labels.get(review.contest.ids[place])
        return self._page(
            "pair",
            number=position + 1,
            question=review.contest.questions[place],
            answers=answers,
            passages=passages,
            chosen=_as_shown(label, review, place) if label else "",
            note=label.note if label else "",
            labelled=sum(review.contest.ids[other] in labels for other in review.shown),
        )

    async def label(self, request: Request) -> Response:
        """Keep a label, and on to the next pair without one."""
        review, position = self._review, request.path_params["number"] - 1
        fields = await _form(request)
        if fields is None or fields.get("choice") not in CHOICES or not 0 <= position < len(review.shown):
            return _refusal(400, "that is no label")
        place, pair = review.shown[position], (review.contest.a, review.contest.b)
        order = pair[::-1] if review.is_swapped(place) else pair
        chosen = {"first": order[0], "second": order[1]}.get(fields["choice"])
        try:
            label = Label(
                question_id=review.contest.ids[place],
                question=review.contest.questions[place],
                tenant=review.pairs[place][0].tenant,
                a=pair[0],
                b=pair[1],
                shown_first=order[0],
                choice="a" if chosen == pair[0] else "b" if chosen else "both" if fields["choice"] == "both" else "neither",
                note=fields.get("note", "").strip(),
                created_at=time.time(),
                reviewer=review.reviewer,
            )
        except ValidationError:
            return _refusal(400, f"a note may have {LONGEST_NOTE:,} characters")
        try:
            add_label(review.contest.folder, label)
        except StorageError as error:
            return _refusal(507, f"not kept: {error.message}; {error.remedy}")
        return self._next(position)

    async def done(self, _: Request) -> Response:
        """What was found; the models are named here."""
        return self._page("done", found=self._review.summary(), preferences=PREFERENCES)

    async def finish(self, _: Request) -> Response:
        """End the server."""
        self._finish()
        return self._page("finished")

    def _next(self, position: int) -> Response:
        waiting = self._review.waiting()
        following = next((other for other in waiting if other > position), waiting[0] if waiting else None)
        target = "done" if following is None else str(following + 1)
        return RedirectResponse(f"/{self._review.secret}/{target}", 303)

    def _page(self, kind: str, **shown: Any) -> Response:
        from markupsafe import Markup

        template = self._environment.get_template("review.html.j2")
        total, base = len(self._review.shown), f"/{self._review.secret}"
        text = template.render(kind=kind, style=Markup(self._style), script=Markup(self._script), choices=CHOICES, total=total, base=base, **shown)
        policy = (
            f"default-src 'none'; style-src '{source_hash(self._style)}'; script-src '{source_hash(self._script)}'; "
            "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, **_HEADERS})


_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}


def _refusal(status: int, reason: str) -> Response:
    return PlainTextResponse(f"{reason}\n", status, headers=_HEADERS)


def _as_shown(label: Label, review: Review, place: int) -> str:
    """A label as a choice on the page."""
    if label.choice in ("both", "neither"):
        return label.choice
    return "first" if (label.choice == "b") == review.is_swapped(place) else "second"


async def _form(request: Request) -> dict[str, str] | None:
    """The fields of a URL-encoded form, the last of each name; None where it is none, or too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return None
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_BODY:
            return None
    return {name: values[-1] for name, values in parse_qs(content.decode("utf-8", "replace"), keep_blank_values=True).items()}
