"""The lexical guard in front of the semantic cache: what two questions do not share, read from their words.

An embedding places "enable" and "disable", "before" and "after", 3 May and 8 May next to one another. The guard reads
both questions word by word. A finding is a difference that changes the answer: a negation, number, date, unit, name,
opposite, order in time, degree, quantity, duty against permission, another kind of question, or swapped roles. What is
left, content words without a counterpart, is no proof of another question and weighs in the decision.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import Stemmer

from rag.cache_words import CONCEPTS, DATES, MARKERS, NEGATIONS, NUMBERS, OPPOSITES, REWRITES, STOPWORDS, UNITS, words
from understudy.digests import digest_of

_STEMMER = Stemmer.Stemmer("english")
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
_NEGATING_PREFIX = re.compile(r"^(un|in|im|ir|il|dis|non|de|ab)(?=\w{4})")
_KINDS = ("who", "whom", "where", "why", "when", "how", "what")
_PREPOSITIONS = words(
    "to from into by with of between against for in on at about through towards toward via under without within than until during before after"
)
_OPPOSITE_WAYS = ({"to", "from"}, {"into", "from"}, {"for", "from"}, {"towards", "from"}, {"with", "against"})
_PRONOUNS = words("i we you they one he she")
_ARTICLES = words("a an the my your our their his her its this that these those")


@dataclass(frozen=True)
class Reading:
    """What the guard sees in one question."""

    kind: str  # who, where, why, when, how, what; or "polar": to be answered by yes or no
    negated: bool
    numbers: Counter[str]  # with their units
    dates: frozenset[str]
    units: frozenset[str]
    names: frozenset[str]
    markers: dict[str, frozenset[str]]
    content: frozenset[str]  # concepts
    clauses: tuple[tuple[tuple[str, str], ...], ...]  # of each clause, as they stand: (preposition that governs it or "", concept)
    words: frozenset[str]  # every word, lower-case
    personal: bool  # I, we, you, they, one does it
    outwards: bool  # I or we do it to you
    passive: bool  # it is done
    turned: bool  # the question word stands where the answer would, or "it" where the subject would


@dataclass(frozen=True)
class Comparison:
    """Two questions side by side."""

    findings: tuple[str, ...]  # differences that change the answer; none: the guard lets it pass
    missing: tuple[str, ...]  # concepts of the cached question that the new one lacks
    added: tuple[str, ...]
    shared: int  # concepts in both


def normalize(question: str) -> str:
    """The question as the exact tier compares it: composed, lower-case, single spaces, no closing punctuation."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", question).casefold().replace("’", "'")).strip(" \t?!.…")


def question_digest(question: str) -> str:
    """Digest of the normalised question: questions that differ in case, spaces or closing punctuation are one."""
    return digest_of(normalize(question))


@lru_cache(maxsize=4096)
def read_question(question: str) -> Reading:
    """Read one question."""
    clauses = [tokens for clause in re.split(r"[,:;.?!]+(?:\s|$)", _rewritten(question)) if (tokens := re.findall(r"[\w&]+(?:[.'][\w&]+)*", clause))]
    numbers: Counter[str] = Counter()
    markers: dict[str, set[str]] = {name: set() for name in MARKERS}
    placed: list[tuple[tuple[str, str], ...]] = []
    for tokens in clauses:
        inside: list[tuple[str, str]] = []
        preposition = ""
        for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
            if _is_number(token, before):
                unit = f" {_STEMMER.stemWord(after)}" if after in UNITS else ""  # 2 days and 3 weeks are not 3 days and 2 weeks
                numbers[NUMBERS.get(token, token) + unit] += 1
            elif token not in NEGATIONS and (marked := [(name, values[token]) for name, values in MARKERS.items() if token in values]):
                for name, value in marked:
                    markers[name].add(value)
            elif token not in NEGATIONS and token not in STOPWORDS and token not in DATES and token not in UNITS and token not in _KINDS:
                inside.append((preposition, concept_of(token)))
                continue  # what a preposition governs goes on
            preposition = token if token in _PREPOSITIONS else preposition if token in _ARTICLES and before == preposition else ""
        placed.append(_compounds_first(inside))
    seen = frozenset(token for tokens in clauses for token in tokens)
    return Reading(
        kind=_kind_of(clauses),
        negated=sum(token in NEGATIONS for tokens in clauses for token in tokens) % 2 == 1,
        numbers=numbers,
        dates=frozenset(token.removesuffix("s") if token.endswith(("days", "ends", "ings")) else token for token in seen & DATES),
        units=frozenset(_STEMMER.stemWord(token) for token in seen & UNITS if not _is_number(token, "")),
        names=_names_in(question) & seen,
        markers={name: frozenset(values) for name, values in markers.items()},
        content=frozenset(concept for clause in placed for _, concept in clause),
        clauses=tuple(placed),
        words=seen,
        personal=bool(seen & _PRONOUNS),
        passive=bool(seen & _BE) and any(_PARTICIPLE.fullmatch(word) for word in seen),
        outwards=any(_OUTWARDS.search(" ".join(tokens)) for tokens in clauses),
        turned=not any(_starter(tokens) for tokens in clauses) or any(_EXPLETIVE.search(" ".join(tokens)) for tokens in clauses),
    )


def compare(cached: str, asked: str) -> Comparison:
    """What sets the asked question apart from the cached one."""
    a, b = read_question(cached), read_question(asked)
    findings = [*_different_facts(a, b), *_different_markers(a, b), *_opposites_between(a, b), *_different_roles(a, b)]
    missing, added = (a.content - b.content) | _extra_markers(a, b), (b.content - a.content) | _extra_markers(b, a)
    return Comparison(tuple(findings), tuple(sorted(missing)), tuple(sorted(added)), len(a.content & b.content))


def concept_of(word: str) -> str:
    """The concept that a word stands for: the first of its line, else its stem."""
    return _CONCEPTS.get(word) or _CONCEPTS.get(stem := _STEMMER.stemWord(word)) or stem


def _different_facts(a: Reading, b: Reading) -> list[str]:
    found = []
    if a.kind != b.kind:
        found.append(f"question: {a.kind} / {b.kind}")
    elif (asks_a := _asked(a)) and (asks_b := _asked(b)) and asks_a != asks_b:
        found.append(f"question: {' '.join(sorted(asks_a))} / {' '.join(sorted(asks_b))}")
    if a.negated != b.negated:
        found.append("negation")
    for label, left, right in (("number", a.numbers.keys(), b.numbers.keys()), ("date", a.dates, b.dates), ("unit", a.units, b.units)):
        if left != right:
            found.append(f"{label}: {_listed(left - right)} / {_listed(right - left)}")
    strangers = {name for mine, other in ((a, b), (b, a)) for name in mine.names if concept_of(name) not in map(concept_of, other.words)}
    return found + ([f"name: {_listed(strangers)}"] if strangers else [])


def _different_markers(a: Reading, b: Reading) -> list[str]:
    found = []
    for name in MARKERS:
        left, right = a.markers[name], b.markers[name]
        if not (left <= right or right <= left) or (left ^ right) & _DECISIVE:
            found.append(f"{name}: {_listed(left - right)} / {_listed(right - left)}")
    return found


def _opposites_between(a: Reading, b: Reading) -> list[str]:
    only_a, only_b = a.words - b.words, b.words - a.words
    stems_a, stems_b = {_STEMMER.stemWord(w): w for w in only_a}, {_STEMMER.stemWord(w): w for w in only_b}
    pairs = [f"opposite: {stems_a[x]} / {stems_b[y]}" for x in stems_a for y in stems_b if frozenset((x, y)) in _OPPOSITES]
    for mine, others in ((only_a, b.words), (only_b, a.words)):
        bare = {_STEMMER.stemWord(_NEGATING_PREFIX.sub("", word)): word for word in mine if _NEGATING_PREFIX.match(word)}
        pairs += [f"opposite: {bare[stem]} / {word}" for word in others if (stem := _STEMMER.stemWord(word)) in bare]
    return pairs


def _extra_markers(mine: Reading, other: Reading) -> frozenset[str]:
    """Markers that only one question has and that decide nothing by themselves; yes-or-no questions ask for permission in many ways."""
    names = [name for name in MARKERS if not (name == "modality" and mine.kind == "polar")]
    return frozenset(f"{name}: {value}" for name in names for value in mine.markers[name] - other.markers[name])


def _different_roles(a: Reading, b: Reading) -> list[str]:
    """Who does what to whom: the shared concepts stand in another order, and nothing explains it.

    A phrase with the same preposition, or a clause as a whole, may move; a passive names its subject after "by" or not at all;
    a question word may stand where the answer would.
    """
    shared = a.content & b.content
    governed_a, governed_b = ({concept: preposition for clause in reading.clauses for preposition, concept in clause} for reading in (a, b))
    for concept in sorted(shared):
        if {governed_a[concept], governed_b[concept]} in _OPPOSITE_WAYS:
            return [f"direction: {governed_a[concept]} / {governed_b[concept]} {concept}"]
    if a.outwards != b.outwards:
        return ["roles: I to you / you to me"]
    loose = {concept for concept in shared if governed_a[concept] == governed_b[concept] not in ("", "to")}  # "to" may begin a verb
    fixed = {concept for concept in shared - loose - _ASKED if not concept.endswith("li")}  # adverbs move
    if _same_order(a, b, fixed) or a.turned != b.turned:
        return []
    for active, passive, governed in ((a, b, governed_b), (b, a, governed_a)):
        agents = {concept for concept in fixed if governed[concept] == "by"}
        subject = next((concept for order in _orders(active, fixed) for concept in order[:1]), "")
        is_told = "BY" in passive.words and active.kind == "who"
        if passive.passive and (subject in agents or is_told or (active.personal and not passive.personal and not agents)):
            rest = fixed - agents
            verbs = [concept for concept in rest if not governed_a[concept] and not governed_b[concept]]
            if any(_same_order(a, b, rest - {verb}) for verb in verbs):
                return []
    return ["roles: the same words in another order"]


def _same_order(a: Reading, b: Reading, concepts: set[str]) -> bool:
    """Whether the concepts stand in one order; a clause that begins with "when" or "if" may only move where the other question has one too."""
    if bool(a.words & _CONDITIONS) != bool(b.words & _CONDITIONS):
        return _orders(a, concepts, False) == _orders(b, concepts, False)
    return bool(_orders(a, concepts) & _orders(b, concepts))


def _orders(reading: Reading, concepts: set[str], may_turn: bool = True) -> set[tuple[str, ...]]:
    """The orders that the concepts may be said to stand in: clauses as they are, or the first one last."""
    clauses = [[concept for _, concept in clause if concept in concepts] for clause in reading.clauses]
    turned = [*clauses[1:], *clauses[:1]] if may_turn else clauses
    return {tuple(dict.fromkeys(concept for clause in order for concept in clause)) for order in (clauses, turned)}


def _compounds_first(clause: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The tour of the hall as the hall tour: what "of" governs goes before what it belongs to."""
    result: list[tuple[str, str]] = []
    head = 0
    for preposition, concept in clause:
        if preposition == "of" and result:
            result.insert(head, ("", concept))
            head += 1
        else:
            result.append((preposition, concept))
            head = len(result) - 1
    return tuple(result)


def _rewritten(question: str) -> str:
    text = re.sub(r"(?<=\w)-(?=\w)", " ", normalize(question))
    text = re.sub(r"^(please |hello |hi |could|can|would)? ?(you )?(please )?(tell me|do you know|i (would like|want) to know|let me know)[ ,:]*", "", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _starter(clause: list[str]) -> str | None:
    """The kind of question that a clause asks by its first word; None where it is no question by itself."""
    words = clause[1:] if clause[:1] and clause[0] in _PREPOSITIONS | {"and", "so", "on", "at", "in"} else clause
    first = words[0] if words else ""
    return "polar" if first in _AUXILIARIES else first if first in _KINDS else None


def _kind_of(clauses: list[list[str]]) -> str:
    starters = [starter for clause in clauses if (starter := _starter(clause))]
    inside = [word for clause in clauses for word in clause if word in _KINDS]
    asked = [kind for kind in starters if kind != "when"] or starters
    if asked and not (asked[0] == "polar" and _starter(clauses[0]) is None):
        return asked[0]
    return next((word for word in inside if word != "when"), (asked or inside or ["polar"])[0])


def _asked(reading: Reading) -> frozenset[str]:
    return frozenset(reading.content) & _ASKED


def _names_in(question: str) -> frozenset[str]:
    """Words written with a capital inside a sentence, and all that mix letters with digits or capitals."""
    found = re.findall(r"(?<![.?!:] )(?<!^)\b[A-Z][\w&]*", question)
    return frozenset(word.lower() for word in found if word != "I" and word.lower() not in DATES and word.lower() not in _AUXILIARIES)


def _is_number(token: str, before: str) -> bool:
    if token == "second":
        return before not in ("a", "per", "every", "each")
    return token in NUMBERS or bool(re.fullmatch(r"\d+(\.\d+)?", token))


def _listed(words: Iterable[str]) -> str:
    return " ".join(sorted(words)) or "none"


def _joined(lines: str) -> dict[str, str]:
    """Every word, and the stem of every word, with the first word of what it is joined to."""
    concepts: dict[str, str] = {}
    for line in lines.split("\n"):
        forms = {form for word in line.split() for form in (word, _STEMMER.stemWord(word) if word.islower() else word)}
        names = {concepts[form] for form in forms if form in concepts}
        first = min(names) if names else min(forms, default="")
        concepts |= {form: first for form in forms} | {form: first for form, name in concepts.items() if name in names}
    return concepts


_BE = words("is are was were be been being get gets got MAY MUST")
_PARTICIPLE = re.compile(r"\w+(ed|en|ept|aid|ade|old|ound|eft|ent|ught|ung|own|et|ut)")
_CONDITIONS = words("when if while once unless because whenever where")
_OUTWARDS = re.compile(r"\b(i|we) (\w+ ){1,3}you\b")
_EXPLETIVE = re.compile(r"\b(is|was|are) it\b|\bit (is|was)\b|MAY it\b|MUST it\b")
_AUXILIARIES = words("do does did is are was were am can could may might must should shall will would has have had MAY MUST")
_DECISIVE = words("before after since all only some first last more less off")  # matter even where the other question is silent
_CONCEPTS = _joined(CONCEPTS)
_ASKED = frozenset(_CONCEPTS[word] for word in _CONCEPTS if word.isupper())
_OPPOSITES = frozenset(frozenset(_STEMMER.stemWord(word) for word in pair.split()) for pair in OPPOSITES.replace("\n", " ").split(", "))
