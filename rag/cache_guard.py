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

from rag.cache_roles import role_findings
from rag.cache_wording import AUXILIARIES, DETERMINERS, PREPOSITIONS, WHO, Clause, Token, Wording, wording_of
from rag.cache_words import CONCEPTS, DATES, MARKERS, NEGATIONS, NUMBERS, OPPOSITES, REWRITES, STOPWORDS, UNITS, words
from understudy.digests import digest_of

_STEMMER = Stemmer.Stemmer("english")
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
_NEGATING_PREFIX = re.compile(r"^(un|in|im|ir|il|dis|non|de|ab)(?=\w{4})")
_KINDS = ("who", "whom", "where", "why", "when", "how", "what")


@dataclass(frozen=True)
class Reading:
    """What the guard sees in one question."""

    kind: str  # who, where, why, when, how, what; or "polar": to be answered by yes or no
    negated: bool
    all_denied: bool  # every one is not, rather than not every one is
    numbers: Counter[str]  # with their units
    dates: frozenset[str]
    units: frozenset[str]
    names: frozenset[str]
    markers: dict[str, frozenset[str]]
    content: frozenset[str]  # concepts
    wording: Wording
    words: frozenset[str]  # every word, lower-case
    bound: dict[str, str]  # a number, a day or a rank, and the concept that it stands before
    duty: bool  # the first word that says may or must says must
    outwards: bool  # I or we do it to you
    person: str  # "I" where I or we do something, "me" where it is done to us, "" where both, neither or a passive hides it
    tense: str  # of its auxiliaries: "past", "present", or "" where they are mixed or missing


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
    names = _names_in(question)
    clauses = [tokens for clause in re.split(r"[,:;.?!]+(?:\s|$)", _rewritten(question)) if (tokens := re.findall(r"[\w&]+(?:[.'][\w&]+)*", clause))]
    numbers: Counter[str] = Counter()
    markers: dict[str, set[str]] = {name: set() for name in MARKERS}
    placed: list[Clause] = []
    bound: dict[str, str] = {}
    modal = ""
    for tokens in clauses:
        inside: list[Token] = []
        preposition = ""
        for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
            if _is_number(token, before):
                unit = f" {_STEMMER.stemWord(after)}" if after in UNITS else ""  # 2 days and 3 weeks are not 3 days and 2 weeks
                numbers[NUMBERS.get(token, token) + unit] += 1
            elif token not in NEGATIONS and (marked := [(name, values[token]) for name, values in MARKERS.items() if token in values]):
                for name, value in marked:
                    markers[name].add(value)
            elif token not in NEGATIONS and token not in STOPWORDS and token not in DATES and token not in UNITS and token not in _KINDS:
                inside.append(Token(token, concept_of(token), preposition, token in names or before in DETERMINERS or before in PREPOSITIONS - {"to"} - names))
                continue  # what a preposition governs goes on
            modal = modal or MARKERS["modality"].get(token, "")
            if after and after not in STOPWORDS | DATES | UNITS and (_is_number(token, before) or token in DATES or token in _RANKS):
                bound[NUMBERS.get(token, token)] = concept_of(after)
            is_asked_for = token == "who" and (after == "BY" or not (inside and inside[-1].concept))  # "the keeper who" asks for nobody
            inside.append(Token(token, WHO if is_asked_for else ""))
            preposition = token if token in PREPOSITIONS - names else preposition if token in DETERMINERS and before == preposition else ""
        placed.append(tuple(inside))
    seen = frozenset(token for tokens in clauses for token in tokens)
    return Reading(
        kind=_kind_of(clauses),
        negated=sum(token in NEGATIONS for tokens in clauses for token in tokens) % 2 == 1,
        all_denied=any(_ALL_NOT.search(" ".join(tokens)) for tokens in clauses),
        numbers=numbers,
        dates=frozenset(token.removesuffix("s") if token.endswith(("days", "ends", "ings")) else token for token in seen & DATES),
        units=frozenset(_STEMMER.stemWord(token) for token in seen & UNITS if not _is_number(token, "")),
        names=names & seen,
        markers={name: frozenset(values) for name, values in markers.items()},
        content=frozenset(token.concept for clause in placed for token in clause if token.concept and token.concept != WHO),
        wording=wording_of(tuple(placed)),
        words=seen,
        person="" if seen & _BE or bool(seen & _ME) == bool(seen & _I) else "I" if seen & _I else "me",
        tense="" if bool(seen & _PAST) == bool(seen & _PRESENT) else "past" if seen & _PAST else "present",
        bound=bound,
        duty=modal == "must",
        outwards=any(_OUTWARDS.search(" ".join(tokens)) for tokens in clauses),
    )


def compare(cached: str, asked: str) -> Comparison:
    """What sets the asked question apart from the cached one."""
    a, b = read_question(cached), read_question(asked)
    findings = [*_different_facts(a, b), *_different_markers(a, b), *_opposites_between(a, b)] or _different_roles(a, b)
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
    elif ("COUNT" in a.words) != ("COUNT" in b.words):
        found.append("question: how many / which")
    if a.negated != b.negated:
        found.append("negation")
    elif a.negated and a.all_denied != b.all_denied:
        found.append("negation: not all / all not")
    if ("or" in a.words) != ("or" in b.words):
        found.append("question: one or the other")
    if {a.tense, b.tense} == {"past", "present"}:
        found.append(f"tense: {a.tense} / {b.tense}")
    for label, left, right in (("number", a.numbers.keys(), b.numbers.keys()), ("date", a.dates, b.dates), ("unit", a.units, b.units)):
        if left != right:
            found.append(f"{label}: {_listed(left - right)} / {_listed(right - left)}")
    shared = a.content & b.content
    bound = [word for word in sorted(a.bound.keys() & b.bound.keys()) if a.bound[word] != b.bound[word] and {a.bound[word], b.bound[word]} <= shared]
    found += [f"roles: {word} {a.bound[word]} / {word} {b.bound[word]}" for word in bound]
    strangers = {name for mine, other in ((a, b), (b, a)) for name in mine.names if concept_of(name) not in map(concept_of, other.words)}
    return found + ([f"name: {_listed(strangers)}"] if strangers else [])


def _different_markers(a: Reading, b: Reading) -> list[str]:
    found = []
    for name in MARKERS:
        left, right = a.markers[name], b.markers[name]
        is_duty_asked = a.kind == "polar" and name == "modality" and ("must" in left ^ right or a.duty != b.duty)  # one must: one does
        if not (left <= right or right <= left) or (left ^ right) & _DECISIVE or is_duty_asked:
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
    """Who does what to whom, as far as it can be told without a parser."""
    if a.outwards != b.outwards or {a.person, b.person} == {"I", "me"}:
        return ["roles: I to you / you to me"]
    asked = frozenset(concept_of(word) for word in a.words | b.words if word.isupper() and word in _CONCEPTS)
    may_turn = bool(a.words & _CONDITIONS) == bool(b.words & _CONDITIONS)
    return role_findings(a.wording, b.wording, asked, may_turn)


def _rewritten(question: str) -> str:
    text = re.sub(r"(?<=\w)-(?=\w)", " ", normalize(question))
    text = re.sub(r"^(please |hello |hi |could|can|would)? ?(you )?(please )?(tell me|do you know|i (would like|want) to know|let me know)[ ,:]*", "", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _starter(clause: list[str]) -> str | None:
    """The kind of question that a clause asks by its first word; None where it is no question by itself."""
    words = clause[1:] if clause[:1] and clause[0] in PREPOSITIONS | {"and", "so", "on", "at", "in"} else clause
    first = words[0] if words else ""
    return "polar" if first in AUXILIARIES else first if first in _KINDS else None


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
    return frozenset(word.lower() for word in found if word != "I" and word.lower() not in DATES and word.lower() not in AUXILIARIES)


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


_BE = words("is are was were be been being get gets got")
_I, _ME = words("i we"), words("me us")
_PAST, _PRESENT = words("did was were"), words("do does is are am will")
_RANKS = words("first last minimum maximum least most only all every each some average")
_CONDITIONS = words("when if while once unless because whenever where")
_ALL_NOT = re.compile(r"\b(all|every|each|everyone|everybody|everything)\b.* not\b")
_OUTWARDS = re.compile(r"\b(i|we) (\w+ ){1,3}you\b")
_DECISIVE = words("before after since until else all only some first last more less off")  # matter even where the other question is silent
_CONCEPTS = _joined(CONCEPTS)
_ASKED = frozenset(_CONCEPTS[word] for word in _CONCEPTS if word.isupper())
_OPPOSITES = frozenset(frozenset(_STEMMER.stemWord(word) for word in pair.split()) for pair in OPPOSITES.replace("\n", " ").split(", "))
