"""Draw the agent's compiled graph into docs/agent.md; --check fails when the picture differs from the graph."""

from __future__ import annotations

import re
import sys
from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "agent.md"
PICTURE = re.compile(r"(?s)```mermaid\n.*?```")


def drawn() -> str:
    """docs/agent.md with the picture of the graph as it is compiled now."""
    from rag.agent import compiled_graph

    picture = compiled_graph().get_graph().draw_mermaid(with_styles=False)
    return PICTURE.sub(lambda _: f"```mermaid\n{picture}```", TARGET.read_text(), count=1)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(drawn())
    elif TARGET.read_text() != drawn():
        sys.exit("docs/agent.md does not show the agent's graph: run .venv/bin/python scripts/agent_graph.py")
