"""What people say of a document beside its text: tags, validity, boost. From the command line, a sidecar NAME.meta.yaml, or a JSONL row."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from understudy.errors import DocumentError, UsageError
from understudy.records import Record

SIDECAR = ".meta.yaml"


class Metadata(Record):
    """Times are seconds since the epoch; given as a day, `valid_from` is its beginning and `valid_until` its end, in UTC."""

    title: str = ""
    source: str = ""
    tags: list[str] = Field(default_factory=list)
    boost: float | None = Field(None, gt=0, le=100)
    valid_from: float | None = None
    valid_until: float | None = None

    @field_validator("tags", mode="before")
    @classmethod
    def _one_tag_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("valid_from", mode="before")
    @classmethod
    def _begins(cls, value: Any) -> float | None:
        return moment(value, end_of_day=False)

    @field_validator("valid_until", mode="before")
    @classmethod
    def _ends(cls, value: Any) -> float | None:
        return moment(value, end_of_day=True)

    def over(self, other: Metadata) -> Metadata:
        """This, with what it leaves open taken from the other; tags of both."""
        mine = {name: value for name in type(self).model_fields if (value := getattr(self, name))}
        return other.model_copy(update=mine | {"tags": list(dict.fromkeys([*other.tags, *self.tags]))})


def moment(value: Any, end_of_day: bool) -> float | None:
    """Seconds since the epoch of a date, a time (UTC unless it says otherwise), or a number; raises ValueError."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        if value is not None and not math.isfinite(value):
            raise ValueError("not a moment in time")
        return None if value is None else float(value)
    if isinstance(value, str):
        text = value.strip()
        value = date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        start = datetime.combine(value, time(), UTC)
        return (start + timedelta(days=1) if end_of_day else start).timestamp()
    raise ValueError("give a date such as 2026-03-31, or a time such as 2026-03-31T12:00:00+01:00")


def from_arguments(**values: Any) -> Metadata:
    """Metadata from the command line; raises UsageError with every fault."""
    try:
        return Metadata.model_validate(values)
    except ValidationError as error:
        raise UsageError("; ".join(_fault(f) for f in error.errors()), "for example --valid-until 2026-12-31 --boost 1.5") from error


def sidecar_of(file: Path) -> Path:
    """Where a file's sidecar would be: report.pdf.meta.yaml beside report.pdf."""
    return file.with_name(file.name + SIDECAR)


def read_sidecar(file: Path) -> Metadata:
    """The metadata that a file's sidecar holds, if it has one; raises DocumentError where it cannot be understood."""
    sidecar = sidecar_of(file)
    if not sidecar.is_file():
        return Metadata()
    try:
        return Metadata.model_validate(yaml.safe_load(sidecar.read_text(encoding="utf-8")) or {})
    except ValidationError as error:
        raise DocumentError(f"{sidecar.name}: {'; '.join(_fault(f) for f in error.errors())}", "correct the sidecar") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DocumentError(f"{sidecar.name} is not YAML: {error}"[:200], "correct the sidecar") from error


def row_metadata(values: dict[str, Any]) -> Metadata:
    """The metadata of a JSONL row; raises DocumentError."""
    try:
        return Metadata.model_validate(values)
    except ValidationError as error:
        raise DocumentError("; ".join(_fault(f) for f in error.errors()), "correct the row's metadata") from error


def _fault(fault: Any) -> str:
    return f"{'.'.join(map(str, fault['loc'])) or 'metadata'}: {str(fault['msg']).removeprefix('Value error, ')}"
