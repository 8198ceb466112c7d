"""Releases on trial and on their way to be live: the evidence, and what is decided by it."""
