"""Letting a release answer people: on trial, or live. Each decision looks at its evidence first, and is written down with it."""

from __future__ import annotations

import time

from serve.release.evidence import missing_evidence
from understudy.adapters import find_adapter
from understudy.errors import GateFailed, UsageError
from understudy.releases import Canary, Decision, Release, Standing, decide, find_release, is_alias, on_trial, promoted, releases_of, standing
from understudy.workspace import Workspace


def find_candidate(workspace: Workspace, name: str) -> Release:
    """The release ALIAS@DIGEST, or of a bare alias its newest: to try or to promote what is live already makes no sense.

    Raises NotFoundError where it, or an adapter of it, is gone: no force brings that back.
    """
    known = releases_of(workspace, name) if is_alias(workspace, name) and "@" not in name else []
    release = known[-1] if known else find_release(workspace, name)
    for adapter in set(release.adapters.values()) - {"base"}:
        find_adapter(workspace, adapter)
    return release


def begin_trial(workspace: Workspace, release: Release, share: float, tenants: list[str], shadow: bool, reason: str = "", force: bool = False) -> Decision:
    """Let a release answer a share in (0, 1] of the conversations, of these tenants or of all, or be asked behind the live one's answers.

    Raises GateFailed where proofs are missing, UsageError where nothing is live to try it against.
    """
    if not 0 < share <= 1:
        raise UsageError(f"{share:g} is no share of the traffic", "give a number above 0 and up to 1")
    lacking, shown = missing_evidence(workspace, release, with_evaluation=False)
    _refuse(release, "be tried", lacking, force)
    canary = Canary(release=release.digest, share=share, tenants=tenants, shadow=shadow, began_at=time.time())

    def move(before: Standing) -> tuple[str, Standing]:
        return release.digest, on_trial(before, canary)

    return decide(workspace, release.alias, "canary", move, reason, bool(lacking), {**shown, "lacking": lacking})


def promote(workspace: Workspace, release: Release, reason: str = "", force: bool = False) -> Decision:
    """Make a release live; a trial of the alias is over. Raises GateFailed where evidence is missing, UsageError where it is live already."""
    judged_against = standing(workspace, release.alias).live
    lacking, shown = missing_evidence(workspace, release)
    _refuse(release, "go live", lacking, force)

    def move(before: Standing) -> tuple[str, Standing]:
        if before.live != judged_against:
            raise UsageError("another release went live at this moment", "`understudy release ls` shows which; promote again where that is still right")
        return release.digest, promoted(before, release.digest)

    return decide(workspace, release.alias, "promoted", move, reason, bool(lacking), {**shown, "lacking": lacking})


def _refuse(release: Release, what: str, lacking: list[str], forced: bool) -> None:
    """Raise GateFailed where evidence is lacking and nobody takes the decision upon themselves."""
    if lacking and not forced:
        raise GateFailed(f"{release.name} may not {what}: {'; '.join(lacking)}", "supply what is missing; or --force, which the decision's record will say")
