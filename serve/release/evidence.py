"""What a promotion rests on: a proof of every adapter, and an evaluation of the release that passes its gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rag.generations import live_generation
from rag.prompts import PROMPT_VERSION
from serve.prove import PROOF
from understudy.adapters import find_adapter
from understudy.errors import NotFoundError, UnderstudyError
from understudy.files import read_json
from understudy.releases import ENGINE, Release, read_release, standing
from understudy.settings.evaluating import Gate
from understudy.workspace import Workspace


def missing_evidence(workspace: Workspace, release: Release, with_evaluation: bool = True) -> tuple[list[str], dict[str, Any]]:
    """(what speaks against letting a release answer people, in words; what speaks for it, for the record).

    A trial measures, so it needs no evaluation; to go live does.
    """
    lacking, shown = [], {}
    for adapter in sorted(set(release.adapters.values()) - {"base"}):
        fault, proof = _proof_of(workspace, adapter)
        lacking += [fault] * bool(fault)
        shown[f"proof {adapter}"] = proof
    if release.endpoint != ENGINE:
        lacking.append(f"{release.endpoint} is a remote: what it serves cannot be proven from here")
    if release.prompt_version != PROMPT_VERSION:
        lacking.append("it was made with other prompts than this version's: create it anew")
    if not with_evaluation:
        return lacking, shown
    try:
        if live_generation(workspace.index, release.tenant) != release.generation:
            lacking.append("the corpus has changed since it was made: create it anew")
    except NotFoundError as error:
        lacking.append(error.message)
    faults, evaluation = _evaluation_of(workspace, release)
    return lacking + faults, {**shown, "evaluation": evaluation}


def live_name(workspace: Workspace, alias: str) -> str:
    """What a gate `against: live` is against: the alias' live release, before there is one the base."""
    live = standing(workspace, alias).live
    return read_release(workspace, alias, live).name if live else "base"


def _proof_of(workspace: Workspace, adapter: str) -> tuple[str, dict[str, Any]]:
    """(why an adapter is not proven, empty where it is; when and on what it was)."""
    try:
        manifest, folder = find_adapter(workspace, adapter)
        proof = read_json(folder / PROOF) if (folder / PROOF).exists() else {}
    except UnderstudyError as error:
        return error.message, {}
    if proof.get("digest") != manifest.digest or proof.get("engine", {}).get("base_digest") != manifest.served_base_digest:
        return f"{adapter} is not proven: run `understudy prove {adapter}`", {}
    shown = {key: proof.get(key) for key in ("passed", "created_at")}
    return ("" if proof.get("passed") is True else f"the proof of {adapter} {'is undecided' if proof.get('verdict') == 'undecided' else 'failed'}"), shown


def _evaluation_of(workspace: Workspace, release: Release) -> tuple[list[str], dict[str, Any] | None]:
    """(what the release's latest evaluation lacks; which one it is)."""
    found = _latest_report(workspace.reports, release)
    if found is None:
        return [f"it was not evaluated on its corpus: run `understudy evaluate --questions FILE --models base,{release.name}`"], None
    path, report = found
    of_release = [gate for gate in report["gates"] if gate["model"] == release.name]
    faults = [f"its evaluation's gate on {gate['metric']} against {gate['against']}: {gate['status']}" for gate in of_release if gate["status"] != "pass"]
    live = live_name(workspace, release.alias)
    for metric, gate in workspace.config.evaluate.gates.items():
        if not any(is_of(result, metric, gate, live) for result in of_release):
            faults.append(f"its evaluation did not put the gate on {metric} against {live if gate.against == 'live' else gate.against}: evaluate it anew")
    if not of_release:
        faults.append("its evaluation put no gate to it: name another model first in --models")
    shown = {"report": workspace.relative(path), "questions": report["provenance"].get("questions"), "gates": of_release}
    return faults, shown


def is_of(result: dict[str, Any], metric: str, gate: Gate, live: str) -> bool:
    """Whether a gate's result in a report is of this gate, `live` being what is live now."""
    against = live if gate.against == "live" else gate.against
    is_named = against == result["against"] or ("@" in result["against"] and result["against"].partition("@")[0] == against)
    limits = (result.get("min_gain"), result.get("max_loss"), result["confidence"])
    return result["metric"] == metric and is_named and limits == (gate.min_gain, gate.max_loss, gate.confidence)


def _latest_report(reports: Path, release: Release) -> tuple[Path, dict[str, Any]] | None:
    """The newest evaluation of this release over its own corpus and prompts."""
    found = []
    for path in reports.glob("*/report.json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            about = report["provenance"]
            if release.name in about["models"] and (about["generation"], about["prompt_version"]) == (release.generation, release.prompt_version):
                found.append((report["finished_at"], path, report))
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or being written
            continue
    newest = max(found, key=lambda each: each[0], default=None)
    return newest[1:] if newest else None
