"""Models compared on the same questions, paired, with a report people read."""
