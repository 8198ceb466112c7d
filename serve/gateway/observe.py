"""What an operator sees: a JSON line a request, and Prometheus metrics. Never a question, an answer or a key."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.gateway.call import Call

if TYPE_CHECKING:
    from understudy.records import Trace

LOG_BYTES = 64 * 2**20  # then the log becomes gateway.previous.jsonl
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Log:
    """JSON lines in logs/gateway.jsonl; at most two files of LOG_BYTES are kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: object) -> None:
        """One line; a disk that is full loses it and nothing else."""
        at = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": at, "event": event, **fields}).encode() + b"\n"
        with self._lock:
            try:
                if self._file.tell() > LOG_BYTES:
                    self._file.close()
                    self._path.replace(self._path.with_suffix(".previous.jsonl"))
                    self._file = self._path.open("ab", buffering=0)
                self._file.write(line)
            except OSError:
                return

    def request(self, call: Call) -> None:
        """The line of a finished request."""
        first = None if call.first_byte is None else round(call.first_byte, 4)
        fields: dict[str, Any] = {"request_id": call.id, "method": call.method, "path": call.path[:200], "status": call.status}
        fields |= {"seconds": round(call.seconds, 4), "first_byte_seconds": first, "tenant": call.tenant, "key": call.key.id if call.key else None}
        self.write(
            "request",
            **fields,
            model=call.model,
            release=call.release,
            error=call.error or None,
            **{f"{name}_tokens": count for name, count in call.tokens.items()},
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Metrics:
    """The gateway's figures. Labels come from routes and resolved names only, so nobody can make up new series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on: dict[str, Any] = {"registry": self.registry, "namespace": "understudy"}
        self._requests = Counter("requests", "Requests answered", ["route", "model", "tenant", "status"], **on)
        self._seconds = Histogram("request_seconds", "From the request to the last byte", ["route"], buckets=SECONDS, **on)
        self._first = Histogram("first_byte_seconds", "From the request to the first byte of the answer", ["route"], buckets=SECONDS, **on)
        self._tokens = Counter("tokens", "Tokens, where the reply says how many", ["model", "tenant", "kind"], **on)
        self._answers = Counter("agent_answers", "Answers of the agent", ["tenant", "outcome", "cache", "escalated"], **on)
        self._releases = Counter(
            "release_answers", "Answers by release, and whether it is live, on trial or in the shadow", ["release", "role", "outcome"], **on
        )
        self.release_stops = Counter("release_stops", "Trials that stopped by themselves", ["alias"], **on)
        self.running = Gauge("running_requests", "Requests that hold a slot of a model server", ["server"], **on)
        self.waiting = Gauge("waiting_requests", "Requests that wait for one", ["server"], **on)
        self.engine_up = Gauge("engine_up", "Whether the engine is there", **on)
        self.engine_restarts = Counter("engine_restarts", "Restarts of an engine that ended", **on)

    def count(self, call: Call, route: str) -> None:
        """Count a finished request."""
        self._requests.labels(route, call.model, call.tenant, call.status).inc()
        self._seconds.labels(route).observe(call.seconds)
        if call.first_byte is not None:
            self._first.labels(route).observe(call.first_byte)
        for kind, count in call.tokens.items():
            self._tokens.labels(call.model, call.tenant, kind).inc(count)

    def count_answer(self, trace: Trace) -> None:
        """Count an answer of the agent; the share escalated is that of the label."""
        self._answers.labels(trace.tenant, trace.outcome, trace.cache, str("escalated" in trace.metadata).lower()).inc()

    def count_release(self, release: str, role: str, outcome: str) -> None:
        """Count an answer of a release."""
        self._releases.labels(release, role, outcome).inc()

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
