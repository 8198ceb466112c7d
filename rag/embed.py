"""Sentence embeddings by path, with no text cut off: what exceeds the model's window embeds as several windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rag.chunk import make_splitter
from understudy.digests import digest_of_files
from understudy.errors import NotFoundError

BATCH = 32


class Embedder:
    """A sentence-transformers model from a folder; vectors are float32 of unit length."""

    def __init__(self, path: Path) -> None:
        from sentence_transformers import SentenceTransformer

        files = [f for f in sorted(path.rglob("*")) if f.suffix in (".safetensors", ".json", ".txt") and f.is_file()]
        if not any(f.suffix == ".safetensors" for f in files):
            raise NotFoundError(f"no safetensors weights in {path}", "run `understudy models add all-minilm-l6-v2`")
        self.fingerprint = digest_of_files(files)[:16]
        self._model = SentenceTransformer(str(path), device="cpu", local_files_only=True, trust_remote_code=False)
        self.tokenizer_file = path / "tokenizer.json"
        self.window = int(self._model.get_max_seq_length() or 512)
        self._splitter = make_splitter(self.tokenizer_file, self.window - 2, 0)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, dim] of texts that fit the window (questions, windows of chunks)."""
        return np.asarray(self._model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)

    def encode_windows(self, texts: list[str], progress: Callable[[int], None] = lambda _: None) -> list[np.ndarray]:
        """Unit vectors [windows, dim] of each text; `progress` is told how many texts are done."""
        result: list[np.ndarray] = []
        for start in range(0, len(texts), BATCH):
            windows = [self._splitter.chunks(text) or [text] for text in texts[start : start + BATCH]]
            vectors = self.encode([window for group in windows for window in group])
            ends = np.cumsum([len(group) for group in windows])
            result += np.split(vectors, ends[:-1])
            progress(len(result))
        return result
