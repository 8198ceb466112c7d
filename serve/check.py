"""One finding of a proof, as every check reports it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Status = Literal["fail", "undecided", "pass"]  # the worst first


@dataclass(frozen=True)
class Check:
    """One finding; it passes where `value` ≤ `limit`. `undecided`: there were too few rows to tell."""

    name: str
    value: float
    limit: float
    detail: str
    seconds: float = 0.0
    undecided: bool = False

    @classmethod
    def of_faults(cls, name: str, faults: list[str], otherwise: str, began: float) -> Self:
        """A check that counts faults, none allowed."""
        return cls(name, len(faults), 0, "; ".join(faults) or otherwise, time.monotonic() - began)

    @property
    def passed(self) -> bool:
        """Whether the adapter may take traffic, as far as this check goes."""
        return self.value <= self.limit and not self.undecided

    @property
    def status(self) -> Status:
        """What the check found."""
        return "undecided" if self.undecided else "pass" if self.passed else "fail"

    def to_json(self) -> dict[str, Any]:
        """The check as the command's JSON shows it."""
        value = float(f"{self.value:.4g}")
        figures = {"value": int(value) if value.is_integer() else value, "limit": self.limit}
        return {"name": self.name, "passed": self.passed, "status": self.status, **figures, "detail": self.detail, "seconds": round(self.seconds, 2)}


def verdict_of(checks: list[Check]) -> Status:
    """Of a whole proof: that of its worst check."""
    return next(status for status in get_args(Status) if any(check.status == status for check in checks))
