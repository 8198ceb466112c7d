"""Questions asked in other words and with typing errors: by rules, seeded, without a model.

The rules change wording only: numbers, names and what is asked stay. They are shallow; a file of people's or a model's paraphrases
says more (`evaluate --paraphrases`).
"""

from __future__ import annotations

import re
from random import Random

FRAMES = ("Could you tell me: {}", "I would like to know: {}", "A colleague asked me this: {}", "Quick question. {}")
OPENINGS = {
    "how long": "for how long",
    "how many": "what number of",
    "how much": "what amount of",
    "how often": "with what frequency",
    "when": "at what point",
    "where": "in what place",
    "why": "for what reason",
}
SYNONYMS = {
    "company": "firm", "companies": "firms", "firm": "company", "firms": "companies", "staff": "personnel", "personnel": "staff",
    "buy": "purchase", "buys": "purchases", "big": "large", "start": "begin", "starts": "begins", "keep": "retain", "keeps": "retains",
    "rule": "provision", "rules": "provisions", "check": "verify", "checks": "verifies", "boss": "manager", "manager": "boss",
    "allowed": "permitted", "permitted": "allowed", "forbidden": "prohibited", "prohibited": "forbidden", "people": "individuals", "person": "individual",
}  # fmt: skip
CONTRACTIONS = {
    "does not": "doesn't", "do not": "don't", "is not": "isn't", "are not": "aren't", "cannot": "can't", "did not": "didn't", "will not": "won't",
    "what is": "what's", "who is": "who's", "it is": "it's", "we are": "we're", "I am": "I'm", "I have": "I've", "there is": "there's",
}  # fmt: skip
REWORDED = {**SYNONYMS, **CONTRACTIONS, **{short: long for long, short in CONTRACTIONS.items()}}
NEIGHBOURS = {
    "a": "s", "b": "v", "c": "x", "d": "s", "e": "r", "f": "g", "g": "h", "h": "j", "i": "o", "j": "k", "k": "l", "l": "k", "m": "n", "n": "m",
    "o": "p", "p": "o", "q": "w", "r": "t", "s": "d", "t": "y", "u": "i", "v": "b", "w": "e", "x": "c", "y": "u", "z": "x",
}  # fmt: skip
WORDS_A_TYPO = 10  # one typing error for so many words, and at least one
LEAST_LETTERS = 4  # shorter words are typed right


def paraphrase(question: str, generator: Random) -> str:
    """The question with another opening, other words and contractions where a rule knows one, inside a frame; never the same text."""
    text = question
    for opening, other in OPENINGS.items():
        if re.match(rf"{opening}\b", text, re.IGNORECASE):
            text = other.capitalize() + text[len(opening) :]
            break
    pattern = rf"(?<![\w'])({'|'.join(sorted(map(re.escape, REWORDED), key=len, reverse=True))})(?![\w'])"
    text = re.sub(pattern, lambda found: _cased(REWORDED, found.group()), text, flags=re.IGNORECASE)
    return generator.choice(FRAMES).format(text)


def mistype(question: str, generator: Random) -> str:
    """The question with a letter swapped, doubled, missed or hit beside in some of its longer words; first letters and numbers stay."""
    words = re.split(r"(\s+)", question)
    longer = [place for place, word in enumerate(words) if len(word) >= LEAST_LETTERS and word.isalpha() and word.isascii()]
    chosen = generator.sample(longer, min(len(longer), max(1, len(question.split()) // WORDS_A_TYPO)))
    for place in chosen:
        words[place] = _mistyped(words[place], generator)
    return "".join(words)


def _mistyped(word: str, generator: Random) -> str:
    at = generator.randrange(1, len(word) - 1)
    before, letter, rest = word[:at], word[at], word[at + 1 :]
    kind = generator.choice(("swap", "double", "miss", "beside"))
    if kind == "swap" and rest[0] != letter:
        return before + rest[0] + letter + rest[1:]
    if kind == "miss":
        return before + rest
    if kind == "beside" and letter in NEIGHBOURS:
        return before + NEIGHBOURS[letter] + rest
    return before + letter + letter + rest


def _cased(words: dict[str, str], found: str) -> str:
    """What stands for the word found, capitalised as it is."""
    other = words.get(found) or next(value for key, value in words.items() if key.lower() == found.lower())
    return other[0].upper() + other[1:] if found[0].isupper() else other
