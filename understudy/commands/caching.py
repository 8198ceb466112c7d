"""cache ls/explain/calibrate/wrong/clear."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, workspace_of
from understudy.errors import NotFoundError
from understudy.terminal import printable

if TYPE_CHECKING:
    from rag.cache import Candidate


def cache_ls(args: Namespace) -> Outcome:
    """List the entries and the totals."""
    workspace = workspace_of(args)
    store, tenant = workspace.store, workspace.config.tenant
    entries, totals = store.cache_entries(tenant), store.cache_totals(tenant)
    rows = [
        {"id": e.id, "question": e.question, "answer": e.answer, "score": e.score, "scope": e.scope, "generation": e.generation, "hits": e.hits}
        | {"wrong_hits": e.wrong_hits, "observations": len(e.observations), "created_at": e.created_at, "expires_at": e.expires_at, "trace_id": e.trace_id}
        for e in entries
    ]
    lines = [printable(f"{e.id[:12]}  {e.hits:4} hits  {len(e.observations):3} observed  {e.score:.2f}  {e.question}") for e in entries]
    summary = f"{len(entries)} entries; {totals.hits} hits so far, {totals.wrong_hits} of them called wrong, {totals.seconds_saved:.0f} s saved"
    return Outcome({"entries": rows, "totals": {"entries": len(rows), **totals.model_dump()}}, [*lines, summary])


def cache_explain(args: Namespace) -> Outcome:
    """Show what the cache makes of a question."""
    from rag.cache_guard import question_digest
    from rag.retrieve import open_retriever
    from understudy.cache_records import CacheEntry
    from understudy.commands.wiring import cache_scope, open_cache, usual_model

    workspace = workspace_of(args)
    cache = open_cache(workspace, open_retriever(workspace))
    scope = cache_scope(workspace, args.model or usual_model(workspace), args.mode or workspace.config.agent.mode)
    exact = workspace.store.cache_entry(CacheEntry.make_id(scope.digest, question_digest(args.question)))
    near = cache.candidates(args.question, cache.retriever.embed([args.question])[0], scope)
    allowed = [candidate for candidate in near if cache.allows(candidate)]
    decision = "exact" if exact else "semantic" if allowed else "miss"
    chosen = exact or (max(allowed, key=lambda candidate: candidate.belief.lower).entry if allowed else None)
    bound = workspace.config.cache.error_bound
    result = {
        "decision": decision,
        "entry": chosen.id if chosen else None,
        "answer": chosen.answer if chosen else None,
        "enabled": workspace.config.cache.enabled,
        "error_bound": bound,
        "candidates": [_candidate_json(candidate, bound) for candidate in near],
    }
    lines = [f"would be: {decision}" + (f", entry {chosen.id[:12]}: {chosen.answer}" if chosen else "")]
    lines += [line for candidate in near for line in _candidate_lines(candidate, bound)] or ["no entry is near"]
    return Outcome(result, [printable(line) for line in lines])


def _candidate_json(candidate: Candidate, bound: float) -> dict[str, Any]:
    belief = candidate.belief
    return {
        "entry": candidate.entry.id,
        "question": candidate.entry.question,
        "similarity": round(candidate.cosine, 4),
        "findings": list(candidate.comparison.findings),
        "missing": list(candidate.comparison.missing),
        "added": list(candidate.comparison.added),
        "prior": belief.prior,
        "threshold": belief.threshold,
        "observations": belief.observations,
        "probability": belief.probability,
        "lower": belief.lower,
        "allowed": not candidate.comparison.findings and belief.lower >= 1 - bound,
    }


def _candidate_lines(candidate: Candidate, bound: float) -> list[str]:
    belief, comparison = candidate.belief, candidate.comparison
    lines = [f"{candidate.entry.id[:12]}  similarity {candidate.cosine:.3f}  {candidate.entry.question}"]
    if comparison.findings:
        return [*lines, f"    the guard: {'; '.join(comparison.findings)}"]
    words = [f"{label} {' '.join(found)}" for label, found in (("missing", comparison.missing), ("added", comparison.added)) if found]
    learnt = f", {belief.observations} observations moved its threshold by {belief.threshold:+.2f}" if belief.observations else ", nothing observed of it yet"
    verdict = "enough" if belief.lower >= 1 - bound else f"{1 - bound:.4g} is asked for"
    return [
        *lines,
        f"    the guard finds nothing{'; ' + ', '.join(words) if words else '; the same content words'}",
        f"    probability of being right {belief.probability:.4f} (prior {belief.prior:.4f}{learnt}), at least {belief.lower:.4f}: {verdict}",
    ]


def cache_calibrate(args: Namespace) -> Outcome:
    """Fit the prior on labelled pairs and report what it does on them."""
    from rag.cache_calibrate import calibrate, hits_among, measure_pairs, read_pairs, wilson
    from rag.cache_decision import read_parameters, write_parameters
    from rag.reindex import open_embedder
    from understudy.files import require_file

    workspace = workspace_of(args)
    pairs = read_pairs(require_file(Path(args.file)))
    measured = measure_pairs(pairs, open_embedder(workspace).encode)
    parameters = read_parameters(workspace.calibrations)
    if not args.dry_run:
        parameters = calibrate(measured, parameters.entry_sd)
        write_parameters(workspace.calibrations, parameters)
    bound = workspace.config.cache.error_bound
    hits = hits_among(measured, parameters, bound)
    wrong = [one for one in hits if not one.pair.same]
    same = sum(pair.same for pair in pairs)
    low, high = wilson(len(wrong), len(hits))
    blocked = Counter(one.comparison.findings[0].split(":")[0] for one in measured if one.comparison.findings)
    result = {
        "pairs": len(pairs),
        "same": same,
        "error_bound": bound,
        "hits": len(hits),
        "wrong_hits": len(wrong),
        "wrong_share": {"value": len(wrong) / len(hits) if hits else None, "low": low, "high": high},
        "hit_share_of_same": (len(hits) - len(wrong)) / same if same else None,
        "guard": dict(blocked),
        "parameters": parameters.model_dump(),
        "saved": not args.dry_run,
    }
    lines = [
        f"{len(pairs)} pairs, {same} of them the same; the guard stops {sum(blocked.values())}: {', '.join(f'{k} {n}' for k, n in blocked.most_common())}",
        f"at error bound {bound:g}: {len(hits)} hits, {len(wrong)} wrong ({low:.2%} to {high:.2%} of hits), {len(hits) - len(wrong)} of {same} same ones found",
        "measured on other pairs than it was fitted on, this is an estimate; on the same pairs it is not"
        if args.dry_run
        else "kept; measure it on pairs that it has not seen with --dry-run",
    ]
    return Outcome(result, lines)


def cache_wrong(args: Namespace) -> Outcome:
    """Take a person's word that a hit was wrong: a semantic hit teaches the entry's threshold, an exact one removes the entry."""
    from rag.cache import take_wrong_hit

    store = workspace_of(args).store
    trace = store.trace(args.trace)
    entry = take_wrong_hit(store, trace) if trace else None
    if trace is None or entry is None:
        raise NotFoundError(f"{args.trace!r} is no answer from an entry that is still in the cache", "`understudy traces ls` lists the traces")
    done = "its threshold was raised" if trace.cache == "semantic" else "it was removed"
    return Outcome({"entry": entry.id, "removed": trace.cache != "semantic"}, [f"entry {entry.id[:12]}: {done}"])


def cache_clear(args: Namespace) -> Outcome:
    """Remove every entry of the tenant."""
    workspace = workspace_of(args)
    removed = workspace.store.remove_cache_entries([entry.id for entry in workspace.store.cache_entries(workspace.config.tenant)])
    return Outcome({"removed": removed}, [f"{removed} entries removed"])
