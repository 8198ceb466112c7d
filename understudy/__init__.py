"""Understudy: a small open model learns a RAG job from recorded answers and takes over once proven."""

__version__ = "0.1.0"
