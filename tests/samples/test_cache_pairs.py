"""The labelled pairs of questions are what their README says: enough, of every kind, and no split in another's words."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.samples.test_library import content_stems, similarity, skeleton

PAIRS = Path(__file__).resolve().parents[2] / "samples" / "cache-pairs"
SPLITS = ("calibration", "development", "test")
KINDS = {"negation", "number", "date", "unit", "name", "antonym", "comparative", "time", "direction", "role", "scope", "modality", "question", "tense"}


@cache
def rows_of(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PAIRS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def anchors_of(split: str) -> list[str]:
    return sorted({row["a"] for row in rows_of(split)})


def test_there_are_enough_pairs_of_every_kind() -> None:
    assert sum(len(rows_of(split)) for split in SPLITS) >= 900
    kinds = Counter(row["kind"] for row in rows_of("test"))
    assert kinds["paraphrase"] == sum(row["same"] for row in rows_of("test")) >= 500
    assert KINDS <= kinds.keys()
    assert KINDS - {row["kind"] for row in rows_of("calibration")}  # most of them the fit has not seen


def test_every_pair_is_there_once_and_says_what_it_asks() -> None:
    for split in SPLITS:
        rows = rows_of(split)
        assert not [pair for pair, count in Counter((row["a"], row["b"]) for row in rows).items() if count > 1]
        assert {row["split"] for row in rows} == {split}
        others = {row["b"] for row in rows if not row["same"]}
        assert all(row["asks"] in others and not row["same"] for row in rows if "asks" in row)
    ids = Counter(row["id"] for split in SPLITS for row in rows_of(split))
    assert not [name for name, count in ids.items() if count > 1]


def test_no_split_speaks_of_anothers_things() -> None:
    for one, other in combinations(SPLITS, 2):
        assert not {row["domain"] for row in rows_of(one)} & {row["domain"] for row in rows_of(other)}
        theirs = [content_stems(anchor) for anchor in anchors_of(other)]
        alike = [anchor for anchor in anchors_of(one) if any(similarity(content_stems(anchor), stems) >= 0.6 for stems in theirs)]
        assert not alike, (one, other)


def test_anchors_do_not_repeat_a_pattern() -> None:
    patterns = Counter(skeleton(anchor) for split in SPLITS for anchor in anchors_of(split))
    assert patterns.most_common(1)[0][1] <= 8, patterns.most_common(3)
