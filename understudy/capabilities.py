"""What an OpenAI-compatible server can do, found out by asking it: vLLM, Ollama, llama.cpp, a cluster's front door.

Each capability is one small request; a server that refuses a field, or takes it and ignores it, lacks the capability.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx
from pydantic import BaseModel

from understudy.errors import EndpointError

PROBE_SECONDS = 60.0  # a model may have to be loaded first
TOOL = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}
SCHEMA = {"type": "object", "properties": {"probe": {"type": "string", "enum": ["seven"]}}, "required": ["probe"], "additionalProperties": False}

Kind = Literal["vllm", "ollama", "llama.cpp", "unknown"]


class Capabilities(BaseModel):
    """One server and model, as probed."""

    kind: Kind
    version: str = ""
    logprobs: bool  # of generated tokens: validation by them, and a better score
    prompt_logprobs: bool  # of given tokens: the proof
    tokenize: bool  # messages to token ids: the proof
    tools: bool
    structured_output: bool  # response_format json_schema is kept to
    lists_adapters: bool  # what is an adapter, and of which base
    loads_adapters: bool  # at run time

    @property
    def can_prove(self) -> bool:
        """Whether an adapter served there can be shown to be the one that was trained."""
        return self.prompt_logprobs and self.tokenize

    def describe(self) -> str:
        """For people: what it is, what it can, what it cannot."""
        named = {
            name: getattr(self, name) for name in ("logprobs", "prompt_logprobs", "tokenize", "tools", "structured_output", "lists_adapters", "loads_adapters")
        }
        can, cannot = ([name.replace("_", " ") for name, has in named.items() if has is wanted] for wanted in (True, False))
        return f"{self.kind} {self.version}".strip() + f": {', '.join(can) or 'chat only'}" + (f"; no {', no '.join(cannot)}" if cannot else "")


class _Asker:
    """Requests to one server; whatever is no JSON answer with status 200 is None."""

    def __init__(self, http: httpx.Client, url: str, model: str) -> None:
        self._http, self.url, self.root, self.model = http, url, url.removesuffix("/v1"), model

    def get(self, url: str) -> Any:
        return self._ask("GET", url, None)

    def post(self, url: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", url, {"model": self.model, **body})

    def chat(self, **more: Any) -> dict[str, Any]:
        """The first choice of a greedy chat completion; empty where it is refused."""
        body = {"messages": [{"role": "user", "content": "Say seven."}], "max_tokens": 32, "temperature": 0, **more}
        return _first(self.post(f"{self.url}/chat/completions", body))

    def status(self, url: str, body: dict[str, Any]) -> int:
        """Of a POST."""
        try:
            return self._http.post(url, json=body).status_code
        except httpx.HTTPError:
            return 0

    def _ask(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = self._http.request(method, url, json=body)
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None


def probe(url: str, model: str, key: str = "") -> Capabilities:
    """Ask a server what it can do with a model; about nine requests. Raises EndpointError where it does not even chat."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(headers=headers, timeout=PROBE_SECONDS, follow_redirects=False) as http:
        ask = _Asker(http, url, model)
        if not ask.chat():
            raise EndpointError(f"{url} answers no chat completion of {model}", "check serve.url (with /v1), serve.model and the key in serve.api_key_env")
        kind, version = _identify(ask)
        scored = ask.chat(logprobs=True, top_logprobs=5)
        echoed = _first(ask.post(f"{url}/completions", {"prompt": "one two three", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}))
        tokens = ask.post(f"{ask.root}/tokenize", {"messages": [{"role": "user", "content": "one"}], "add_generation_prompt": True})
        called = ask.chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "probe"}})
        may_choose = bool(ask.chat(tools=[TOOL], tool_choice="auto"))  # vLLM without a parser forces a named call, and refuses to choose
        rows = (ask.get(f"{url}/models") or {}).get("data") or []
        return Capabilities(
            kind=kind,
            version=version,
            logprobs=bool((scored.get("logprobs") or {}).get("content")),
            prompt_logprobs=bool(echoed.get("prompt_logprobs")),
            tokenize=isinstance(tokens, dict) and bool(tokens.get("tokens")),
            tools=may_choose and bool((called.get("message") or {}).get("tool_calls")),
            structured_output=_keeps_to_schema(ask),
            lists_adapters=any(isinstance(row, dict) and "parent" in row for row in rows),
            loads_adapters=ask.status(f"{url}/load_lora_adapter", {}) in (400, 422),  # the route is there, and wants a name
        )


def _identify(ask: _Asker) -> tuple[Kind, str]:
    """By routes that only one kind of server has."""
    routes: tuple[tuple[str, Kind, str], ...] = (("/version", "vllm", "version"), ("/api/version", "ollama", "version"), ("/props", "llama.cpp", "build_info"))
    for route, kind, field in routes:
        told = ask.get(ask.root + route)
        if isinstance(told, dict) and isinstance(told.get(field), str):
            return kind, str(told[field])[:40]
    return "unknown", ""


def _keeps_to_schema(ask: _Asker) -> bool:
    said = ask.chat(response_format={"type": "json_schema", "json_schema": {"name": "probe", "schema": SCHEMA, "strict": True}})
    try:
        return bool(json.loads((said.get("message") or {}).get("content") or "") == {"probe": "seven"})
    except ValueError:
        return False


def _first(answer: Any) -> dict[str, Any]:
    try:
        first = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        return {}
    return first if isinstance(first, dict) else {}
