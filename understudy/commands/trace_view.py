"""A trace as a person reads it: the run as a tree, with the passages shown and the quotes marked where they stand in them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from understudy.records import Chunk, Step, Trace
from understudy.terminal import printable

BOLD, DIM, MARK, END = "\x1b[1m", "\x1b[2m", "\x1b[30;43m", "\x1b[0m"
SIGNAL_DIGITS = 3


def trace_lines(trace: Trace, chunks: dict[str, Chunk], in_colour: bool) -> list[str]:
    """The tree, a line each. `chunks` are those that still exist; without colour a quote stands between » and «.

    Nothing of documents or models reaches the terminal but printable characters; colours are ours alone.
    """
    style = _style(in_colour)
    when = datetime.fromtimestamp(trace.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    score = "no score" if trace.score is None else f"score {trace.score:.2f}"
    seconds = sum(step.seconds for step in trace.steps)
    lines = [
        style(_flat(trace.question), BOLD),
        style(printable(f"{trace.id}  {when}  {trace.source}, {trace.outcome}, {score}, cache {trace.cache}"), DIM),
        style(printable(f"model {trace.model or '–'}, release {trace.release or '–'}, corpus {trace.generation}, prompts {trace.prompt_version}"), DIM),
    ]
    tokens = (
        sum(s.usage.prompt_tokens for s in trace.steps),
        sum(s.usage.cached_tokens for s in trace.steps),
        sum(s.usage.completion_tokens for s in trace.steps),
    )
    lines.append(style(f"{seconds:.2f} s, {tokens[0]} prompt tokens ({tokens[1]} cached), {tokens[2]} completion tokens", DIM))
    lines += [style(printable(f"{key}: {value}"), DIM) for key, value in trace.metadata.items() if value]
    for number, step in enumerate(trace.steps):
        is_last = number == len(trace.steps) - 1
        body = _step_lines(step, trace, chunks, style)
        lines.append(f"{'└─' if is_last else '├─'} {body[0]}")
        lines += [f"{'   ' if is_last else '│  '}{line}".rstrip() for line in body[1:]]
    lines += ["", printable(trace.answer) or "(no answer)"]
    lines += [printable(f'  "{_flat(c.quote)}"  {c.document}, p. {c.page}') for c in trace.citations]
    cited = {_flat(citation.quote) for citation in trace.citations}
    return lines + [printable(f'  not verbatim: "{_flat(quote)}"') for quote in trace.quotes if _flat(quote) not in cited]


def _step_lines(step: Step, trace: Trace, chunks: dict[str, Chunk], style: Callable[[str, str], str]) -> list[str]:
    """A step's headline, then what it read and wrote."""
    head = [f"{step.seconds:.2f} s"]
    if step.usage.prompt_tokens or step.usage.completion_tokens:
        head.append(f"{step.usage.prompt_tokens} → {step.usage.completion_tokens} tokens, {step.usage.cached_tokens} cached")
    if step.mean_logprob is not None:
        head.append(f"logprob {step.mean_logprob:.3f}")
    head += [part for part in (step.model, step.finish_reason) if part]
    lines = [f"{style(step.name, BOLD)}  {style(printable('  '.join(head)), DIM)}"]
    lines += [printable(f"{key}: {_value(value)}") for key, value in step.parsed.items()]
    if step.error:
        lines.append(printable(f"error: {step.error}"))
    lines += [line for message in step.messages for line in _indented(f"[{message.role}] {message.content}", style)] if step.name != "retrieve" else []
    if step.name == "retrieve":
        for chunk_id in step.passage_ids:
            lines += _passage_lines(chunk_id, trace, chunks, style)
    elif step.text:
        lines += [f"▸ {line}" for line in printable(step.text).splitlines()]
    return lines


def _passage_lines(chunk_id: str, trace: Trace, chunks: dict[str, Chunk], style: Callable[[str, str], str]) -> list[str]:
    """A passage with the trace's quotes marked, or word that it is gone."""
    chunk = chunks.get(chunk_id)
    if chunk is None:
        return [style(f"• {printable(chunk_id[:12])} is no longer in the corpus", DIM)]
    spans = sorted((c.start - chunk.start, c.end - chunk.start) for c in trace.citations if c.document_id == chunk.document_id)
    text, at = "", 0
    for start, end in spans:
        start, end = max(start, at), min(end, len(chunk.text))
        if start < end:  # quotes may overlap, and may lie in another passage of the document
            text += _flat_inside(chunk.text[at:start]) + style(_flat_inside(chunk.text[start:end]), MARK)
            at = end
    where = ", ".join([chunk.document, f"p. {chunk.pages[0] if chunk.pages else 1}", *chunk.headings])
    return [f"• {style(printable(where), DIM)}", f"  {(text + _flat_inside(chunk.text[at:])).strip()}"]


def _style(in_colour: bool) -> Callable[[str, str], str]:
    def coloured(text: str, code: str) -> str:
        return f"{code}{text}{END}" if text else ""

    def plain(text: str, code: str) -> str:
        return f"»{text}«" if code == MARK else text

    return coloured if in_colour else plain


def _indented(text: str, style: Callable[[str, str], str]) -> list[str]:
    return [style(line, DIM) for line in printable(text).splitlines()]


def _value(value: object) -> str:
    return f"{value:.{SIGNAL_DIGITS}f}" if isinstance(value, float) else str(value)


def _flat(text: str) -> str:
    return printable(" ".join(text.split()))


def _flat_inside(text: str) -> str:
    """On one line, the space at its ends kept."""
    return printable("".join(" " if c.isspace() else c for c in text))
