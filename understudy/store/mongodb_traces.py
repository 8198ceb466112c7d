"""The part of the MongoDB store that keeps traces, one row each."""

from __future__ import annotations

from collections.abc import Iterator

from understudy.records import Trace, TraceFilter
from understudy.store import ANY_TRACE
from understudy.store.mongodb_connection import Connection, Row, equal, put

PAGE = 100  # traces read at a time


class MongoTraces:
    """Traces in MongoDB; the store that inherits this gives the connection."""

    connection: Connection

    def put_trace(self, trace: Trace) -> None:
        """See Store."""
        fields = {name: getattr(trace, name) for name in ("tenant", "source", "model", "score", "complete", "outcome", "created_at")}
        self.connection.write("traces", [put({"_id": trace.id, **fields, "question": trace.question.lower(), "record": trace.model_dump_json()})])

    def trace(self, trace_id: str) -> Trace | None:
        """See Store."""
        rows = self.connection.find("traces", {"_id": {"$gte": trace_id, "$lt": trace_id + "g"}}, ["record"], limit=2)
        return Trace.model_validate_json(rows[0]["record"]) if len(rows) == 1 else None

    def traces(self, tenant: str, where: TraceFilter = ANY_TRACE) -> Iterator[Trace]:
        """See Store. Read a page at a time, so that a connection that breaks between traces does no harm."""
        conditions: list[Row] = [equal(tenant=tenant), *_trace_conditions(where)]
        after: list[Row] = []
        while True:
            rows = self.connection.find(
                "traces", {"$and": conditions + after}, ["created_at", "record"], sort=[("tenant", 1), ("created_at", 1), ("_id", 1)], limit=PAGE
            )
            yield from (Trace.model_validate_json(row["record"]) for row in rows)
            if len(rows) < PAGE:
                return
            moment, last = rows[-1]["created_at"], rows[-1]["_id"]
            after = [{"$or": [{"created_at": {"$gt": moment}}, {"created_at": moment, "_id": {"$gt": last}}]}]


def _trace_conditions(where: TraceFilter) -> list[Row]:
    """Queries that compare values: none is read as an operator or a pattern."""
    model, contains = where.model or "", (where.contains or "").lower()
    conditions: dict[str, Row] = {
        "source": equal(source=where.source),
        "model": {"$or": [equal(model=model), {"model": {"$gte": f"{model}@", "$lt": f"{model}A"}}]},  # "A" follows "@"
        "contains": {"$expr": {"$gte": [{"$indexOfCP": ["$question", {"$literal": contains}]}, 0]}},
        "min_score": {"score": {"$gte": where.min_score}},
        "max_score": {"score": {"$lte": where.max_score}},
        "since": {"created_at": {"$gte": where.since}},
        "until": {"created_at": {"$lt": where.until}},
        "complete": equal(complete=where.complete),
        "outcome": equal(outcome=where.outcome),
    }
    return [conditions[name] for name in where.model_dump(exclude_none=True)]
