"""Asking, traces and the cache."""

from __future__ import annotations

from understudy.command_table.row import MODE, MODEL, Command, arg, number

START = arg("--start", action="store_true", help="start the engine for this command if none is running")
NO_CACHE = arg("--no-cache", action="store_true", help="neither answer from the cache nor keep the answer in it")
FILTERS = [
    arg("--source", choices=["expert", "model", "imported"]),
    arg("--model", help="a resolved name, or an adapter's name for all its digests"),
    arg("--contains", metavar="TEXT", help="in the question, whatever the case"),
    arg("--min-score", type=number, metavar="SCORE"),
    arg("--max-score", type=number, metavar="SCORE"),
    arg("--since", metavar="TIME", help="from this day or time on: 2026-11-21, 2026-11-21T14:30 (UTC)"),
    arg("--until", metavar="TIME", help="before this day or time"),
    arg("--outcome", choices=["answered", "abstained", "incomplete"]),
]

COMMANDS = [
    Command("ask", "a cited answer from the documents", "answers:ask", [arg("question"), MODEL, MODE, START, NO_CACHE]),
    Command(
        "chat",
        "a conversation: follow-up questions, answered from the documents; a question a line over a pipe",
        "chatting:chat",
        [MODEL, MODE, START, NO_CACHE],
    ),
    Command("traces ls", "the newest traces, newest last", "traces:traces_ls", [*FILTERS, arg("--limit", type=int, default=50, help="default: 50")]),
    Command("traces show", "one run as a tree, with passages, quotes and timings", "traces:traces_show", [arg("trace", help="its id, or the beginning of it")]),
    Command(
        "traces simulate",
        "a teacher writes questions about the chunks and answers them; resumable",
        "traces:traces_simulate",
        [
            arg("--teacher", default="teacher", help="a configured remote, or base; default: the remote called teacher"),
            arg("--questions", type=int, default=100, metavar="N", help="traces to keep, in all runs together; default: 100"),
            arg("--calls", type=int, metavar="N", help="model calls to spend at most, in all runs together"),
            arg("--tokens", type=int, metavar="N", help="prompt and completion tokens after which no call is begun, in all runs together"),
            arg("--unanswerable", type=number, default=0.2, metavar="SHARE", help="share of questions meant to find no answer; default: 0.2"),
            arg("--concurrency", type=int, default=4, metavar="N", help="questions in flight at once; default: 4"),
            arg("--seed", type=int, default=0),
        ],
    ),
    Command("cache ls", "the cached answers, and what the cache has saved", "caching:cache_ls"),
    Command(
        "cache explain",
        "why a question would be answered from the cache, or not",
        "caching:cache_explain",
        [arg("question"), arg("--model", help="whose answers; default: the newest adapter"), MODE],
    ),
    Command(
        "cache calibrate",
        "fit the decision on labelled pairs of questions; hits and wrong hits with intervals",
        "caching:cache_calibrate",
        [arg("file", help="JSONL rows {a, b, same}"), arg("--dry-run", action="store_true", help="measure what is in force, change nothing")],
    ),
    Command(
        "cache wrong", "say that an answer from the cache was wrong: its entry learns from it", "caching:cache_wrong", [arg("trace", help="of the answer")]
    ),
    Command("cache clear", "remove every cached answer", "caching:cache_clear"),
    Command(
        "traces import",
        "experts' answers, or another system's calls, become traces",
        "traces:traces_import",
        [
            arg("source", metavar="FILE", help="a question file, a log of calls, or mongodb://HOST/DATABASE?collection=NAME"),
            arg("--format", choices=["questions", "chat", "openai", "langsmith", "langchain-cache"], help="default: seen from the first row"),
            arg("--split", choices=["train", "calibration"], default="train", help="calibration: never trained on"),
        ],
    ),
    Command(
        "traces export",
        "whole traces as chat JSONL on stdout",
        "traces:traces_export",
        [*FILTERS, arg("--split", choices=["train", "calibration"], default="train", help="splits are never mixed; default: train")],
    ),
]
