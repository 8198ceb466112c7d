"""The real embedding model: precision, windows, equal texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rag.embed
from rag.embed import PROBE, Embedder
from tests.rag.conftest import FOLDER, loaded

TEXTS = ["Who may stop it?", "A stop button brings the system to a halt in a safe state. " * 3, "Bridges and tolls."]


def test_bfloat16_agrees_with_float32_and_is_another_embedder() -> None:
    rounded, exact = loaded(FOLDER, "bfloat16"), loaded(FOLDER, "float32")
    assert float((rounded.encode(PROBE + TEXTS) * exact.encode(PROBE + TEXTS)).sum(axis=1).min()) >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(rounded.encode(TEXTS), axis=1), 1, atol=1e-6)
    assert rounded.fingerprint != exact.fingerprint
    assert loaded(FOLDER, "auto").fingerprint in (rounded.fingerprint, exact.fingerprint)


@pytest.mark.parametrize(("native", "limit"), [(False, 0.9999), (True, 1.1)], ids=["not native", "not equal"])
def test_auto_is_float32_where_bfloat16_is_not_native_or_not_equal(native: bool, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rag.embed, "has_bfloat16", lambda: native)
    monkeypatch.setattr(rag.embed, "EQUAL_COSINE", limit)
    chosen = Embedder(FOLDER)
    assert (chosen.precision, chosen.fingerprint) == ("float32", loaded(FOLDER, "float32").fingerprint)
    np.testing.assert_allclose(chosen.encode(TEXTS), loaded(FOLDER, "float32").encode(TEXTS), atol=1e-6)


def test_order_and_copies_do_not_matter_and_nothing_is_cut_off() -> None:
    embedder = loaded(FOLDER, "auto")
    np.testing.assert_array_equal(embedder.encode([TEXTS[0], TEXTS[0]])[0], embedder.encode([TEXTS[0], TEXTS[0]])[1])
    forwards, backwards = embedder.encode(TEXTS), embedder.encode(TEXTS[::-1])[::-1]
    assert float((forwards * backwards).sum(axis=1).min()) >= 0.9999
    long, short = embedder.encode_windows(["Rule one is kept. " * 200, "Short."])
    assert len(long) >= 3 and len(short) == 1


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="safetensors") as caught:
        Embedder(tmp_path)
    assert "models add" in getattr(caught.value, "remedy", "")
