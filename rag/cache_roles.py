"""Who does what to whom: a question's concepts in one order, whatever its voice and wherever its question word stands.

The guard compares two questions' words; this module brings their order to one form first, without a parser. A passive is turned into
the active, its agent in front ("is the guest briefed by the editor" reads as editor, brief, guest); a question phrase whose subject
follows goes to where its answer stands ("which guest does the editor brief" likewise); phrases that both questions govern by the same
preposition may stand anywhere. Where the words alone do not say which verb is the passive's, every reading counts. What no rule covers
stays in the order in which it is written: the same words in two orders are taken to ask two things.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product, zip_longest

from rag.cache_wording import DETERMINERS, HANGING, PARTICIPLE, PREPOSITIONS, PRONOUNS, WHO, Clause, Part, Token, Wording, auxiliary
from rag.cache_words import words

_WAYS = "to from|to of|into from|for from|towards from|with against|with without|for against|by to|by for|by without|before after|over under|inside outside"
_OPPOSITE_WAYS = [set(way.split()) for way in re.split(r"\|", _WAYS)]
_COMPOUNDING = words("of for in on at")


def role_findings(a: Wording, b: Wording, ignored: frozenset[str], may_turn: bool) -> list[str]:
    """What says that the concepts which two questions share play other parts in them: one finding, or none.

    `ignored` concepts have no place of their own; a question's first clause may stand last if `may_turn`.
    """
    shared = a.governed.keys() & b.governed.keys()
    for concept in sorted(shared):
        if a.governed[concept] != b.governed[concept] and {a.governed[concept], b.governed[concept]} in _OPPOSITE_WAYS:
            return [f"direction: {a.governed[concept]} / {b.governed[concept]} {concept}"]
    if a.people != b.people or _asks_for_others(a, b, shared) or _asks_for_others(b, a, shared):
        return ["question: which of the two"]
    nouns, verbs = a.nouns | b.nouns, a.verbs | b.verbs
    compounds = _compounded(a, b, verbs) & shared, _compounded(b, a, verbs) & shared
    loose = set() if all(compounds) else compounds[0] | compounds[1]
    if found := _different_subjects(a, b, loose) or _different_subjects(b, a, loose) or _different_hosts(a, b, shared - verbs):
        return found
    loose |= {c for c in shared if (way := a.governed[c]) == b.governed[c] and (way not in ("", "to", "by") or (way == "to" and c in nouns))}
    fixed = shared - (loose - a.participles - b.participles) - a.moving - b.moving - ignored
    indirect = [c for c in fixed if {a.governed[c], b.governed[c]} == {"to", ""}]  # give Y X: give X to Y
    orders_a, orders_b = _orders(a, nouns, fixed, may_turn), _orders(b, nouns, fixed, may_turn)
    if len(indirect) == 1 and indirect[0] in nouns:
        direct = orders_b if a.governed[indirect[0]] else orders_a
        if all(order[:1] != (indirect[0],) for order in direct):
            orders_a, orders_b = ({tuple(c for c in order if c != indirect[0]) for order in orders} for orders in (orders_a, orders_b))
    return [] if orders_a & orders_b else ["roles: the same words in another order"]


def _different_subjects(a: Wording, b: Wording, loose: set[str]) -> list[str]:
    """Whether what a has as its subject stands in a phrase of b, or I do in a what b names somebody for."""
    if a.subject is None:
        return []
    concept, verbs = a.subject.concept, a.verbs | b.verbs
    unmoved = ("", "of", "by", "to") if verbs else ("", "of", "by")  # Y is given X: X is given to Y
    if concept not in loose and (way := b.governed.get(concept, "")) not in unmoved:
        return [f"roles: {concept} does it / {way} {concept}"]
    if a.subject.word in ("i", "we") and b.subject and b.subject.concept in a.governed and b.subject.concept and not verbs:
        return [f"roles: I do it / {b.subject.concept} does it"]
    return []


def _different_hosts(a: Wording, b: Wording, shared: set[str]) -> list[str]:
    """Whether a phrase that says which one is meant says it of two different words."""
    for concept in sorted(shared & a.hosts.keys() & b.hosts.keys()):
        one, other = a.hosts[concept], b.hosts[concept]
        if one != other and {one, other} <= shared and a.governed[concept] in HANGING and b.governed[concept] in HANGING:
            return [f"roles: {concept} belongs to {one} / to {other}"]
    return []


def _asks_for_others(a: Wording, b: Wording, shared: set[str]) -> bool:
    """Whether what a asks for stands in b too, which asks for something else."""
    (asked, is_whole), (others, are_whole) = a.asked_for, b.asked_for
    if not asked or not others or not is_whole or not {*asked, others[0]} <= shared:
        return False
    return not set(asked) & set(others if are_whole else others[:1])


def _orders(wording: Wording, nouns: frozenset[str], concepts: set[str], may_turn: bool) -> set[tuple[str, ...]]:
    """The orders that the concepts may be said to stand in: every reading of every clause, the clauses as they are, or the first one last."""

    def readings(clause: tuple[Part, ...]) -> list[list[str]]:
        return [[c for part in chosen for c in part if c in concepts] for chosen in product(*(_active(part, nouns) for part in clause))]

    orders = set()
    for clauses in product(*map(readings, wording.parts)):
        for order in (clauses, (*clauses[1:], *clauses[:1]) if may_turn else clauses):
            orders.add(tuple(dict.fromkeys(concept for clause in order for concept in clause)))
    return orders


def _active(read: Part, nouns: frozenset[str]) -> list[list[str]]:
    """The part's concepts in the order of the active, in every way that it may be read."""
    part = read.tokens
    question = next((place for place, token in enumerate(part) if token.word in ("what", "who")), None)
    phrase = [token for token in part[question : auxiliary(part, question)] if token.concept] if question is not None else []
    if read.passives:
        return [_passive_in_active_order(part, verb, phrase) for verb in read.passives]
    content = [token for token in _agents_of_participles_first(part) if token.concept]
    as_written = [token.concept for token in content]
    if question is None or not phrase or not _subject_follows(part, question, nouns):
        return [as_written]
    fronted = [token.concept for token in content if token not in phrase] + [token.concept for token in phrase]
    after = part[auxiliary(part, question) + 1 :]
    is_open = len(after) > 1 and after[0].word in PRONOUNS and not after[1].concept  # "do you use to", "do I need to": the phrase may be either's object
    return [fronted, as_written] if is_open else [fronted]


def _passive_in_active_order(part: Clause, verb: int, phrase: list[Token]) -> list[str]:
    """Agent, verb, then what is left as it stands."""
    first, last = _agents_of_participles_first(part[:verb]), _agents_of_participles_first(part[verb + 1 :])
    agents = [WHO] if any(token.word == "BY" for token in part) else []
    if any(token.word == "by" and (after is None or after.word in PREPOSITIONS) for token, after in zip_longest(part, part[1:])):
        agents += [token.concept for token in phrase]
    agents += [token.concept for token in (*first, *last) if token.concept and token.preposition == "by"]
    rest = [token.concept for token in (*first, *last) if token.concept]
    asks_how = any(token.word in ("how", "when") for token in part[: auxiliary(part, 0)])
    degree = [token.concept for token in part[: auxiliary(part, 0)] if token.concept] if asks_how else []  # how early, how deep
    return list(dict.fromkeys([*degree, *agents, *([part[verb].concept] if part[verb].concept else []), *rest]))


def _agents_of_participles_first(part: Iterable[Token]) -> list[Token]:
    """The branch rejected by a reviewer as the branch that a reviewer rejected."""
    result: list[Token] = []
    participle: int | None = None
    for token in part:
        if token.concept and token.preposition == "by" and participle is not None:
            result.insert(participle, Token(token.word, token.concept))
            participle += 1
        else:
            if token.word == "by" and result and result[-1].concept and not result[-1].is_noun and PARTICIPLE.fullmatch(result[-1].word):
                participle = len(result) - 1
            elif token.word not in DETERMINERS:
                participle = None
            result.append(token)
    return result


def _subject_follows(part: Clause, question: int, nouns: frozenset[str]) -> bool:
    """Whether the phrase that begins at the question word asks for an object: do, or an auxiliary with its subject, stands behind it."""
    place = auxiliary(part, question)
    if place + 1 >= len(part):
        return False
    after = part[place + 1]
    return part[place].word in ("do", "does", "did") or after.word in DETERMINERS | PRONOUNS or after.concept in nouns


def _compounded(a: Wording, b: Wording, verbs: frozenset[str]) -> set[str]:
    """What a says of a noun in a phrase and b in front of it: the tour of the hall, the hall tour."""
    found = set()
    for concept in (c for c, way in a.governed.items() if c in a.phrased and way in _COMPOUNDING and a.hosts.get(c) and b.governed.get(c) not in (None, way)):
        for clause in b.clauses:
            for place in (place for place, token in enumerate(clause) if token.concept == concept):
                run = next((end for end in range(place, len(clause)) if not clause[end].concept), len(clause))
                if (
                    a.repeated.isdisjoint((concept, a.hosts[concept]))
                    and a.hosts[concept] in {t.concept for t in clause[place + 1 : run] if not PARTICIPLE.fullmatch(t.word)} - verbs
                ):
                    found.add(concept)
    return found
