"""release create, ls, canary, promote and rollback: what answers under an alias."""

from __future__ import annotations

import time
from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from understudy.adapters import find_adapter
from understudy.commands import Outcome, printable, workspace_of
from understudy.commands.wiring import default_model, resolve_name
from understudy.errors import GateFailed, NotFoundError, UnderstudyError, UsageError
from understudy.records import ENGINE, Release
from understudy.releases import (
    Canary,
    Decision,
    Standing,
    add_release,
    aliases,
    decide,
    decisions,
    find_release,
    is_alias,
    on_trial,
    promoted,
    read_release,
    releases_of,
    rolled_back,
    standing,
)
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


def release_canary(args: Namespace) -> Outcome:
    """Try a release on a part of the traffic, or in the shadow of the live one."""
    from serve.release.evidence import missing_evidence

    workspace = workspace_of(args)
    release = _candidate(workspace, args.release)
    share = args.share if args.share is not None else 1.0 if args.tenant or args.shadow else 0.1
    if not 0 < share <= 1:
        raise UsageError(f"--share {share:g} is no share of the traffic", "give a number above 0 and up to 1")
    lacking, _ = missing_evidence(workspace, release, with_evaluation=False)
    _refuse(release, "be tried", lacking, args.force)
    canary = Canary(release=release.digest, share=share, tenants=args.tenant or [], shadow=args.shadow, began_at=time.time())

    def move(before: Standing) -> tuple[str, Standing]:
        return release.digest, on_trial(before, canary)

    decision = decide(workspace, release.alias, "canary", move, args.reason, bool(lacking), {"lacking": lacking})
    whom = f"{100 * share:g} % of the conversations" + (f" of {', '.join(canary.tenants)}" if canary.tenants else "")
    lines = [f"{release.name} {'is asked in the shadow of' if args.shadow else 'answers'} {whom}"]
    return _decided(workspace, release.alias, decision, [*lines, *_notice(workspace, release.alias)])


def release_promote(args: Namespace) -> Outcome:
    """Make a release live; exit 3 where evidence is missing."""
    from serve.release.evidence import missing_evidence

    workspace = workspace_of(args)
    release = _candidate(workspace, args.release)
    judged_against = standing(workspace, release.alias).live
    lacking, shown = missing_evidence(workspace, release)
    _refuse(release, "go live", lacking, args.force)

    def move(before: Standing) -> tuple[str, Standing]:
        if before.live != judged_against:
            raise UsageError("another release went live at this moment", "`understudy release ls` shows which; promote again where that is still right")
        return release.digest, promoted(before, release.digest)

    decision = decide(workspace, release.alias, "promoted", move, args.reason, bool(lacking), {**shown, "lacking": lacking})
    lines = [f"{release.name} is live: {_adapters_line(release)}"] + [f"against the evidence: {fault}" for fault in lacking]
    return _decided(workspace, release.alias, decision, [*lines, *_notice(workspace, release.alias)])


def release_rollback(args: Namespace) -> Outcome:
    """End a trial; where there is none, go back to what was live before."""
    workspace = workspace_of(args)
    if not is_alias(workspace, args.alias):
        raise NotFoundError(f"no release {args.alias}", f"aliases: {', '.join(aliases(workspace)) or 'none yet'}")
    decision = decide(workspace, args.alias, "rolled back", rolled_back, args.reason)
    live = find_release(workspace, args.alias)
    gone = read_release(workspace, args.alias, decision.release)
    lines = [f"{gone.name} takes no more traffic; {live.name} is live", *(f"! {fault}" for fault in faults_of(workspace, live))]
    return _decided(workspace, args.alias, decision, lines)


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
        if row["canary"]:
            lines += trial_lines(row["canary"]["trial"])
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
        "canary": {**canary.model_dump(), "release": names[canary.release], "trial": _trial_json(workspace, alias, canary)} if canary else None,
        "releases": releases,
        "decisions": [{**decision.model_dump(exclude={"schema_version", "standing"}), "release": names[decision.release]} for decision in made],
    }


def _trial_json(workspace: Workspace, alias: str, canary: Canary) -> dict[str, Any]:
    from serve.release.trial import read_trial, trial_file

    return read_trial(trial_file(workspace, alias, canary), workspace.config.releases).as_json()


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
            faults.append("the corpus has changed since it was made: create it anew")
    except UnderstudyError as error:
        faults.append(error.message)
    return faults


def trial_lines(trial: dict[str, Any]) -> list[str]:
    """What a trial has shown so far."""
    answers = trial["answers"]
    lines = [f"  on trial: {answers['canary']} answers against {answers['live']}; a test ends it at an e-value of {trial['stops_at']:g}"]
    for name, test in trial["tests"].items():
        mean = "–" if test["mean"] is None else f"{test['mean']:+.3f}"
        lines.append(f"    {name:10} {mean} over {test['comparisons']} comparisons (allowed {test['limit']:g}), e-value {test['e_value']:.3g}")
    return lines


def _candidate(workspace: Workspace, name: str) -> Release:
    """The release ALIAS@DIGEST, or of a bare alias its newest: to try or to promote what is live already makes no sense.

    Raises NotFoundError where it, or an adapter of it, is gone: no --force brings that back.
    """
    known = releases_of(workspace, name) if is_alias(workspace, name) and "@" not in name else []
    release = known[-1] if known else find_release(workspace, name)
    for adapter in set(release.adapters.values()) - {"base"}:
        find_adapter(workspace, adapter)
    return release


def _refuse(release: Release, what: str, lacking: list[str], forced: bool) -> None:
    """Raise GateFailed where evidence is lacking and nobody takes the decision upon themselves."""
    if lacking and not forced:
        raise GateFailed(f"{release.name} may not {what}: {'; '.join(lacking)}", "supply what is missing; or --force, which the decision's record will say")


def _decided(workspace: Workspace, alias: str, decision: Decision, lines: list[str]) -> Outcome:
    """What a decision comes to: the alias as it stands now."""
    release = read_release(workspace, alias, decision.release).name
    made = {**decision.model_dump(exclude={"schema_version", "standing"}), "release": release}
    return Outcome({"decision": made, **alias_json(workspace, alias)}, lines)


def _notice(workspace: Workspace, alias: str) -> list[str]:
    """What to set so that `rag` answers with the alias, where it does not."""
    if alias == workspace.config.releases.alias_of(workspace.config.tenant):
        return []
    return [f"`rag` does not use it: set releases.default: {alias} in understudy.yaml, and restart `understudy serve`"]


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
