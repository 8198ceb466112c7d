"""The command line: each command of the table imports its module only when it is called."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from understudy.command_table import COMMANDS


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole table."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--workspace", default=argparse.SUPPRESS, metavar="DIR", help="the workspace (default: $UNDERSTUDY_WORKSPACE, or ./workspace)")
    shared.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object on stdout")
    shared.add_argument("--set", action="append", default=argparse.SUPPRESS, metavar="key=value", help="override a setting; may be repeated")
    parser = argparse.ArgumentParser("understudy", description="A small open model learns your RAG job and takes over once proven.", parents=[shared])
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for command in COMMANDS:
        first, _, second = command.words.partition(" ")
        names = ", ".join(c.words.split()[1] for c in COMMANDS if c.words.startswith(first + " "))
        if second and first not in groups:
            groups[first] = top.add_parser(first, help=names).add_subparsers(metavar="ACTION", required=True)
        place = groups[first] if second else top
        child = place.add_parser(second or first, help=command.help, description=command.help, parents=[shared])
        for flags, options in command.arguments:
            child.add_argument(*flags, **options)  # type: ignore[arg-type]
        child.set_defaults(run=command.run)
        if names and not second:  # a command with actions: without one it runs itself
            groups[first] = child.add_subparsers(metavar="ACTION", help=f"or: {names}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, default in (("workspace", None), ("json", False), ("set", [])):
        if not hasattr(args, name):
            setattr(args, name, default)
    from understudy.errors import UnderstudyError

    _quieten()
    _speak_any_language(args.json)
    try:
        module, _, function = args.run.partition(":")
        run: Callable[[argparse.Namespace], object] = getattr(importlib.import_module(f"understudy.commands.{module}"), function)
        return _show(run(args), args.json)
    except UnderstudyError as error:
        _complain(error.code, error.message, error.remedy, args.json)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted", "interrupted", "run the same command again: it goes on where it stopped", args.json)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - whoever read our output has gone
        return 1
    except OSError as error:
        _complain("system", f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", "see `understudy doctor`", args.json)
        return 1


def run() -> NoReturn:
    """Run one command and leave with its exit code.

    Nothing is collected on the way out: with torch loaded, the interpreter's last garbage collections take two seconds. Ctrl-C
    has nothing to stop any more.
    """
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    sys.exit(code)


def _quieten() -> None:
    """Keep libraries from the network and from the terminal."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "TQDM_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost several times the work when something else runs on the cores
    }.items():
        os.environ.setdefault(name, value)
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _speak_any_language(as_json: bool) -> None:
    """JSON is UTF-8 whatever the terminal's encoding; what a terminal cannot show becomes a question mark, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if as_json else None, errors="replace")


def _show(outcome: object, as_json: bool) -> int:
    from understudy.commands import Outcome
    from understudy.terminal import inert_json

    assert isinstance(outcome, Outcome)
    text = inert_json({"schema_version": 1, **outcome.result}) if as_json else "\n".join(outcome.lines)
    if text:
        print(text, flush=True)
    return outcome.exit_code


def _complain(code: str, message: str, remedy: str, as_json: bool) -> None:
    from understudy.terminal import inert_json, printable

    if as_json:
        print(inert_json({"error": {"code": code, "message": message, "remedy": remedy}}, indent=None))
    sys.stderr.write(printable(f"understudy: {message}\n" + (f"  → {remedy}\n" if remedy else "")))


if __name__ == "__main__":
    run()
