"""A cross-encoder from a folder, which reads query and passage together; slower and nearer than two vectors' cosine."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from understudy.errors import NotFoundError


class Reranker:
    """A sentence-transformers cross-encoder with one output; scores in [0, 1]."""

    def __init__(self, path: Path) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        if not list(path.glob("*.safetensors")):
            raise NotFoundError(f"no safetensors weights in {path}", "name a cross-encoder in models/ with retrieval.reranker")
        self._model = CrossEncoder(str(path), num_labels=1, device="cpu", local_files_only=True, trust_remote_code=False, activation_fn=torch.nn.Sigmoid())
        self._lock = Lock()

    def score(self, query: str, texts: list[str]) -> list[float]:
        """How well each text answers the query."""
        with self._lock:
            return [float(score) for score in self._model.predict([(query, text) for text in texts], batch_size=16, show_progress_bar=False)]
