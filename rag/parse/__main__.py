"""The killable child, because parsers hang, crash and balloon:

python -m rag.parse FILE                               the documents of one file, a JSON list or {"error"} on stdout
python -m rag.parse --worker BYTES SECONDS PARSER      the same for each path that comes in on stdin as a JSON string, a line each,
                                                       under limits of memory and, for each file, of processor time
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

from rag.parse.formats import parse


def answer(path: Path, parser: str) -> list[dict[str, Any]] | dict[str, str]:
    """The documents of a file, or the reason why there are none."""
    try:
        return parse(path, parser)
    except MemoryError:
        return {"error": "the parser ran out of its memory limit"}
    except RecursionError:
        return {"error": "nested too deeply"}
    except (ValueError, OSError) as error:
        return {"error": str(error) or type(error).__name__}
    except Exception as error:  # a parser's own bug on a strange file: the file is at fault for the caller, the batch goes on
        return {"error": f"the parser failed: {type(error).__name__}: {error}"[:300]}


def work(memory_bytes: int, cpu_seconds: int, parser: str) -> None:
    """Answer paths until stdin ends. Whatever a library prints goes to stderr, never into the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + cpu_seconds + 1, hard))
        found = answer(Path(json.loads(line)), parser)
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    """One file, or the worker's loop."""
    logging.disable(logging.CRITICAL)  # PDF libraries report every oddity
    if sys.argv[1] == "--worker":
        work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        json.dump(answer(Path(sys.argv[1]), "auto"), sys.stdout)


if __name__ == "__main__":
    main()
