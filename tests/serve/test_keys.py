"""Keys: hashed at rest, checked at every request, limited by rate, scope and tenant; and where the gateway may listen."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.gateway.errors import Refused
from serve.gateway.limits import RateLimits
from serve.gateway.server import listen, tls_context
from serve.keys import KeyRing, create_key, keys_file, read_keys, revoke_key
from serve.supervise import free_port
from tests.scripted import scripted
from tests.serve.doors import TURNS, ask, engine_of, on_socket, through
from understudy.cli import main
from understudy.errors import EngineError, NotFoundError, StorageError, UsageError
from understudy.settings.serving import Gateway
from understudy.workspace import Workspace, create_workspace


def make(workspace: Workspace, name: str = "ada", tenant: str = "default", scopes: tuple[str, ...] = ("chat",), per_minute: int = 600, **more: Any) -> str:
    return create_key(workspace, name, tenant, list(scopes), per_minute, **more)[1]


def test_a_key_is_kept_as_its_hash_only_and_ends_when_it_is_revoked_or_expires(workspace: Workspace) -> None:
    now = [0.0]
    ring = KeyRing(keys_file(workspace), lambda: now[0])
    assert not ring.are_required
    text, short = make(workspace), make(workspace, "bob", days=1)
    assert text.split("-")[2] not in keys_file(workspace).read_text()
    found = ring.find(text)
    assert found is not None and found.name == "ada"
    assert ring.find(text[:-1] + ("0" if text[-1] != "0" else "1")) is None
    now[0] = read_keys(keys_file(workspace))[short.split("-")[1]].created_at + 86_399
    assert ring.find(short)
    now[0] += 2
    assert ring.find(short) is None
    revoke_key(workspace, "ada")
    revoke_key(workspace, "bob")
    assert ring.find(text) is None
    assert ring.are_required and KeyRing(keys_file(workspace)).are_required  # revoking the last one opens nothing
    keys_file(workspace).unlink()
    assert ring.are_required


@pytest.mark.parametrize("text", ["", "us", "us--", "us-00000000-" + "0" * 64, "a-b-c-d", "us-\x00-é", "x" * 10_000])
def test_what_is_no_key_opens_nothing(workspace: Workspace, text: str) -> None:
    make(workspace)
    assert KeyRing(keys_file(workspace)).find(text) is None


def test_names_scopes_and_files_that_cannot_be_are_refused(workspace: Workspace) -> None:
    make(workspace)
    for wrong in (
        {"name": "ada"},
        {"name": "b", "scopes": ("root",)},
        {"name": "b/c"},
        {"name": "b", "tenant": ""},
        {"name": "b", "per_minute": 0},
        *({"name": "b", "days": days} for days in (0, float("nan"), 1e300)),
    ):
        with pytest.raises(UsageError):
            make(workspace, **wrong)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        revoke_key(workspace, "nobody")
    keys_file(workspace).write_text('{"keys": [{}]}')
    with pytest.raises(StorageError):
        KeyRing(keys_file(workspace)).find("us-1-2")


def test_the_commands_make_list_and_revoke(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--workspace", str(workspace.root), "--json"]
    assert main([*root, "keys", "create", "ada", "--scope", "chat", "--scope", "rag", "--requests-per-minute", "9"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["scopes"], made["tenant"], made["requests_per_minute"]) == (["chat", "rag"], "default", 9)
    assert KeyRing(keys_file(workspace)).find(made["key"])
    assert main([*root, "keys", "revoke", made["id"]]) == 0
    assert main([*root, "keys", "ls"]) == 0
    listed = capsys.readouterr().out
    assert '"revoked_at": null' not in listed and "sha256" not in listed and made["key"] not in listed
    assert KeyRing(keys_file(workspace)).find(made["key"]) is None
    with pytest.raises(SystemExit) as usage:
        main([*root, "keys", "create", "ada", "--days", "nan"])
    assert usage.value.code == 2


def test_rates_are_refilled_as_time_passes() -> None:
    now = [0.0]
    rates = RateLimits(lambda: now[0])
    for _ in range(3):
        rates.take("a", 3)
    with pytest.raises(Refused) as caught:
        rates.take("a", 3)
    assert caught.value.retry_after == 20
    rates.take("b", 3)
    now[0] = 20.0
    rates.take("a", 3)
    with pytest.raises(Refused):
        rates.take("a", 3)


def test_requests_need_a_key_with_the_scope_and_stay_under_its_rate(workspace: Workspace) -> None:
    embeddings = make(workspace, "embed", scopes=("embeddings",))
    chat = make(workspace, "chat", per_minute=4)
    with scripted() as endpoint:
        engine = engine_of(endpoint)

        async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
            body = {"model": "base", "messages": TURNS}
            keys = ["", "Bearer nonsense", f"Basic {chat}", f"Bearer {embeddings}", *[f"Bearer {chat}"] * 5]
            answers = [await client.post("/v1/chat/completions", json=body, headers={"Authorization": key}) for key in keys]
            others = [await client.get(path, headers={"Authorization": f"Bearer {embeddings}"}) for path in ("/metrics", "/v1/models")]
            return [*answers, *others, await client.get("/openapi.json"), await client.get("/health")]

        answers = through(workspace, engine, use)
    assert [answer.status_code for answer in answers] == [401, 401, 401, 403, 200, 200, 200, 200, 429, 403, 200, 401, 200]
    assert answers[0].json()["error"]["code"] == "invalid_api_key" and answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[8].headers["retry-after"] == "15"
    assert [row["id"] for row in answers[10].json()["data"]] == ["all-minilm-l6-v2"]
    log = (workspace.logs / "gateway.jsonl").read_text()
    assert chat not in log and chat.split("-")[1] in log


def test_a_network_needs_a_key_even_if_there_was_none(workspace: Workspace) -> None:
    with scripted() as endpoint:
        answer = through(workspace, engine_of(endpoint), lambda client: client.get("/v1/models"), needs_key=True)
    assert answer.status_code == 401


def test_listening_beyond_loopback_without_a_key_is_refused(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "example.invalid"):
        with pytest.raises(UsageError, match="no key") as caught:
            listen(Workspace(tmp_path, *_config(host)))
        assert "keys create" in caught.value.remedy


def _config(host: str) -> Any:
    from understudy.config import Config

    return Config(gateway=Gateway(host=host, port=free_port("127.0.0.1"))), {}


def test_with_a_key_it_listens_and_a_taken_port_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    make(workspace)
    made = Workspace(workspace.root, *_config("0.0.0.0"))
    with listen(made), pytest.raises(EngineError, match="cannot listen") as caught:
        listen(made)
    assert "gateway.port=" in caught.value.remedy

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")  # tests may not ask for names

    monkeypatch.setattr("serve.gateway.server.socket.getaddrinfo", unknown)
    with pytest.raises(EngineError, match="not known") as caught:
        listen(made)
    assert "gateway.host" in caught.value.remedy


def test_tls_needs_a_pair_that_fits(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject], check=True, capture_output=True)
    made = create_workspace(str(tmp_path / "w"), f"gateway: {{tls_certificate: {certificate}, tls_key: {key}}}\n")
    with on_socket(made, None) as gateway:
        assert gateway.url.startswith("https://127.0.0.1:")
        health = gateway.url.removesuffix("/v1") + "/health"
        assert httpx.get(health, verify=ssl.create_default_context(cafile=str(certificate))).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(health.replace("https", "http"))
    for wrong, error in (((str(certificate), ""), UsageError), ((str(certificate), "/none"), NotFoundError), ((str(key), str(key)), UsageError)):
        with pytest.raises(error):
            tls_context(Gateway(tls_certificate=wrong[0], tls_key=wrong[1]))


def test_a_damaged_key_file_lets_nobody_in(workspace: Workspace) -> None:
    key = make(workspace)
    with scripted() as endpoint:
        keys_file(workspace).write_text("{")
        answer = ask(workspace, engine_of(endpoint), key=key)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert endpoint.bodies == []


def test_a_revoked_key_is_refused_at_once(workspace: Workspace) -> None:
    key = make(workspace)
    with scripted() as endpoint:
        engine = engine_of(endpoint)
        assert ask(workspace, engine, key=key).status_code == 200
        revoke_key(workspace, "ada")
        assert ask(workspace, engine, key=key).status_code == 401
