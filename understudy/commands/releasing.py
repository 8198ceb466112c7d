"""release create, ls, canary, promote and rollback: what answers under an alias."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from understudy.adapters import find_adapter
from understudy.commands import Outcome, printable, workspace_of
from understudy.commands.wiring import default_model, resolve_name
from understudy.errors import NotFoundError, UnderstudyError, UsageError
from understudy.records import ENGINE, Release
from understudy.releases import add_release, aliases, decisions, is_alias, releases_of
from understudy.workspace import Workspace


def release_create(args: Namespace) -> Outcome:
    """Join adapters, corpus, prompts and endpoint under an alias."""
    from rag.generations import live_generation
    from rag.prompts import PROMPT_VERSION

    workspace = workspace_of(args)
    answer = _adapter(workspace, args.answer or default_model(workspace))
    adapters = {"plan": _adapter(workspace, args.plan or answer), "answer": answer, "validate": _adapter(workspace, args.validate or answer)}
    if args.endpoint and (args.endpoint not in workspace.config.remotes or len(set(adapters.values())) > 1):
        raise UsageError(f"{args.endpoint} cannot serve this release", "name a configured remote, which serves one adapter for every step")
    release = Release.model_validate(
        {
            "alias": args.alias,
            "tenant": workspace.config.tenant,
            "generation": live_generation(workspace.index, workspace.config.tenant),
            "adapters": adapters,
            "prompt_version": PROMPT_VERSION,
            "endpoint": args.endpoint or ENGINE,
        }
    )
    is_new = add_release(workspace, release)
    lines = [f"{release.name}: {_adapters_line(release)}" + ("" if is_new else "; it was there already")]
    lines.append(f"next: `understudy evaluate --questions FILE --models base,{release.name}`, then `understudy release promote {release.name}`")
    return Outcome({**release_json(release), "created": is_new}, lines)


def release_ls(args: Namespace) -> Outcome:
    """Every alias with its releases and decisions."""
    workspace = workspace_of(args)
    if args.alias and not is_alias(workspace, args.alias):
        raise NotFoundError(f"no release {args.alias}", f"aliases: {', '.join(aliases(workspace)) or 'none yet: run `understudy release create`'}")
    rows, lines = [], []
    for alias in [args.alias] if args.alias else aliases(workspace):
        row = alias_json(workspace, alias)
        rows.append(row)
        for release in row["releases"]:
            lines.append(printable(f"{release['release']}  {release['state']:8}" + "".join(f"  {step} {name}" for step, name in release["adapters"].items())))
            lines += [f"  ! {fault}" for fault in release["faults"]]
        for decision in row["decisions"][-5:]:
            at = f"{datetime.fromtimestamp(decision['at'], UTC):%Y-%m-%d %H:%M}"
            words = f"  {at}  {decision['action']} {decision['release']}{', forced' if decision['forced'] else ''}"
            lines.append(printable(words + (f": {decision['reason']}" if decision["reason"] else "")))
    return Outcome({"aliases": rows}, lines or ["no releases yet"])


def release_json(release: Release) -> dict[str, Any]:
    """A release as JSON: `release` is the name it answers under."""
    return {"release": release.name, "digest": release.digest, **release.model_dump(exclude={"schema_version"})}


def alias_json(workspace: Workspace, alias: str) -> dict[str, Any]:
    """An alias as JSON: its releases with their state and what keeps them from answering, and what was decided."""
    made = decisions(workspace, alias)
    stands, names = made[-1].standing, {release.digest: release.name for release in releases_of(workspace, alias)}
    canary = stands.canary
    states = {digest: "former" for digest in stands.former}
    states |= {stands.live: "live"} if stands.live else {}
    states |= {canary.release: "shadow" if canary.shadow else "canary"} if canary else {}
    releases = [
        {**release_json(release), "state": states.get(release.digest, "created"), "faults": faults_of(workspace, release)}
        for release in releases_of(workspace, alias)
    ]
    return {
        "alias": alias,
        "live": names.get(stands.live or ""),
        "canary": {**canary.model_dump(), "release": names[canary.release]} if canary else None,
        "releases": releases,
        "decisions": [{**decision.model_dump(exclude={"schema_version", "standing"}), "release": names[decision.release]} for decision in made],
    }


def faults_of(workspace: Workspace, release: Release) -> list[str]:
    """What became of the things that a release is made of, in words; none where all is as it was."""
    from rag.generations import live_generation
    from rag.prompts import PROMPT_VERSION

    faults = []
    for adapter in dict.fromkeys(release.adapters.values()):
        try:
            if adapter != "base":
                find_adapter(workspace, adapter)
        except NotFoundError:
            faults.append(f"{adapter} is gone: this release answers nothing until it is restored")
    if release.endpoint != ENGINE and release.endpoint not in workspace.config.remotes:
        faults.append(f"{release.endpoint} is no configured remote any more")
    if release.prompt_version != PROMPT_VERSION:
        faults.append("it was made with other prompts than this version's")
    try:
        if live_generation(workspace.index, release.tenant) != release.generation:
            faults.append("the corpus has changed since it was made; evaluate it anew")
    except UnderstudyError as error:
        faults.append(error.message)
    return faults


def _adapter(workspace: Workspace, name: str) -> str:
    """base, or an adapter's name@digest12. Raises UsageError for what is neither."""
    if name in workspace.config.remotes or is_alias(workspace, name):
        raise UsageError(f"{name} is no adapter", "a step's model is base or an adapter; --endpoint names the remote that serves it")
    return resolve_name(workspace, name)


def _adapters_line(release: Release) -> str:
    """Who does what, in one line."""
    if len(set(release.adapters.values())) == 1:
        return f"{release.adapters['answer']} at every step"
    return ", ".join(f"{step} by {adapter}" for step, adapter in release.adapters.items())
