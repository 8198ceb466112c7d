"""The precision matrix: its figures and what it recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.matrix import list_pairs, recommend, weigh_pairs
from tests.serve.test_engine import add_manifest, make_workspace


def rows(shift: float, noise: float = 0.0, count: int = 24) -> list[Any]:
    """Log-probabilities of `count` rows of ten tokens, moved from the reference's."""
    generator = np.random.default_rng(1)
    draws = generator.standard_normal((count, 10))
    return list(-0.5 + shift + noise * (draws - draws.mean()))


def test_a_pair_is_weighed_against_the_trained_one() -> None:
    table = weigh_pairs({"trained": rows(0.0), "same": rows(0.0), "worse": rows(-0.1, 0.01), "noisy": rows(0.0, 0.2)}, "trained")
    assert table["same"] == {"loss": 0.5, "loss_difference": 0.0, "low": 0.0, "high": 0.0, "distance": 0.0}
    assert table["worse"]["loss"] == pytest.approx(0.6, abs=0.01) and 0.09 < table["worse"]["low"] < table["worse"]["high"] < 0.11
    assert table["noisy"]["low"] < 0 < table["noisy"]["high"] and table["noisy"]["distance"] > 0.1


def candidate(pair: str, loss: float, high: float, distance: float, served: bool = True, adapter: str = "beside") -> dict[str, Any]:
    return {"pair": pair, "loss": loss, "high": high, "distance": distance, "served": served, "adapter": adapter}


def test_the_nearest_to_the_trained_is_recommended_unless_another_is_better_beyond_doubt() -> None:
    trained = candidate("trained", 0.5, 0.0, 0.0, served=False)
    near, far, alone = candidate("near", 0.51, 0.02, 0.001), candidate("far", 0.49, 0.01, 0.3), candidate("alone", 0.1, -0.3, 2.0, adapter="none")
    assert recommend([trained, far, near, alone]) == "near"
    assert recommend([trained, near, candidate("better", 0.4, -0.05, 0.4), alone]) == "better"
    assert recommend([trained, near, candidate("the engine now (bfloat16)", 0.2, -0.2, 0.0)]) == "near"


@pytest.mark.parametrize(("quantisation", "first"), [("nf4", "NF4 + adapter"), ("none", "base + adapter")])
def test_the_reference_is_what_the_adapter_was_trained_on(tmp_path: Path, quantisation: str, first: str) -> None:
    manifest = add_manifest(make_workspace(tmp_path), "a", "1", 1.0, "d").model_copy(update={"quantisation": quantisation})
    pairs = list_pairs(manifest, Path("/base"), Path("/served"))
    assert pairs[0].name == first and pairs[0].adapter == "beside" and pairs[0].nf4 is (quantisation == "nf4")
    assert not [pair for pair in pairs[1:] if pair.nf4] and [pair.adapter for pair in pairs].count("none") == 1
