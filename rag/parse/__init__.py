"""Files become pages of clean text with their headings: one module a format, run in a child process (see `__main__`)."""

from __future__ import annotations

VERSION = "parse-2"  # part of every chunk's identity: raise it when a file's text comes out differently
