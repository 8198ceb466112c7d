"""release create, ls, canary, promote and rollback: what answers under an alias."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from understudy.adapters import find_adapter
from understudy.commands import Outcome, workspace_of
from understudy.commands.wiring import calibration_folder, default_model, resolve_name
from understudy.errors import NotFoundError, UnderstudyError, UsageError
from understudy.releases import (
    ENGINE,
    Canary,
    Decision,
    Release,
    add_release,
    aliases,
    decide,
    decisions,
    find_release,
    is_alias,
    read_release,
    releases_of,
    rolled_back,
)
from understudy.terminal import printable
from understudy.workspace import Workspace

USUAL_SHARE = 0.1  # of a canary


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
    notes = unasked_steps(workspace, release)
    lines += notes
    lines.append(f"next: `understudy evaluate --questions FILE --models base,{release.name}`, then `understudy release promote {release.name}`")
    return Outcome({**release_json(release), "created": is_new, "notes": notes}, lines)


def unasked_steps(workspace: Workspace, release: Release) -> list[str]:
    """What the answering adapter's calibration leaves out although the release has an adapter of its own for it."""
    from rag.validation import read_calibration

    adapters, calibration = release.adapters, read_calibration(calibration_folder(workspace, release.name))
    if calibration is None:
        return []
    apart = {step: adapter for step, adapter in adapters.items() if adapter != adapters["answer"]}
    notes = []
    if "plan" in apart and not calibration.policy.plans_first:
        notes.append(f"{apart['plan']} is asked in later rounds only: the calibration of {adapters['answer']} leaves the first plan out")
    if "validate" in apart and not calibration.policy.asks_verdict:
        notes.append(f"{apart['validate']} is never asked: the calibration of {adapters['answer']} leaves the verdict out")
    return notes


def release_canary(args: Namespace) -> Outcome:
    """Try a release on a part of the traffic, or in the shadow of the live one; exit 3 where it is not proven."""
    from serve.release.deciding import begin_trial, find_candidate

    workspace = workspace_of(args)
    release = find_candidate(workspace, args.release)
    share = args.share if args.share is not None else 1.0 if args.tenant or args.shadow else USUAL_SHARE
    decision = begin_trial(workspace, release, share, args.tenant or [], args.shadow, args.reason, args.force)
    whom = f"{100 * share:g} % of the conversations" + (f" of {', '.join(args.tenant)}" if args.tenant else "")
    lines = [f"{release.name} {'is asked in the shadow of' if args.shadow else 'answers'} {whom}"]
    return _decided(workspace, release.alias, decision, [*lines, *_notice(workspace, release.alias)])


def release_promote(args: Namespace) -> Outcome:
    """Make a release live; exit 3 where evidence is missing."""
    from serve.release.deciding import find_candidate, promote

    workspace = workspace_of(args)
    release = find_candidate(workspace, args.release)
    decision = promote(workspace, release, args.reason, args.force)
    lines = [f"{release.name} is live: {_adapters_line(release)}"] + [f"against the evidence: {fault}" for fault in decision.evidence["lacking"]]
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
            lines.append(printable(words + (f": {' '.join(decision['reason'].split())}" if decision["reason"] else "")))
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
