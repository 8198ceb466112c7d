"""The records that flow through everything: one definition each, immutable, JSON by pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from understudy.digests import digest_of

SCHEMA_VERSION = 1

StepName = Literal["rewrite", "plan", "retrieve", "answer", "validate"]
Split = Literal["train", "calibration", "held-out"]
TraceSource = Literal["model", "expert", "imported"]
TraceOutcome = Literal["answered", "abstained", "incomplete"]


class Record(BaseModel):
    """Immutable, and strict about unknown fields, so that a misspelt one is never silently lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Heading(Record):
    """A heading of a document: level 1 is the outermost."""

    start: int  # code points into the document's text
    level: int
    title: str


class Document(Record):
    """One source file, or one row of a JSONL file. Its group, the unit of every split and leak check, is the document itself."""

    id: str  # sha256 of tenant and bytes
    source_key: str  # what an update replaces
    source: str  # path or URL as given
    title: str
    media_type: str
    pages: int
    text: str  # all pages, joined; chunk offsets count its code points
    page_starts: list[int]  # offset of each page's first code point in `text`
    page_labels: list[str] = Field(default_factory=list)  # printed page numbers, where they are not 1, 2, 3, …
    headings: list[Heading] = Field(default_factory=list)  # in text order
    parser: str = ""  # name and version of what read its text
    ingested_at: float  # seconds since the epoch
    valid_from: float | None = None  # seconds since the epoch
    valid_until: float | None = None  # seconds since the epoch; stale from then on
    tenant: str = "default"
    tags: list[str] = Field(default_factory=list)
    boost: float = 1.0  # of its passages' scores
    given: dict[str, Any] = Field(default_factory=dict)  # metadata from the command line: it stays until the command line gives other

    def is_stale(self, at: float) -> bool:
        """Whether the document does not hold at a time (seconds since the epoch): not yet, or no longer."""
        return (self.valid_from is not None and at < self.valid_from) or (self.valid_until is not None and at >= self.valid_until)

    @staticmethod
    def make_id(tenant: str, content: bytes) -> str:
        """Equal bytes under one tenant are one document."""
        import hashlib

        return hashlib.sha256(tenant.encode() + b"\0" + content).hexdigest()


class Chunk(Record):
    """A slice of a document's text: `text == document.text[start:end]`."""

    id: str  # sha256 of document id, chunker version and span
    document_id: str
    document: str  # the source's file name, shown to people
    text: str
    start: int  # code points into the document's text
    end: int
    pages: list[int]  # physical, 1-based
    ordinal: int  # position within the document
    headings: list[str] = Field(default_factory=list)
    tenant: str = "default"

    @staticmethod
    def make_id(document_id: str, chunker: str, start: int, end: int) -> str:
        """The same span cut by the same chunker is the same chunk."""
        return digest_of([document_id, chunker, start, end])


def document_of(group_id: str) -> str:
    """The document of a group: a group is a document, or one of its sections, DOCUMENT#HEADING."""
    return group_id.partition("#")[0]


class Scores(Record):
    """Every score a passage was ranked by; None where that ranking did not return it."""

    dense: float | None = None  # cosine
    lexical: float | None = None  # BM25
    fused: float = 0.0  # reciprocal rank fusion
    reranked: float | None = None


class Passage(Record):
    """A retrieved chunk."""

    chunk: Chunk
    scores: Scores
    rank: int  # 1 is best


class Message(Record):
    """The only interchange form between traces, datasets and models."""

    role: Literal["system", "user", "assistant"]
    content: str


class Usage(Record):
    """Token counts of one model call."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Both calls together."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


class Step(Record):
    """One node's run inside a trace."""

    name: StepName
    messages: list[Message] = Field(default_factory=list)
    text: str = ""  # what the model wrote
    parsed: dict[str, object] = Field(default_factory=dict)
    passage_ids: list[str] = Field(default_factory=list)  # chunk ids, in the order shown
    model: str = ""
    endpoint: str = ""
    usage: Usage = Usage()
    mean_logprob: float | None = None  # per completion token, nats
    finish_reason: str = ""
    started_at: float = 0.0  # seconds since the epoch
    seconds: float = 0.0
    first_token_seconds: float | None = None  # from the request to the first text, where it was streamed
    error: str = ""


class Citation(Record):
    """A verbatim quote and where it stands; `start`/`end` count code points of the document's text."""

    chunk_id: str
    document_id: str
    document: str
    quote: str
    page: int
    start: int
    end: int


class Trace(Record):
    """One whole run, or one expert's answer over the passages that retrieval really returned."""

    id: str
    tenant: str = "default"
    question: str
    steps: list[Step]
    answer: str
    abstained: bool
    citations: list[Citation]
    quotes: list[str] = Field(default_factory=list)  # as emitted, before any check
    score: float | None  # validation score in [0, 1]
    source: TraceSource
    cache: Literal["off", "miss", "exact", "semantic"] = "off"
    model: str = ""  # resolved name of the answering model
    generation: str  # corpus generation retrieved from
    prompt_version: str
    release: str | None = None
    complete: bool = True
    created_at: float  # seconds since the epoch
    metadata: dict[str, str] = Field(default_factory=dict)  # question file id, split, type

    @property
    def outcome(self) -> TraceOutcome:
        """How the run ended."""
        return "incomplete" if not self.complete else "abstained" if self.abstained else "answered"


class TraceFilter(Record):
    """Which traces are meant: those that meet every condition given."""

    source: TraceSource | None = None
    model: str | None = None  # a resolved name, or an adapter's name for all its digests
    contains: str | None = None  # stands in the question, whatever the case of its letters
    min_score: float | None = None  # bounds are inclusive; a trace without a score meets none
    max_score: float | None = None
    since: float | None = None  # seconds since the epoch, inclusive
    until: float | None = None  # seconds since the epoch, exclusive
    complete: bool | None = None
    outcome: TraceOutcome | None = None


class Example(Record):
    """A training row, kept unrendered so that passage order can change by epoch."""

    task: Literal["plan", "answer", "validate", "chat"]
    question: str
    passage_ids: list[str]  # chunk ids, in canonical order
    optional_ids: list[str] = Field(default_factory=list)  # passages that an epoch may leave out, the same for every row of the set
    support_ids: list[str] = Field(default_factory=list)  # chunk ids that hold what the trace cites, shown or not
    messages: list[Message] = Field(default_factory=list)  # chat: the prompt, of an imported conversation
    proposal: str = ""  # validate: the answer to be judged
    target: str
    weight: float = 1.0
    split: Literal["train", "validation"]
    kind: str  # e.g. answerable, no-support, unanswerable, good, bad
    trace_id: str
    group_ids: list[str]  # groups (document ids, or sections of the only document) that the row learns from

    @property
    def digest(self) -> str:
        """Identity of the row: everything that reaches the model."""
        return digest_of(self.model_dump())


class Question(Record):
    """A row of a question file; `answers` None means that abstaining is right."""

    id: str
    question: str
    answers: list[str] | None = None
    has_answer_key: bool = False  # whether the row says what the right answer is
    quotes: list[str] = Field(default_factory=list)
    documents: list[str] = Field(default_factory=list)
    pages: list[int] = Field(default_factory=list)
    query: str = ""
    type: str = ""
    tenant: str = "default"

    @property
    def answerable(self) -> bool:
        """Whether the documents answer it."""
        return self.answers is not None
