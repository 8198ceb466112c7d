"""`scripts/bench soak --minutes 10`: `understudy serve` at its limit while adapters come and go and the engine is killed three times.

Workers (scripts/soak_clients.py) keep more requests open than the engine runs at once: chat by the base, by the proven adapter and by an
alias, and questions to `rag`, which the alias answers. Meanwhile a disturbed copy of the adapter is loaded into the engine and unloaded
again and again, a release of the base is promoted under the alias and rolled back to one of the adapter, and the engine's processes get
SIGKILL at a quarter, half and three quarters of the time. Judged at the end:

    wrong answers     a reply under another name than was asked for, or with the text that only the other model gives
    wrong releases    a run with a step by a model that its release does not name, or by a release that was not live while it was asked
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
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from scripts.bench_adapters import register_copies
from scripts.serving import START_SECONDS, serving
from scripts.soak_clients import ALIAS, TOKENS, Door, Seen, question, work
from serve.engine import load_adapter, registered_adapters, unload_adapter
from serve.gateway.server import url_of
from serve.load import Prompt, read_prompts
from understudy.adapters import find_adapter
from understudy.engines import RunningEngine, find_engine
from understudy.errors import UnderstudyError
from understudy.files import write_text
from understudy.progress import show_progress
from understudy.records import Trace
from understudy.releases import decisions, releases_of
from understudy.workspace import Workspace, open_workspace

WORKERS = 24
SAMPLE_SECONDS = 2.0
MAX_GROWTH, MAX_FILES = 1.10, 2 * WORKERS  # of resident memory; of open files: each request may have a connection on either side
WARM_UP = 48  # questions before anything is counted: embedder, index and thread pools are there then
CLOCK_SECONDS = 1.0  # by which a decision's time may be off the moment from which it holds


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
    """Promote the base's release, roll back to the adapter's, again and again; a command that fails is an unclean error."""
    while time.monotonic() < until:
        for words in (("promote", names[1], "--force", "--reason", "soak"), ("rollback", ALIAS)):
            try:
                await run_command(door.workspace, "release", *words)
                seen.changes += 1
            except RuntimeError as error:
                seen.unclean.append(str(error))
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
        names = await make_releases(door)
        await asyncio.gather(*(question(http, door, prompts[number % len(prompts)], Seen()) for number in range(WARM_UP)))
        began = time.monotonic()
        until = began + 60 * minutes
        jobs: list[Awaitable[None]] = [work(http, door, prompts, number, until, seen) for number in range(WORKERS)]
        jobs += [change_adapters(door, copy, until, seen), change_releases(door, names, until, seen)]
        jobs += [kill_engine(door, began, until, seen), sample(door, until, seen), tell(until, seen)]
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
    lost = [each for each, trace in kept.items() if trace is None or trace.complete is not seen.traces[each].is_whole]
    strange = wrong_releases(door, seen, [trace for trace in kept.values() if trace is not None])
    fifth = max(1, len(seen.samples) // 5)
    first, last = seen.samples[fifth : 2 * fifth], seen.samples[-fifth:]
    before, growth = (statistics.median(resident for resident, _ in part) for part in (first, last))
    files_before, files = (max(count for _, count in part) for part in (first, last))
    done = {"answers": dict(seen.answers), "refused": dict(seen.refused), "changes": seen.changes, "kills": seen.kills}
    restored = [round(seconds, 1) for seconds in seen.restored]
    rows = [
        ("wrong answers", len(seen.wrong), 0, "answers", seen.answers.total(), {"first": seen.wrong[:3]}),
        ("wrong releases", len(strange), 0, "traces", len(kept), {"first": strange[:3]}),
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


def wrong_releases(door: Door, seen: Seen, traces: list[Trace]) -> list[str]:
    """Traces of a run that was not wholly by one release, live at some moment between its question and its answer."""
    models = {release.name: set(release.adapters.values()) for release in releases_of(door.workspace, ALIAS)}
    made = decisions(door.workspace, ALIAS)
    spans = [(one.at, following.at, one.standing.live) for one, following in pairwise(made)] + [(made[-1].at, time.time(), made[-1].standing.live)]
    found = []
    for trace in traces:
        asked, by, release = seen.traces[trace.id], {step.model for step in trace.steps if step.model}, trace.release or ""
        live = {digest for since, until, digest in spans if since - CLOCK_SECONDS <= asked.ended and until + CLOCK_SECONDS >= asked.began}
        if release not in {f"{ALIAS}@{(digest or '')[:12]}" for digest in live} or not by <= models[release]:
            found.append(f"{trace.id}: {release} by {', '.join(sorted(by))}")
    return found


def prepare(workspace: Workspace, adapter: str, root: Path) -> tuple[Workspace, str]:
    """A workspace in `root` with the adapter, its proof and corpus, and the disturbed copy; small queues, so that the limit is reached."""
    register_copies(workspace, adapter, 1, root)
    manifest, source = find_adapter(workspace, adapter)
    shutil.copytree(source, root / "adapters" / manifest.name / manifest.digest)
    for name in ("index", "calibrations"):
        if (workspace.root / name).exists():
            shutil.copytree(workspace.root / name, root / name)
    shutil.copy2(workspace.root / "store.db", root / "store.db")
    write_text(
        root / "understudy.yaml",
        "gateway: {max_waiting: 4, wait_seconds: 30, port: 18452}\nserve: {port: 18451}\ncache: {enabled: false}\nreleases: {default: soak}\n",
    )
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
        with serving(workspace) as process:
            prompts, url = read_prompts(workspace, 12), url_of(workspace.config.gateway)
            door = Door(workspace, url, process.pid, adapter, references(url, adapter, prompts))
            lines = judge(door, asyncio.run(soak(door, prompts, copy, args.minutes)), args.minutes)
            for printed in lines:
                print(json.dumps(printed), flush=True)
    sys.exit(0 if all(printed["passed"] for printed in lines) else 1)


if __name__ == "__main__":
    main()
