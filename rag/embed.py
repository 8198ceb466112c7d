"""Sentence embeddings by path, with no text cut off: what exceeds the model's window embeds as several windows.

bfloat16 is taken where the processor has it and it is measured equal to float32 when the model is loaded. The precision
is part of the embedder's fingerprint, so the vectors of an index and of its questions always come from one arithmetic.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rag.chunk import make_splitter
from understudy.digests import digest_of, digest_of_files
from understudy.errors import NotFoundError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 16  # texts of one forward pass: small, because sorted by length they need no padding and stay in cache
EQUAL_COSINE = 0.9999
PROBE = [  # texts of several lengths and kinds, on which bfloat16 has to agree with float32
    "Who may stop the system?",
    "retention period personal data erasure",
    "Order 4711/B was shipped on 3 March 2024 for 1,299.50 euro.",
    "def parse(line): return line.split('=')  # key=value",
    "La réunion a été reportée à la semaine prochaine.",
    "A provider established outside the Union is caught as soon as it places a system on the Union market. " * 2,
]

Precision = Literal["auto", "bfloat16", "float32"]


class Embedder:
    """A sentence-transformers model from a folder; vectors are float32 of unit length."""

    def __init__(self, path: Path, precision: Precision = "auto") -> None:
        files = [f for f in sorted(path.rglob("*")) if f.suffix in (".safetensors", ".json", ".txt") and f.is_file()]
        if not any(f.suffix == ".safetensors" for f in files):
            raise NotFoundError(f"no safetensors weights in {path}", "run `understudy models add all-minilm-l6-v2`")
        self.precision, self._model = _load(path, precision)
        self.fingerprint = digest_of([digest_of_files(files), self.precision])[:16]
        self.tokenizer_file = path / "tokenizer.json"
        self.window = int(self._model.get_max_seq_length() or 512)
        self._splitter = make_splitter(self.tokenizer_file, self.window - 2, 0)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, uncut, with the two that the model adds."""
        return [len(ids) for ids in self._model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, dim] of at least one text that fits the window (questions, windows of chunks); equal texts are embedded once."""
        distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(distinct)}
        return _encode(self._model, distinct)[[place[text] for text in texts]]

    def encode_windows(self, texts: list[str]) -> list[np.ndarray]:
        """Unit vectors [windows, dim] of each of at least one text."""
        windows = [self._splitter.chunks(text) or [text] for text in texts]
        vectors = self.encode([window for group in windows for window in group])
        ends = np.cumsum([len(group) for group in windows])
        return np.split(vectors, ends[:-1])


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, float32 is faster."""
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None
    except OSError:
        return False


def _load(path: Path, wanted: Precision) -> tuple[str, SentenceTransformer]:
    """The model and its precision; `auto` is bfloat16 where that is native and agrees with float32 on every probe."""
    from sentence_transformers import SentenceTransformer

    def load() -> SentenceTransformer:
        return SentenceTransformer(str(path), device="cpu", local_files_only=True, trust_remote_code=False)

    model = load()
    if wanted == "float32" or (wanted == "auto" and not has_bfloat16()):
        return "float32", model
    exact = _encode(model, PROBE) if wanted == "auto" else None
    model.bfloat16()
    if exact is not None and not (_encode(model, PROBE) * exact).sum(axis=1).min() >= EQUAL_COSINE:  # also where it is not a number
        return "float32", load()  # rounded weights do not come back
    return "bfloat16", model


def _encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Unit vectors [n, dim] of at least one text; normalised in float32, because a bfloat16 norm is right to three digits only."""
    vectors = model.encode(texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False).float().numpy()
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
