"""`scripts/bench soak --minutes 10`: `understudy serve` at its limit while adapters come and go and the engine is killed three times.

Workers keep more requests open than the engine runs at once: chat by the base and by the proven adapter, and questions to `rag`. Meanwhile
a disturbed copy of the adapter is loaded into the engine and unloaded again and again, releases are promoted and rolled back where
this version has them, and the engine's processes get SIGKILL at a quarter, half and three quarters of the time. Judged at the end:

    wrong answers     a reply under another name than was asked for, or with the text that only the other model gives
    unclean errors    anything but OpenAI's error shape with 429, 502, 503 or 504, or an error event in a stream
    lost traces       a `rag` answer whose trace is not in the store, or not whole there though its run was said to be
    leaks             resident memory (median) and open files (most) of the serving process, in the last fifth and in the second

Prints a JSON line each; exit 1 where one of them is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from scripts.bench_adapters import register_copies
from serve.engine import load_adapter, registered_adapters, unload_adapter
from serve.gateway.server import url_of
from serve.load import Prompt, read_prompts
from understudy.adapters import find_adapter
from understudy.command_table import COMMANDS
from understudy.engines import RunningEngine, find_engine
from understudy.errors import UnderstudyError
from understudy.files import write_text
from understudy.progress import show_progress
from understudy.workspace import Workspace, open_workspace

WORKERS, TOKENS, START_SECONDS = 24, 24, 600
CLEAN = (429, 502, 503, 504)
SAMPLE_SECONDS = 2.0
MAX_GROWTH, MAX_FILES = 1.10, 2 * WORKERS  # of resident memory; of open files: each request may have a connection on either side
WARM_UP = 48  # questions before anything is counted: embedder, index and thread pools are there then
ALIAS = "soak"
RELEASES = any(command.words == "release promote" for command in COMMANDS)


@dataclass
class Seen:
    """What the workers saw."""

    answers: Counter[str] = field(default_factory=Counter)  # by what was asked for
    refused: Counter[str] = field(default_factory=Counter)  # clean errors, by code
    wrong: list[str] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)
    traces: dict[str, bool] = field(default_factory=dict)  # id → whether its run was told to be whole
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
    words = prompt[-1].content.split()[-12:]
    reply = await ask(http, door, {"model": "rag", "messages": [{"role": "user", "content": " ".join(words)}]}, seen)
    if reply is not None:
        seen.answers["rag"] += 1
        if reply["understudy"]["cache"] not in ("exact", "semantic"):
            seen.traces[reply["understudy"]["trace_id"]] = reply["choices"][0]["finish_reason"] == "stop"


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
            await chat(http, door, chosen.choice(["base", door.adapter, *([ALIAS] if RELEASES else [])]), chosen.choice(prompts), seen)


async def change_adapters(door: Door, copy: Any, until: float, seen: Seen) -> None:
    """Load and unload an adapter at the engine; what fails while there is no engine is no fault."""
    while time.monotonic() < until:
        engine = await asyncio.to_thread(find_engine, door.workspace)
        if engine is not None:
            with contextlib.suppress(UnderstudyError):
                await asyncio.to_thread(load_adapter, engine.url, copy)
                await asyncio.to_thread(unload_adapter, engine.url, copy.name)
                seen.changes += 1
        await asyncio.sleep(0.5)


async def make_releases(door: Door) -> list[str]:
    """A release of the adapter, live, and one of the base, under one alias."""
    names = [json.loads(await run_command(door.workspace, "release", "create", ALIAS, "--answer", answer))["release"] for answer in (door.adapter, "base")]
    await run_command(door.workspace, "release", "promote", names[0], "--force", "--reason", "soak")
    return names


async def change_releases(door: Door, names: list[str], until: float, seen: Seen) -> None:
    """Promote the base's release, roll back to the adapter's, again and again."""
    while time.monotonic() < until:
        for words in (("promote", names[1], "--force", "--reason", "soak"), ("rollback", ALIAS)):
            await run_command(door.workspace, "release", *words)
            seen.changes += 1
            await asyncio.sleep(1.0)


async def run_command(workspace: Workspace, *words: str) -> str:
    """A command's JSON. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "--json", *words]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: {error.decode()[-300:]}")
    return out.decode()


async def kill_engine(door: Door, began: float, until: float, seen: Seen) -> None:
    """SIGKILL to the engine's processes at a quarter, half and three quarters."""
    for share in (0.25, 0.5, 0.75):
        await asyncio.sleep(max(0.0, began + share * (until - began) - time.monotonic()))
        engine = await wait_for_engine(door.workspace, until)
        if engine is None:
            return
        os.killpg(engine.pid, signal.SIGKILL)
        seen.kills += 1
        killed = time.monotonic()
        async with aiohttp.ClientSession() as http:
            status = 0
            while status != 200 and time.monotonic() < until + START_SECONDS:
                await asyncio.sleep(0.25)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(door.url.removesuffix("/v1") + "/ready") as reply:
                        status = reply.status if time.monotonic() - killed > 2 else 0
        seen.restored.append(time.monotonic() - killed)


async def wait_for_engine(workspace: Workspace, until: float) -> RunningEngine | None:
    """The running engine, once there is one."""
    while time.monotonic() < until:
        engine = await asyncio.to_thread(find_engine, workspace)
        if engine is not None:
            return engine
        await asyncio.sleep(0.5)
    return None


async def sample(door: Door, until: float, seen: Seen) -> None:
    """Memory and open files of the serving process."""
    while time.monotonic() < until:
        resident = int(Path(f"/proc/{door.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.samples.append((resident, len(os.listdir(f"/proc/{door.pid}/fd"))))
        await asyncio.sleep(SAMPLE_SECONDS)


async def soak(door: Door, prompts: list[Prompt], copy: Any, minutes: float) -> Seen:
    """Everything at once, for so long."""
    seen = Seen()
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        await asyncio.gather(*(question(http, door, prompts[number % len(prompts)], Seen()) for number in range(WARM_UP)))
        names = await make_releases(door) if RELEASES else []
        began = time.monotonic()
        until = began + 60 * minutes
        jobs: list[Awaitable[None]] = [work(http, door, prompts, number, until, seen) for number in range(WORKERS)]
        jobs += [change_adapters(door, copy, until, seen), kill_engine(door, began, until, seen), sample(door, until, seen), tell(until, seen)]
        jobs += [change_releases(door, names, until, seen)] if RELEASES else []
        await asyncio.gather(*jobs)
    return seen


async def tell(until: float, seen: Seen) -> None:
    """Progress, once a second."""
    total = max(1, round(until - time.monotonic()))
    with show_progress("soaking, seconds", total) as bar:
        for _ in range(total):
            await asyncio.sleep(1)
            bar.advance(note=f"{seen.answers.total()} answers, {seen.refused.total()} refusals, {len(seen.unclean)} unclean, {seen.kills} kills")


def judge(door: Door, seen: Seen, minutes: float) -> list[dict[str, Any]]:
    """The lines to print; `ours` against the limit that holds it."""
    kept = {each: door.workspace.store.trace(each) for each in seen.traces}
    lost = [each for each, trace in kept.items() if trace is None or trace.complete is not seen.traces[each]]
    fifth = max(1, len(seen.samples) // 5)
    first, last = seen.samples[fifth : 2 * fifth], seen.samples[-fifth:]
    before, growth = (statistics.median(resident for resident, _ in part) for part in (first, last))
    files_before, files = (max(count for _, count in part) for part in (first, last))
    done = {"answers": dict(seen.answers), "refused": dict(seen.refused), "changes": seen.changes, "kills": seen.kills, "releases": RELEASES}
    restored = [round(seconds, 1) for seconds in seen.restored]
    rows = [
        ("wrong answers", len(seen.wrong), 0, "answers", seen.answers.total(), {"first": seen.wrong[:3]}),
        ("unclean errors", len(seen.unclean), 0, "requests", seen.answers.total() + seen.refused.total(), {"first": seen.unclean[:3]}),
        ("lost traces", len(lost), 0, "traces", len(seen.traces), {"first": lost[:3]}),
        ("resident memory, end over beginning", round(growth / before, 3), MAX_GROWTH, "ratio", len(seen.samples), {"mib": round(growth / 2**20)}),
        ("open files, end over beginning", files - files_before, MAX_FILES, "files", len(seen.samples), {}),
        ("engine killed and back", len(seen.restored), 3, "kills", seen.kills, {"restored_seconds": restored, **done}),
    ]
    return [
        {
            "bench": f"soak, {minutes:g} min: {name}", "ours": ours, "peer": limit, "peer_name": "limit", "ratio": None, "unit": unit, "n": n, "spread": None,
            "passed": ours == limit if name.startswith("engine") else ours <= limit, **more,
        }
        for name, ours, limit, unit, n, more in rows
    ]  # fmt: skip


def prepare(workspace: Workspace, adapter: str, root: Path) -> tuple[Workspace, str]:
    """A workspace in `root` with the adapter, its proof and corpus, and the disturbed copy; small queues, so that the limit is reached."""
    register_copies(workspace, adapter, 1, root)
    manifest, source = find_adapter(workspace, adapter)
    shutil.copytree(source, root / "adapters" / manifest.name / manifest.digest)
    for name in ("index", "calibrations"):
        if (workspace.root / name).exists():
            shutil.copytree(workspace.root / name, root / name)
    shutil.copy2(workspace.root / "store.db", root / "store.db")
    write_text(root / "understudy.yaml", "gateway: {max_waiting: 4, wait_seconds: 30, port: 18452}\nserve: {port: 18451}\ncache: {enabled: false}\n")
    return open_workspace(str(root)), manifest.served_name


def references(url: str, adapter: str, prompts: list[Prompt]) -> dict[str, dict[str, str]]:
    """What base and adapter answer, alone."""
    found: dict[str, dict[str, str]] = {"base": {}, adapter: {}}
    with show_progress("references", 2 * len(prompts)) as bar:
        for model, texts in found.items():
            for prompt in prompts:
                body = {"model": model, "messages": [turn.model_dump() for turn in prompt], "max_tokens": TOKENS, "temperature": 0}
                answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120)
                answer.raise_for_status()
                texts[prompt[-1].content] = answer.json()["choices"][0]["message"]["content"]
                bar.advance()
    return found


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the gateway says that it is ready; exits where the server has ended."""
    deadline = time.monotonic() + START_SECONDS
    ready: Callable[[], bool] = lambda: httpx.get(url.removesuffix("/v1") + "/ready").status_code == 200  # noqa: E731
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if ready():
                return
        time.sleep(0.5)
    sys.exit("the gateway did not become ready")


def main() -> None:
    """Soak the newest version of an adapter of a workspace; it must be proven."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--adapter", default="handbooks")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace, adapter = prepare(open_workspace(args.workspace), args.adapter, Path(folder))
        [copy] = [each for each in registered_adapters(workspace, find_adapter(workspace, adapter)[0].served_base_digest) if each.name != adapter]
        process = subprocess.Popen([sys.executable, "-m", "understudy.cli", "--workspace", folder, "serve"])
        try:
            url = url_of(workspace.config.gateway)
            wait_until_ready(url, process)
            prompts = read_prompts(workspace, 12)
            door = Door(workspace, url, process.pid, adapter, references(url, adapter, prompts))
            lines = judge(door, asyncio.run(soak(door, prompts, copy, args.minutes)), args.minutes)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    for printed in lines:
        print(json.dumps(printed), flush=True)
    sys.exit(0 if all(printed["passed"] for printed in lines) else 1)


if __name__ == "__main__":
    main()
