"""The clients of `scripts/bench soak`: they ask, judge each answer by itself, and count."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from serve.load import Prompt
from understudy.workspace import Workspace

TOKENS = 24
CLEAN = (429, 502, 503, 504)
ALIAS = "soak"


class Asked(NamedTuple):
    """A question that was answered, by seconds since the epoch."""

    is_whole: bool  # as its answer said
    began: float
    ended: float


@dataclass
class Seen:
    """What the workers saw."""

    answers: Counter[str] = field(default_factory=Counter)  # by what was asked for
    refused: Counter[str] = field(default_factory=Counter)  # clean errors, by code
    wrong: list[str] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)
    traces: dict[str, Asked] = field(default_factory=dict)  # by id
    changes: int = 0  # adapters loaded and unloaded, releases switched
    kills: int = 0
    restored: list[float] = field(default_factory=list)  # seconds from a kill to the next readiness
    samples: list[tuple[int, int]] = field(default_factory=list)  # (resident bytes, open files)


@dataclass(frozen=True)
class Door:
    """The served workspace."""

    workspace: Workspace
    url: str
    pid: int  # of the serving process
    adapter: str  # name@digest12
    references: dict[str, dict[str, str]]  # model → prompt → its greedy answer, asked alone


async def chat(http: aiohttp.ClientSession, door: Door, model: str, prompt: Prompt, seen: Seen) -> None:
    """One chat completion, judged."""
    body = {"model": model, "messages": [turn.model_dump() for turn in prompt], "max_tokens": TOKENS, "temperature": 0}
    reply = await ask(http, door, body, seen)
    if reply is None:
        return
    text, key = reply["choices"][0]["message"]["content"], prompt[-1].content
    answered = "base" if reply["model"] in ("base", door.workspace.config.models.base) else reply["model"]
    other = door.adapter if answered == "base" else "base"
    if answered not in ((door.adapter, "base") if model == ALIAS else (model,)):
        seen.wrong.append(f"asked {model}, answered as {answered}")
    elif text == door.references[other][key] != door.references[answered][key]:
        seen.wrong.append(f"asked {model}, answered as {answered} what {other} says: {text!r}")
    else:
        seen.answers[model] += 1


async def question(http: aiohttp.ClientSession, door: Door, prompt: Prompt, seen: Seen) -> None:
    """One question to the agent; its trace is looked for in the end."""
    words, began = prompt[-1].content.split()[-12:], time.time()
    reply = await ask(http, door, {"model": "rag", "messages": [{"role": "user", "content": " ".join(words)}]}, seen)
    if reply is not None:
        seen.answers["rag"] += 1
        if reply["understudy"]["cache"] not in ("exact", "semantic"):
            seen.traces[reply["understudy"]["trace_id"]] = Asked(reply["choices"][0]["finish_reason"] == "stop", began, time.time())


async def ask(http: aiohttp.ClientSession, door: Door, body: dict[str, Any], seen: Seen) -> dict[str, Any] | None:
    """The reply; None, counted, where it is an error."""
    try:
        async with http.post(f"{door.url}/chat/completions", json=body) as reply:
            content = json.loads(await reply.read())
            if reply.status == 200:
                return dict(content)
            code = content["error"]["code"]
            (seen.refused.update([code]) if reply.status in CLEAN else seen.unclean.append(f"{reply.status} {code}: {content['error']['message']}"))
            await asyncio.sleep(min(2.0, float(reply.headers.get("Retry-After", 1))))
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        seen.unclean.append(f"{type(error).__name__}: {error}")
    return None


async def work(http: aiohttp.ClientSession, door: Door, prompts: list[Prompt], number: int, until: float, seen: Seen) -> None:
    """A client: two chats and one question in turn."""
    chosen = random.Random(number)
    while time.monotonic() < until:
        if number % 3 == 2:
            await question(http, door, chosen.choice(prompts), seen)
        else:
            await chat(http, door, chosen.choice(["base", door.adapter, ALIAS]), chosen.choice(prompts), seen)
