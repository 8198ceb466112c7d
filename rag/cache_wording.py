"""What stands where in one question: its clauses and their parts, what governs each concept, its subject, and what it asks for.

Read word by word, without a parser, and without the other question that `rag.cache_roles` compares it with.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from rag.cache_words import words

WHO = "WHO"  # the person asked for, as a concept
PREPOSITIONS = words(
    """to from into by with of between against for in on at about through towards toward via under without within than until during before after per as
    among beside behind over across inside outside onto upon"""
)
DETERMINERS = words("a an the my your our his her its their this that these those each every any some another what one")
AUXILIARIES = words("do does did is are was were am can could may might must should shall will would has have had MAY MUST")
_DOING = words("do does did can could may might must should shall will would")
PRONOUNS = words("i we you they one he she it")
_BE = words("is are was were be been being am get gets got")
_SUBORDINATORS = words("when if while once unless because whether before after until")
PARTICIPLE = re.compile(
    r"\w{2,}ed|\w+(?:own|ept|oken|osen|otten|ritten|iven|aken|olen|awn|ought|ought)|kept|slept|paid|laid|said|bought|caught|taught|found|bound|ground|wound|sung|hung|"
    r"rung|left|felt|dealt|built|lent|sent|spent|bent|told|sold|held|met|set|put|cut|shut|hit|let|made|read|led|fed|bred|shed|spread|split|cast|done|"
    r"gone|seen|won|spun|lost|shot|hurt|struck|stuck|dug|run|begun|drunk|sunk|swum|born|worn|torn|sworn|hidden|ridden|bidden|beaten|eaten|heard|laid"
)
_TIMES = words("before after during until")
HANGING = words("with without from")  # phrases that say which one is meant of what stands before them
_PARTICLES = words("out up off down back away home")
_NO_ADVERBS = words("supply apply family assembly anomaly butterfly monopoly multiply comply assembly italy")


@dataclass(frozen=True)
class Token:
    """A word as it stands: its concept, if it has content, and the preposition that governs it, if any."""

    word: str
    concept: str = ""
    preposition: str = ""
    is_noun: bool = False  # it follows a determiner, or a preposition other than "to"


Clause = tuple[Token, ...]


@dataclass(frozen=True)
class Part:
    """A clause, or a piece of one that begins with a word like "when"; where the participle of its passive may stand."""

    tokens: Clause
    passives: list[int]


@dataclass(frozen=True)
class Wording:
    """One question's words in their places, and what can be said of them without the other question."""

    clauses: tuple[Clause, ...]
    parts: tuple[tuple[Part, ...], ...]  # of each clause
    governed: dict[str, str]  # the preposition of each concept, or ""
    hosts: dict[str, str]  # the content word before the phrase that holds a concept
    nouns: frozenset[str]
    phrased: frozenset[str]  # the first two words of each phrase: a noun, or what describes it
    verbs: frozenset[str]  # of passives
    participles: frozenset[str]
    repeated: frozenset[str]
    moving: frozenset[str]  # adverbs and particles
    subject: Token | None
    asked_for: tuple[list[str], bool]
    people: int  # asked for


def wording_of(clauses: tuple[Clause, ...]) -> Wording:
    """Read what stands where."""
    content = [token for clause in clauses for token in clause if token.concept]
    parts = tuple(tuple(Part(part, _passive_verbs(part)) for part in _parts(clause)) for clause in clauses)
    return Wording(
        clauses=clauses,
        parts=parts,
        governed={token.concept: token.preposition for token in content},
        hosts=_hosts(clauses),
        nouns=frozenset(token.concept for token in content if token.is_noun),
        phrased=frozenset(token.concept for clause in clauses for before, token in pairwise((Token(""), *clause)) if token.is_noun or before.is_noun),
        verbs=frozenset(part.tokens[verb].concept for clause in parts for part in clause for verb in part.passives),
        participles=frozenset(token.concept for clause in clauses for place, token in enumerate(clause) if _is_participle(clause, place)),
        repeated=frozenset(concept for concept, count in Counter(token.concept for token in content).items() if count > 1),
        moving=frozenset(token.concept for token in content if token.word in _PARTICLES or _is_adverb(token.word)),
        subject=_subject(parts),
        asked_for=_asked_for(clauses),
        people=sum(token.concept == WHO for token in content),
    )


def _parts(clause: Clause) -> list[Clause]:
    """The clause, cut before each word that begins a clause inside it."""
    starts = [0, *(place for place, token in enumerate(clause) if place and token.word in _SUBORDINATORS), len(clause)]
    return [clause[start:end] for start, end in pairwise(starts) if end > start]


def _passive_verbs(part: Clause) -> list[int]:
    """Where the participle of the part's passive may stand: behind the first form of "be" that has one, before the next."""
    for place, token in enumerate(part):
        if token.word in _BE and (not token.word.startswith("g") or _is_participle(part, place + 1)):
            end = next((later for later in range(place + 1, len(part)) if part[later].word in _BE), len(part))
            if found := [later for later in range(place + 1, end) if _is_participle(part, later)]:
                return found
    return []


def _is_participle(part: Clause, place: int) -> bool:
    """Whether the word may be a participle that ends a verb group: nothing with content follows it directly, an adverb excepted."""
    if place >= len(part) or part[place].is_noun or not PARTICIPLE.fullmatch(part[place].word):
        return False
    if place > 1 and part[place - 1].word in _BE:
        return True  # "who is given morphine": nothing can come between
    after = part[place + 1] if place + 1 < len(part) else Token("")
    return after.concept in ("", WHO) or _is_adverb(after.word) or after.word in _PARTICLES | PREPOSITIONS


def _is_adverb(word: str) -> bool:
    return len(word) > 5 and word.endswith("ly") and word not in _NO_ADVERBS


def auxiliary(part: Clause, start: int) -> int:
    """The place of the first auxiliary from `start` on; the length of the part where it has none."""
    return next((place for place in range(start, len(part)) if part[place].word in AUXILIARIES), len(part))


def _subject(parts: tuple[tuple[Part, ...], ...]) -> Token | None:
    """The first word behind the auxiliary of a question that has one."""
    for clause in parts:
        tokens = tuple(token for part in clause for token in part.tokens)
        place = auxiliary(tokens, 0)
        is_passive = any(part.passives for part in clause)
        if place + 1 < len(tokens) and (tokens[place].word in _DOING or (is_passive and tokens[place].word in _BE)):
            return next((token for token in tokens[place + 1 :] if token.word in PRONOUNS or token.word not in DETERMINERS), None)
    return None


def _hosts(question: tuple[Clause, ...]) -> dict[str, str]:
    """The content word before each prepositional phrase, phrases of HANGING (and "to" after "from") passed over; for what is governed."""
    hosts: dict[str, str] = {}
    for clause in question:
        host = before = preposition = previous = ""
        for token in clause:
            if not token.concept:
                continue
            if token.preposition != preposition:
                before, previous = host, preposition
            if token.preposition and before:
                hosts.setdefault(token.concept, before)
            if token.preposition not in HANGING | _TIMES and not (token.preposition == "to" and previous == "from"):
                host = token.concept
            preposition = token.preposition
    return hosts


def _asked_for(question: tuple[Clause, ...]) -> tuple[list[str], bool]:
    """The concepts of the phrase that "which" or "how many" begins, and whether an auxiliary ends it, so that no verb is among them."""
    for clause in question:
        for place, token in enumerate(clause):
            if token.word == "what":
                end = next((later for later in range(place + 1, len(clause)) if clause[later].word in AUXILIARIES | PREPOSITIONS | DETERMINERS), len(clause))
                return [t.concept for t in clause[place + 1 : end] if t.concept and not t.word.isupper()], end < len(clause) and clause[end].word in AUXILIARIES
    return [], False
