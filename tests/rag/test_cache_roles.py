"""Who does what to whom, as far as word order, voice and phrases tell it."""

from __future__ import annotations

import pytest

from rag.cache_guard import compare

SAME = [
    ("Does the editor brief the guest?", "Is the guest briefed by the editor?"),
    ("Which flag does the warden raise at noon?", "At noon, which flag is raised by the warden?"),
    ("Which service replaced Atlas?", "Which service was Atlas replaced by?"),
    ("By whom are the otters fed?", "Who feeds the otters?"),
    ("Can an author merge a branch that a reviewer has rejected?", "Can a branch rejected by a reviewer be merged by an author?"),
    ("Does the firm owe the town a fee?", "Does the firm owe a fee to the town?"),
    ("How long does the tour of the hall take?", "How long does the hall tour take?"),
    ("Is it Ruben who hired Tessa?", "Does Ruben hire Tessa?"),
    ("Do you shut the barrier at dusk?", "Is the barrier shut at dusk?"),
    ("The array supplies how many farms?", "How many farms does the array supply?"),
    ("Are rooms paid for by guests before noon?", "Before noon, are rooms paid for by guests?"),
]
OTHERS = [
    ("Does the editor brief the guest?", "Is the editor briefed by the guest?"),
    ("Which service replaced Atlas?", "Which service did Atlas replace?"),
    ("Can substitutes pay for the hall?", "Can substitutes be paid for the hall?"),
    ("Which dogs may guard the flock?", "Which dogs may be guarded by the flock?"),
    ("Who may give morphine at night?", "Who may be given morphine at night?"),
    ("Which collection did the family lend to the museum?", "Which collection was the family lent by the museum?"),
    ("Is a puppy sold to the neighbour?", "Is a puppy sold by the neighbour?"),
    ("Can a walker with a licence take a dog without a muzzle?", "Can a walker without a licence take a dog with a muzzle?"),
    ("Can a walker with a licence take a dog without a muzzle?", "Can a walker without a muzzle take a dog with a licence?"),
    ("Are drivers from the agency paid by the client?", "Are drivers paid by the client from the agency?"),
    ("Who translated the letters that Humboldt wrote to Gauss?", "Who translated the letters that Gauss wrote to Humboldt?"),
    ("When may relatives visit residents on the ward?", "When may residents on the ward visit relatives?"),
    ("How many backups does the agent keep on the node?", "How many agents keep backups on the node?"),
    ("Can two editors change one page?", "Can one editor change two pages?"),
    ("Is the night crew told before the morning shift?", "Is the morning crew told before the night shift?"),
    ("Do you charge me for a visit?", "Can I charge for a visit?"),
    ("Until what age can a child attend?", "From what age can a child attend?"),
    ("Does the tenant renew the lease?", "Must the tenant renew the lease?"),
    ("How many copies does the agent keep?", "How many copies did the agent keep?"),
    ("Do all pickers not work on Sundays?", "Do not all pickers work on Sundays?"),
    ("Is the seal broken by the clerk or the driver?", "Is the seal broken by the clerk?"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_voice_and_place_make_no_other_question(one: str, other: str) -> None:
    assert compare(one, other).findings == compare(other, one).findings == ()


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_other_roles_are_found_out(one: str, other: str) -> None:
    assert compare(one, other).findings, compare(one, other)
    assert compare(other, one).findings
