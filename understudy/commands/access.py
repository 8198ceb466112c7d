"""keys create, ls and revoke: who may use the gateway."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from understudy.commands import Outcome, workspace_of


def keys_create(args: Namespace) -> Outcome:
    """Make a key, and show it this once."""
    from serve.keys import USUAL_SCOPES, create_key

    workspace = workspace_of(args)
    made, text = create_key(workspace, args.name, args.tenant or workspace.config.tenant, args.scope or list(USUAL_SCOPES), args.requests_per_minute, args.days)
    described = made.model_dump(exclude={"sha256"})
    lines = [text, f"key {made.id} of {made.tenant}: {', '.join(made.scopes)}; {made.requests_per_minute} requests a minute. It is not kept: it is shown once"]
    return Outcome({"key": text, **described}, lines)


def keys_ls(args: Namespace) -> Outcome:
    """List the keys."""
    from serve.keys import keys_file, read_keys

    keys = list(read_keys(keys_file(workspace_of(args))).values())
    rows: list[dict[str, Any]] = [key.model_dump(exclude={"sha256"}) for key in keys]
    lines = [f"{key.id}  {key.name:24} {key.tenant:16} {', '.join(key.scopes)}{_state(key.revoked_at, key.expires_at)}" for key in keys]
    return Outcome({"keys": rows}, lines or ["no keys: on loopback the gateway asks for none"])


def keys_revoke(args: Namespace) -> Outcome:
    """End a key."""
    from serve.keys import revoke_key

    revoked = revoke_key(workspace_of(args), args.key)
    return Outcome(revoked.model_dump(exclude={"sha256"}), [f"key {revoked.id} ({revoked.name}) is revoked"])


def _state(revoked_at: float | None, expires_at: float | None) -> str:
    if revoked_at is not None:
        return f"; revoked {_day(revoked_at)}"
    return f"; until {_day(expires_at)}" if expires_at is not None else ""


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"
