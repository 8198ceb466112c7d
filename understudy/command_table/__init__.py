"""The table of commands: words, help, the function that runs each, and its arguments. Nothing is imported for it."""

from __future__ import annotations

from understudy.command_table import answers, corpus, evaluating, learning, serving

COMMANDS = [*corpus.COMMANDS, *answers.COMMANDS, *learning.COMMANDS, *serving.COMMANDS, *evaluating.COMMANDS]
