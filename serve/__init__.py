"""vLLM, its adapters, and the proof that it serves what was trained."""
