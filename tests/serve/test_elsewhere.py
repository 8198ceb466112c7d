"""An engine that runs elsewhere: what it can do is found by asking, and what it cannot is refused; the servers are scripted."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.command import engine_for, run_tune
from serve.elsewhere import find_elsewhere
from serve.prove import prove
from tests.scripted import Endpoint, Handler, scripted
from tests.serve.doors import ask, opened
from tests.serve.test_gateway import error_of
from tests.serve.test_gateway_names import register
from understudy.capabilities import Capabilities, probe
from understudy.client import engine_model
from understudy.commands import setting_up
from understudy.engines import find_engine, require_engine
from understudy.errors import EndpointError, EngineError, NotFoundError, UsageError
from understudy.progress import show_progress
from understudy.workspace import Workspace, create_workspace

ALL = frozenset({"logprobs", "prompt_logprobs", "tokenize", "tools", "structured_output", "lists_adapters", "loads_adapters"})
VERSIONS = {"vllm": ("/version", {"version": "0.32.0"}), "ollama": ("/api/version", {"version": "0.9"}), "llama.cpp": ("/props", {"build_info": "b6000"})}


class Capable(Handler):
    """A server of a kind, with some capabilities: what it lacks it refuses, or takes and ignores."""

    kind, has, refuses, key = "vllm", ALL, False, ""

    def do_GET(self) -> None:
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self.send(401, {"error": {"message": "no"}})
        elif self.path == VERSIONS.get(self.kind, ("", {}))[0]:
            self.send(200, VERSIONS[self.kind][1])
        elif self.path == "/v1/models":
            rows = [{"id": name, "root": root, "parent": parent or None} for name, (root, parent) in self.endpoint.listed.items()]
            self.send(200, {"data": rows if "lists_adapters" in self.has else [{"id": row["id"]} for row in rows]})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.endpoint.bodies.append(body)
        wanted = {"logprobs": "logprobs", "prompt_logprobs": "prompt_logprobs", "tools": "tools", "response_format": "structured_output"}
        lacking = [field for field, capability in wanted.items() if field in body and capability not in self.has]
        routes = {"/tokenize": "tokenize", "/v1/load_lora_adapter": "loads_adapters"}
        if self.path in routes:
            found = routes[self.path] in self.has
            self.send((200 if self.path == "/tokenize" else 400) if found else 404, {"tokens": [1, 2]})
        elif lacking and self.refuses:
            self.send(400, {"error": {"message": f"unknown field {lacking[0]}"}})
        else:
            self.send(200, {"choices": [self.choice(body, lacking)], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def choice(self, body: dict[str, object], ignored: list[str]) -> dict[str, object]:
        given = {field for field in body if field not in ignored}
        message: dict[str, object] = {"role": "assistant", "content": '{"probe": "seven"}' if "response_format" in given else "seven"}
        if "tools" in given:
            message["tool_calls"] = [{"function": {"name": "probe", "arguments": "{}"}}]
        choice = {"index": 0, "finish_reason": "stop", "message": message, "text": "four"}
        choice["logprobs"] = {"content": [{"token": "seven", "logprob": -0.1}]} if "logprobs" in given else None
        return choice | ({"prompt_logprobs": [None, {"1": {"logprob": -1.0}}]} if "prompt_logprobs" in given else {})


@contextmanager
def server(kind: str = "vllm", has: frozenset[str] = ALL, refuses: bool = False, key: str = "") -> Iterator[Endpoint]:
    with scripted() as made:
        made.listed = {"tiny": ("/elsewhere/tiny", "")}
        made.server.RequestHandlerClass = type("Bound", (Capable,), {"endpoint": made, "kind": kind, "has": has, "refuses": refuses, "key": key})
        yield made


@pytest.fixture
def elsewhere() -> Iterator[Endpoint]:
    with server() as made:
        yield made


def workspace_of(folder: Path, endpoint: Endpoint, **settings: object) -> Workspace:
    return create_workspace(str(folder / "elsewhere"), json.dumps({"serve": {"url": endpoint.model.base_url, **settings}}))


def capabilities(kind: str, has: frozenset[str]) -> Capabilities:
    version = next((iter(body.values()) for name, (_, body) in VERSIONS.items() if name == kind), iter([""]))
    return Capabilities.model_validate({"kind": kind, "version": next(version), **{name: name in has for name in ALL}})


SETS = [
    ("vllm", ALL),
    ("vllm", ALL - {"tools", "loads_adapters"}),
    ("llama.cpp", frozenset({"logprobs", "tools", "structured_output"})),
    ("ollama", frozenset({"tools", "structured_output"})),
    ("unknown", frozenset()),
]


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize(("kind", "has"), SETS)
def test_capabilities_are_what_a_server_does_not_what_it_takes(kind: str, has: frozenset[str], refuses: bool) -> None:
    with server(kind, has, refuses) as made:
        found = probe(made.model.base_url, "tiny")
    assert found == capabilities(kind, has)
    assert found.can_prove is ({"prompt_logprobs", "tokenize"} <= has)
    assert ("no tools" in found.describe()) is ("tools" not in has)


def test_a_server_is_probed_once_and_its_models_are_asked_anew(elsewhere: Endpoint, tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, elsewhere)
    first = find_engine(workspace)
    asked = len(elsewhere.bodies)
    elsewhere.listed["a@0123456789ab"] = ("/elsewhere/a", "tiny")
    again = require_engine(workspace)
    assert first is not None and (first.base, first.models, again.models) == ("tiny", ["tiny"], ["tiny", "a@0123456789ab"])
    assert len(elsewhere.bodies) == asked > 0
    elsewhere.listed = {"other": ("/elsewhere/other", "")}
    assert require_engine(workspace).base == "other" and len(elsewhere.bodies) > asked


def test_what_is_wrong_with_it_is_said(elsewhere: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not serve huge") as caught:
        find_engine(workspace_of(tmp_path / "a", elsewhere, model="huge"))
    assert "tiny" in caught.value.remedy
    workspace = workspace_of(tmp_path / "b", elsewhere)
    elsewhere.close()
    assert find_engine(workspace) is None
    with pytest.raises(NotFoundError, match="nothing answers at"):
        require_engine(workspace)
    with pytest.raises(UsageError, match="another machine"):
        find_engine(create_workspace(str(tmp_path / "c"), 'offline: true\nserve: {url: "https://engine.example.com/v1"}\n'))
    with pytest.raises(UsageError, match="not ours to tune"):
        run_tune(workspace, show_progress, write=False)
    with pytest.raises(UsageError, match=r"serve\.url"):
        create_workspace(str(tmp_path / "d"), "serve: {url: localhost}\n")


def test_its_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(key="secret") as made:
        with pytest.raises(EndpointError, match="refuses the key"):
            find_engine(workspace_of(tmp_path / "a", made))
        workspace = workspace_of(tmp_path / "b", made, api_key_env="ENGINE_KEY")
        with pytest.raises(NotFoundError, match="no key"):
            find_engine(workspace)
        monkeypatch.setenv("ENGINE_KEY", "secret")
        engine = require_engine(workspace)
        assert engine_model(engine, "base").api_key == "secret" and "secret" not in engine.model_dump_json()

        async def listed() -> list[str]:
            async with opened(workspace, engine) as (client, _):
                return [row["id"] for row in (await client.get("/v1/models")).json()["data"]]

        assert "base" in asyncio.run(listed())


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function", "function": {"name": "f"}}]), ("response_format", {"type": "json_object"}), ("logprobs", True)],
)
def test_the_gateway_refuses_what_it_cannot(field: str, value: object, tmp_path: Path) -> None:
    with server("unknown", frozenset()) as made:
        workspace = workspace_of(tmp_path, made)
        engine = require_engine(workspace)
        before = len(made.bodies)
        answer = ask(workspace, engine, **{field: value})
        assert answer.status_code == 400 and error_of(answer)["param"] == field and len(made.bodies) == before
        assert ask(workspace, engine).status_code == 200


def test_an_adapter_takes_traffic_there_only_by_a_proof_made_there(elsewhere: Endpoint, tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, elsewhere)
    engine = require_engine(workspace).model_copy(update={"base_digest": "d" * 64})
    here, there = ({"engine": {"base_digest": "d" * 64, "precision": precision}} for precision in ("bfloat16", engine.precision))
    names = [register(workspace, "here", elsewhere, here, []), register(workspace, "there", elsewhere, there, [])]
    for name in names:
        elsewhere.listed[name] = ("/a/folder/of/theirs", "tiny")
    answers = [ask(workspace, engine, model=name) for name in names]
    assert [answer.status_code for answer in answers] == [404, 200] and "not proven" in error_of(answers[0])["message"]


def test_nothing_is_proven_where_no_prompt_can_be_scored(tmp_path: Path) -> None:
    with server("ollama", frozenset({"tools"})) as made:
        workspace = workspace_of(tmp_path, made)
        name = register(workspace, "a", made, None, [])
        with engine_for(workspace, print) as engine, pytest.raises(EngineError, match="ollama has no prompt_logprobs and no /tokenize"):
            prove(workspace, name, engine, print, show_progress)
        found = find_elsewhere(workspace)
        assert found is not None and found.base_digest == ""  # its weights are not here to be compared


def test_doctor_tells_what_it_can(elsewhere: Endpoint, tmp_path: Path) -> None:
    def line(workspace: Workspace) -> dict[str, str]:
        checks = setting_up.doctor(Namespace(workspace=str(workspace.root), set=[], json=True)).result["checks"]
        [found] = [check for check in checks if check["name"] == "engine"]
        assert not [check for check in checks if check["name"] == "server"]
        return found

    assert (line(workspace_of(tmp_path / "a", elsewhere))["status"], "vllm 0.32.0" in line(workspace_of(tmp_path / "a", elsewhere))["detail"]) == ("ok", True)
    with server("ollama", frozenset()) as made:
        assert line(workspace_of(tmp_path / "b", made))["status"] == "warn"
    elsewhere.close()
    assert line(workspace_of(tmp_path / "a", elsewhere))["status"] == "fail"
