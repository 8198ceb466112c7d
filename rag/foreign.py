"""Other systems' records of model calls, read as data into one form: chat JSONL, request logs, LangSmith runs, LangChain's MongoDB cache.

chat             {"messages": […]}, the last one the assistant's (OpenAI's fine-tuning format)
openai           {"request": …, "response": …}: a logged chat completion; either may be wrapped in "body"
langsmith        {"inputs": …, "outputs": …}: a run or a dataset's example
langchain-cache  {"text" or "prompt", "return_val", …}: a document of langchain-mongodb's semantic or exact cache

LangChain's serialised objects are JSON here and nothing else: its object loader, which builds what a document names, is never used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote

from understudy.errors import StorageError, UsageError
from understudy.files import numbered_rows
from understudy.records import Message, Usage

Format = Literal["questions", "chat", "openai", "langsmith", "langchain-cache"]
FORMATS: tuple[Format, ...] = get_args(Format)

ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "tool": "user",  # what a tool returned is material that the model was shown
    "function": "user",
    "assistant": "assistant",
    "ai": "assistant",
}
PATIENCE = 5000  # milliseconds to find a MongoDB server in, unless the URL says otherwise
LATEST = 1e11  # seconds since the epoch; a larger number counts milliseconds
QUESTION_KEYS = ("question", "query", "input", "user_input")
CONTEXT_KEYS = ("context", "contexts", "documents", "source_documents", "passages")
ANSWER_KEYS = ("answer", "output", "result", "response", "text", "content")


@dataclass(frozen=True)
class Call:
    """One call of a model, as another system recorded it."""

    line: int  # 1-based, in its file or collection
    messages: list[Message]  # the prompt; empty where only question and answer were recorded
    text: str  # what the model wrote
    question: str = ""  # where the record names it
    context: str = ""  # passages, where the record names them apart from the prompt
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    finish_reason: str = "stop"  # empty: it broke off
    asked_at: float = 0.0  # seconds since the epoch; 0 is unknown
    seconds: float = 0.0

    @property
    def prompt(self) -> str:
        """Everything the model was shown."""
        return "\n\n".join([*(message.content for message in self.messages), self.context])


def detect_format(row: dict[str, Any]) -> Format:
    """The format of a file by its first row; raises UsageError."""
    if "return_val" in row and ("text" in row or "prompt" in row):
        return "langchain-cache"
    if isinstance(row.get("messages"), list):
        return "chat"
    if "request" in row and "response" in row:
        return "openai"
    if "inputs" in row and "outputs" in row:
        return "langsmith"
    if isinstance(row.get("question"), str):
        return "questions"
    raise UsageError(f"rows with the keys {', '.join(sorted(row)[:8]) or '(none)'} are in no format known here", f"--format names one: {', '.join(FORMATS)}")


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based number, object) of each row of a JSONL file, or of a file that is one JSON array, as some tools export."""
    with path.open("rb") as file:
        first = file.read(64).lstrip()[:1]
    if first != b"[":
        yield from numbered_rows(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not readable JSON: {error}", "one JSON object a line, or one JSON array of objects") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise StorageError(f"{path} item {number} is not a JSON object", "one JSON object a row")
        yield number, row


def read_call(row: dict[str, Any], number: int, kind: Format) -> Call:
    """One row as a Call; raises ValueError with the reason where it holds none."""
    readers = {"chat": _chat, "openai": _openai, "langsmith": _langsmith, "langchain-cache": _langchain_cache}
    try:
        call = readers[kind](row, number)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not of the format {kind} ({type(error).__name__}: {error})") from error
    if not call.text.strip():
        raise ValueError("the model wrote nothing")
    return call


def _chat(row: dict[str, Any], number: int) -> Call:
    messages = read_messages(row["messages"])
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")
    return Call(number, messages[:-1], messages[-1].content, model=str(row.get("model") or ""))


def _openai(row: dict[str, Any], number: int) -> Call:
    request, response = _body(row["request"]), _body(row["response"])
    [choice, *_] = response["choices"]
    usage = response.get("usage") or {}
    return Call(
        number,
        read_messages(request["messages"]),
        _content(choice["message"].get("content")),
        model=str(response.get("model") or request.get("model") or ""),
        usage=Usage(prompt_tokens=int(usage.get("prompt_tokens") or 0), completion_tokens=int(usage.get("completion_tokens") or 0)),
        finish_reason=str(choice.get("finish_reason") or ""),
        asked_at=_seconds(response.get("created")),
    )


def _langsmith(row: dict[str, Any], number: int) -> Call:
    if row.get("error"):
        raise ValueError("the run failed")
    inputs, outputs = row["inputs"], row["outputs"] or {}
    given = inputs.get("messages") or inputs.get("prompts") or inputs.get("prompt") or []
    invocation = (row.get("extra") or {}).get("invocation_params") or {}
    began, ended = _seconds(row.get("start_time")), _seconds(row.get("end_time"))
    context = [inputs.get(key) or outputs.get(key) for key in CONTEXT_KEYS]
    return Call(
        number,
        read_messages(given),
        _answer_of(outputs),
        question=_content(next((inputs[key] for key in QUESTION_KEYS if isinstance(inputs.get(key), str)), "")),
        context=_content([text for value in context for text in _texts(value)]),
        model=str(invocation.get("model") or invocation.get("model_name") or inputs.get("model") or ""),
        usage=Usage(prompt_tokens=int(row.get("prompt_tokens") or 0), completion_tokens=int(row.get("completion_tokens") or 0)),
        finish_reason="stop" if row.get("status", "success") == "success" else "",
        asked_at=began,
        seconds=max(0.0, ended - began) if began and ended else 0.0,
    )


def _langchain_cache(row: dict[str, Any], number: int) -> Call:
    asked = row.get("text") or row["prompt"]
    try:
        prompt = json.loads(asked)
    except ValueError:
        prompt = asked  # of a model without chat messages
    generation = json.loads(json.loads(row["return_val"])[0])["kwargs"]
    said = (generation.get("message") or {}).get("kwargs") or {}
    reply = said.get("response_metadata") or {}
    usage = said.get("usage_metadata") or {}
    reason = (generation.get("generation_info") or {}).get("finish_reason") or reply.get("finish_reason")
    named = re.search(r'"model(?:_name)?": "([^"]+)"', str(row.get("llm_string") or row.get("llm") or ""))
    return Call(
        number,
        read_messages(prompt),
        _content(generation.get("text") or said.get("content")),
        model=str(reply.get("model_name") or (named.group(1) if named else "")),
        usage=Usage(prompt_tokens=int(usage.get("input_tokens") or 0), completion_tokens=int(usage.get("output_tokens") or 0)),
        finish_reason=str(reason or "stop"),  # older integrations keep none, and LangChain caches whole replies only
        asked_at=_object_id_seconds(row.get("_id")),
    )


def read_messages(value: Any) -> list[Message]:
    """Messages in OpenAI's form, in LangChain's serialised form, or a plain prompt; empty ones (tool calls) are left out."""
    if isinstance(value, str):
        return [Message(role="user", content=_content(value))]
    if value and isinstance(value[0], list):
        return read_messages(value[0])  # a batch of one
    messages = []
    for item in value:
        message = {"role": "user", "content": item} if isinstance(item, str) else item.get("kwargs") or item.get("data") or item
        kind = item["id"][-1] if isinstance(item, dict) and isinstance(item.get("id"), list) else "user"
        name = str(message.get("role") or message.get("type") or kind)
        role = ROLES.get(name.lower().removesuffix("chunk").removesuffix("message"))
        if role is None:
            raise ValueError(f"a message has the unknown role {name!r}")
        text = _content(message.get("content"))
        messages += [Message(role=role, content=text)] if text else []
    return messages


def _answer_of(outputs: dict[str, Any]) -> str:
    """The text of a run's outputs, in the shapes that LangSmith documents for models and chains."""
    if outputs.get("generations"):
        generation = outputs["generations"][0]
        generation = generation[0] if isinstance(generation, list) else generation
        return _content(generation.get("text") or generation["message"]["kwargs"]["content"])
    if outputs.get("choices"):
        return _content(outputs["choices"][0]["message"]["content"])
    if outputs.get("messages"):
        return read_messages(outputs["messages"])[-1].content
    if isinstance(outputs.get("message"), dict):
        return read_messages([outputs["message"]])[-1].content
    for value in (outputs.get(key) for key in ANSWER_KEYS):
        if value:
            return _content(value) if isinstance(value, str | list) else _answer_of(value.get("kwargs") or value)
    return ""


def _content(value: Any) -> str:
    """A message's content: text, or parts of which the texts are kept; halves of surrogate pairs, which JSON can hold and UTF-8 cannot, become ?."""
    if isinstance(value, list):
        value = "\n".join(part if isinstance(part, str) else str(part.get("text") or "") for part in value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _texts(value: Any) -> list[str]:
    """Passages: text, or a list of texts or of LangChain documents, plain or serialised."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    documents = [item.get("kwargs") or item if isinstance(item, dict) else {"page_content": item} for item in value]
    return [text for text in (document.get("page_content") or document.get("text") for document in documents) if isinstance(text, str)]


def _body(value: Any) -> dict[str, Any]:
    value = json.loads(value) if isinstance(value, str) else value
    return dict(value["body"] if isinstance(value.get("body"), dict) else value)


def _seconds(value: Any) -> float:
    """A time stamp in ISO form (UTC unless it says otherwise), or as seconds or milliseconds since the epoch; 0 where there is none."""
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            return 0.0
        value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    seconds = float(value) / (1000 if value > LATEST else 1) if isinstance(value, int | float) else 0.0
    return seconds if 0 < seconds < LATEST else 0.0


def _object_id_seconds(value: Any) -> float:
    """When a MongoDB ObjectId was made, in seconds since the epoch; 0 for other ids."""
    digits = str(value.get("$oid") if isinstance(value, dict) else value)
    return float(int(digits[:8], 16)) if re.fullmatch(r"[0-9a-f]{24}", digits) else 0.0


def is_collection(source: str) -> bool:
    """Whether an import's source names a MongoDB server rather than a file."""
    return source.startswith(("mongodb://", "mongodb+srv://"))


def collection_rows(url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based number, document) of `mongodb://host/database?collection=NAME`, oldest first; raises UsageError or StorageError.

    No error shows the URL: it may hold a password.
    """
    import pymongo
    from pymongo.errors import PyMongoError

    place, _, query = url.partition("?")
    options = [option for option in query.split("&") if option]
    names = [unquote(option.removeprefix("collection=")) for option in options if option.startswith("collection=")]
    kept = [option for option in options if not option.startswith("collection=")]
    if not any(option.lower().startswith("serverselectiontimeoutms=") for option in kept):
        kept.append(f"serverSelectionTimeoutMS={PATIENCE}")
    try:
        with pymongo.MongoClient[dict[str, Any]](f"{place}?{'&'.join(kept)}") as client:
            database = client.get_default_database()
            if len(names) != 1 or not names[0]:
                raise UsageError("the URL names no collection", "write mongodb://HOST/DATABASE?collection=NAME")
            if names[0] not in database.list_collection_names(authorizedCollections=True):
                raise UsageError(f"the database {database.name} has no collection {names[0]}", "check the names")
            fields = dict.fromkeys(("text", "prompt", "llm", "llm_string", "return_val"), 1)
            yield from enumerate(database[names[0]].find({}, fields).sort("_id", 1), 1)
    except (pymongo.errors.ConfigurationError, ValueError) as error:
        raise UsageError("the MongoDB URL names no database, or is not one", "write mongodb://HOST/DATABASE?collection=NAME") from error
    except PyMongoError as error:
        raise StorageError(f"the MongoDB collection could not be read ({type(error).__name__})", "check host, name and access rights") from error
