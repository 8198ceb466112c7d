"""How long a request to another server may take, how often it is made again, and how long to wait before."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how often it is made."""

    seconds: float = 120.0  # of one attempt, first byte to last: a slow drip ends here too
    attempts: int = 4
    first_pause: float = 0.5  # seconds; doubled each time, jittered
    longest_pause: float = 60.0  # a server that asks for a longer one is not asked again
    wake_seconds: float = 600.0  # how long a deployment without a replica is waited for, beside the attempts


def pause_before(attempt: int, patience: Patience, retry_after: float | None) -> float | None:
    """Seconds to wait after this many attempts: doubling, jittered down to half, never less than the server asks; None where it asks too much."""
    if retry_after is not None and retry_after > patience.longest_pause:
        return None
    pause = min(patience.first_pause * 2.0 ** (attempt - 1), patience.longest_pause) * random.uniform(0.5, 1.0)
    return max(pause, (retry_after or 0.0) * random.uniform(1.0, 1.1))


def seconds_asked(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date (RFC 9110), as seconds from now; None where it is neither."""
    if not retry_after:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        at: float = parsedate_to_datetime(retry_after).timestamp()
    except ValueError:
        return None
    return max(0.0, at - time.time())
