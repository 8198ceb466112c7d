"""Other systems' calls become traces: question, passages and quotes are recovered from the prompts, against the corpus.

Passages are the corpus' own chunks whose words stand in the prompt, run by run, however the other system cut its documents.
Quotes are those that the answer gives, else the sentence of these passages that supports it. A trace whose passages or
support cannot be recovered is marked `unverified`, with the reason, and teaches nothing unless it is asked for.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rag.citations import find_quote, locate
from rag.foreign import Call
from rag.prompts import ABSTENTION, parse_answer, parse_query, parse_score
from rag.retrieve import Retriever
from understudy.digests import digest_of
from understudy.records import Chunk, Citation, Split, Step, Trace

DEPTH = 20  # passages retrieved for a trace that was not run here: the distractors of training come from them
RUN = 6  # words that must stand in a prompt in the same order to count
SHOWN = 0.5  # share of a chunk's runs of words from which on a prompt shows the chunk
SUPPORT = 0.5  # share of an answer's words that the supporting sentence must hold
ABSTAINS_WITHIN = 60  # words; a longer text answers something
ABSTAINS = re.compile(
    r"\b(do(es)?|did|is|are|was|were|can|could)(n['’]t| not)\b[^.]{0,40}"
    r"\b(answer|contain|mention|say|state|provide|specif\w+|include|find|found|determine|available|given)"
    r"|\b(do not|don['’]t) know\b|\bno (information|mention|answer)\b|\bcannot (be )?(answer|determin|f[io]u?nd)|\binsufficient (information|context)",
    re.IGNORECASE,
)


class Prompts:
    """Which chunks of a corpus stand in a text; built once over all chunks."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._holders: dict[str, list[str]] = defaultdict(list)  # chunk ids by each of their runs of RUN words
        self._runs: dict[str, int] = {}
        for chunk in chunks:
            words = chunk.text.split()
            runs = [" ".join(words[i : i + RUN]) for i in range(0, len(words) - RUN + 1, RUN)]
            self._runs[chunk.id] = len(runs)
            for run in runs:
                self._holders[run].append(chunk.id)

    def shown(self, text: str) -> list[str]:
        """Ids of the chunks that the text shows, at least by SHOWN of their runs of words, in the text's order."""
        words = text.split()
        found: Counter[str] = Counter()
        for run in dict.fromkeys(" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)):
            found.update(self._holders.get(run, ()))
        return [chunk_id for chunk_id, count in found.items() if count >= SHOWN * self._runs[chunk_id]]


@dataclass(frozen=True)
class Recovered:
    """One question's calls: the answer, and the planning and judging around it where they were recorded."""

    question: str
    answer: Call
    shown: list[str]  # chunk ids
    plan: Call | None = None
    verdict: Call | None = None

    @property
    def score(self) -> float | None:
        """What the other system's validation said."""
        return verdict_of(self.verdict.text) if self.verdict else None


def recover(calls: list[Call], prompts: Prompts) -> tuple[list[Recovered], list[tuple[int, str]]]:
    """One Recovered for each question, and (line, reason) of each call that is no part of one.

    Calls on one question belong together: a score about another call's text is its validation, and a call that was
    shown no passage, where another was, planned the search. Of several answers the best scored, then the last, is taken.
    """
    shown = {call.line: prompts.shown(call.prompt) for call in calls}
    groups: dict[str, list[tuple[str, Call]]] = defaultdict(list)
    skipped = []
    for call in calls:
        question = question_of(call, bool(shown[call.line]))
        if question:
            groups[" ".join(question.lower().split())].append((question, call))
        else:
            skipped.append((call.line, "no question was found in its prompt"))
    recovered = []
    for group in groups.values():
        chosen = _chosen([call for _, call in group], group[0][0], shown)
        recovered.append(chosen)
        used = {call.line for call in (chosen.answer, chosen.plan, chosen.verdict) if call}
        skipped += [(call.line, "another call on the same question was taken") for _, call in group if call.line not in used]
    return recovered, sorted(skipped)


def _chosen(calls: list[Call], question: str, shown: dict[int, list[str]]) -> Recovered:
    """The best answer among the calls on one question, with the planning and judging that belong to it; `shown` is by line."""
    prompts = {call.line: _flat(call.prompt) for call in calls if verdict_of(call.text) is not None}

    def judges(verdict: Call, answer: Call) -> bool:
        return answer.line not in prompts and _flat(answer.text) in prompts[verdict.line]

    verdicts = [call for call in calls if call.line in prompts and any(judges(call, other) for other in calls)]
    others = [call for call in calls if call not in verdicts]
    answers = [call for call in others if shown[call.line]] or others
    plans = [call for call in others if call not in answers]
    judged = [
        Recovered(question, answer, shown[answer.line], plans[-1] if plans else None, next((v for v in reversed(verdicts) if judges(v, answer)), None))
        for answer in answers
    ]
    return max(enumerate(judged), key=lambda pair: (pair[1].score or 0.0, pair[0]))[1]


def question_of(call: Call, shows_passages: bool) -> str:
    """The question a call is about: named by the record, labelled in the prompt, the whole of a short prompt, or its last question."""
    asked = next((message.content for message in reversed(call.messages) if message.role == "user"), "")
    if call.question:
        return call.question.strip()
    tagged = re.findall(r"(?is)<(question|query)>\s*(.+?)\s*</\1>", asked)
    labelled = re.findall(r"(?im)^[\s*#>-]*(?:user(?:['’]s)?\s+)?(?:question|query)\W{0,3}:\W{0,3}\s*(\S.*?)[\s*]*$", asked)
    if tagged or labelled:
        return str(tagged[-1][1] if tagged else labelled[-1]).strip()
    if not shows_passages and len(asked.split()) <= ABSTAINS_WITHIN:
        return asked.strip()
    lines = [line.strip() for line in asked.splitlines() if line.strip().endswith("?")]
    return lines[-1] if lines else ""


def imported_trace(found: Recovered, retriever: Retriever, split: Split) -> Trace:
    """The trace of another system's answer; `metadata["unverified"]` says what could not be recovered."""
    call = found.answer
    text, quotes, abstained = read_answer(call.text)
    shown = [retriever.chunks[chunk_id] for chunk_id in found.shown]
    citations = [] if abstained else _citations(text, quotes, shown, retriever.page_starts)
    unverified = "no passage of the corpus stands in its prompt" if not shown else ""
    if shown and not abstained and not citations:
        unverified = "no passage that its prompt shows supports the answer"
    is_whole = call.finish_reason not in ("", "length", "content_filter")
    asked_at = call.asked_at or time.time()
    metadata = {"split": split, **({"unverified": unverified} if unverified else {})}
    if not is_whole:
        metadata["error"] = f"the answer broke off (finish reason {call.finish_reason or 'none'})"
    return Trace(
        id=digest_of([retriever.tenant, "imported", found.question, call.text])[:32],
        tenant=retriever.tenant,
        question=found.question,
        steps=_steps(found, retriever, asked_at),
        answer=ABSTENTION if abstained else text,
        abstained=abstained,
        citations=citations,
        quotes=quotes or [citation.quote for citation in citations],
        score=found.score,
        source="imported",
        model=call.model,
        generation=retriever.generation,
        prompt_version="imported",
        complete=is_whole,
        created_at=asked_at,
        metadata=metadata,
    )


def _steps(found: Recovered, retriever: Retriever, asked_at: float) -> list[Step]:
    """The calls as steps; the passages shown come first, then what retrieval here returns, from which training takes distractors."""
    near = [passage.chunk.id for passage in retriever.search([found.question], DEPTH) if passage.chunk.id not in found.shown]
    steps = []
    if found.plan:
        query = parse_query(found.plan.text)
        steps.append(_step("plan", found.plan, asked_at, {"query": query}).model_copy(update={"text": query}))
    steps.append(Step(name="retrieve", passage_ids=[*found.shown, *near], started_at=asked_at))
    steps.append(_step("answer", found.answer, asked_at, {}).model_copy(update={"passage_ids": found.shown}))
    if found.verdict:
        steps.append(_step("validate", found.verdict, asked_at, {"score": found.score}))
    return steps


def _step(name: str, call: Call, asked_at: float, parsed: dict[str, object]) -> Step:
    return Step.model_validate(
        {
            "name": name,
            "messages": call.messages,
            "text": call.text,
            "parsed": parsed,
            "model": call.model,
            "usage": call.usage,
            "finish_reason": call.finish_reason,
            "started_at": call.asked_at or asked_at,
            "seconds": call.seconds,
        }
    )


def read_answer(text: str) -> tuple[str, list[str], bool]:
    """(answer, quotes as given, whether it abstains) of a completion in this project's form, in JSON, or in prose with quotation marks."""
    given = _json_object(text)
    if given:
        text = next((value for key in ("answer", "response", "result") if isinstance(value := given.get(key), str)), text)
        listed = next((value for key in ("quotes", "citations", "evidence") if isinstance(value := given.get(key), list)), [])
        quotes = [quote for item in listed if (quote := item if isinstance(item, str) else str((item or {}).get("quote") or ""))]
        return text.strip(), quotes, is_abstention(text, quotes)
    answer = parse_answer(text)
    quotes = answer.quotes or re.findall(r"[\"“«]([^\"“”«»]{12,})[\"”»]", answer.text)
    return answer.text.strip(), quotes, answer.abstained or is_abstention(answer.text, quotes)


def is_abstention(text: str, quotes: list[str]) -> bool:
    """Whether a short text without quotes says that the documents do not answer."""
    return not quotes and len(text.split()) <= ABSTAINS_WITHIN and bool(ABSTAINS.search(text) or ABSTENTION.rstrip(".") in text)


def verdict_of(text: str) -> float | None:
    """The score in [0, 1] that a validation states, bare, labelled or in JSON; None for any other text."""
    given = _json_object(text)
    value = given.get("score", given.get("confidence")) if given else None
    return parse_score(str(value) if isinstance(value, int | float) else text)


def _citations(answer: str, quotes: list[str], shown: list[Chunk], page_starts: dict[str, list[int]]) -> list[Citation]:
    """The quotes that are verbatim in the passages shown, else the sentence of theirs that supports the answer."""
    found = [citation for quote in quotes if (citation := locate(quote, shown, page_starts))]
    if found:
        return found
    sentence = best_support(answer, [chunk.text for chunk in shown])
    citation = locate(sentence, shown, page_starts) if sentence else None
    return [citation] if citation else []


def best_support(answer: str, texts: list[str]) -> str:
    """The sentence of the texts that shares most words with the answer; empty where none shares SUPPORT of them."""
    wanted = set(re.findall(r"\w+", answer.lower()))
    best, share = "", 0.0
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            overlap = len(wanted & set(re.findall(r"\w+", sentence.lower()))) / max(1, len(wanted))
            if overlap > share and find_quote(sentence, text):
                best, share = sentence.strip(), overlap
    return best if share >= SUPPORT else ""


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is, fenced or not; empty for any other text."""
    fenced = re.fullmatch(r"(?s)\s*(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?\s*", text)
    try:
        value = json.loads(fenced.group(1)) if fenced else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(text: str) -> str:
    return " ".join(text.split())
