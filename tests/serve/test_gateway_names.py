"""What a name means at the gateway: adapters once they are proven, remotes with their keys, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scripted import Endpoint, scripted, status
from tests.serve.doors import BASE, TURNS, ask, engine_of, through
from tests.serve.test_gateway import error_of
from understudy.adapters import AdapterManifest, adapter_digest
from understudy.commands.wiring import resolve
from understudy.errors import NotFoundError, UsageError
from understudy.files import write_json
from understudy.settings.serving import Endpoint as Remote
from understudy.workspace import Workspace


def register(workspace: Workspace, name: str, endpoint: Endpoint, proof: dict[str, Any] | None, tenants: list[str], created_at: float = 1.0) -> str:
    """An adapter that the scripted server lists; returns its served name."""
    scratch = workspace.root / "scratch"
    scratch.mkdir()
    (scratch / "adapter_model.safetensors").write_bytes(name.encode())
    (scratch / "adapter_config.json").write_text("{}")
    digest = adapter_digest(scratch, "d" * 64)
    folder = workspace.adapters / name / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch.rename(folder)
    manifest = AdapterManifest(
        name=name, digest=digest, base=BASE, base_digest="b", served_base_digest="d" * 64, quantisation="nf4", tokenizer_digest="", chat_template_digest="",
        prompt_version="", dataset_digest="", recipe={}, seed=0, rank=8, alpha=16, targets=[], packages={}, metrics={}, tenants=tenants, group_ids=[],
        question_digests=[], created_at=created_at,
    )  # fmt: skip
    write_json(folder / "manifest.json", manifest.model_dump())
    if proof is not None:
        write_json(folder / "proof.json", {"digest": digest, "passed": True, "engine": {"base_digest": "d" * 64}, **proof})
    endpoint.listed[manifest.served_name] = (str(folder), BASE)
    return manifest.served_name


def test_only_a_proven_adapter_takes_traffic(workspace: Workspace, endpoint: Endpoint) -> None:
    engine = engine_of(endpoint)
    right = register(workspace, "right", endpoint, {}, ["default"])
    newer = register(workspace, "newer", endpoint, {}, [], created_at=2.0)
    wrong = {
        register(workspace, "unproven", endpoint, None, []): "not proven",
        register(workspace, "failed", endpoint, {"passed": False}, []): "failed",
        register(workspace, "undecided", endpoint, {"passed": False, "verdict": "undecided"}, []): "too few rows",
        register(workspace, "elsewhere", endpoint, {"engine": {"base_digest": "e"}}, []): "not proven",
        register(workspace, "coarse", endpoint, {"engine": {"base_digest": "d" * 64, "precision": "fp8"}}, []): "not proven",
        register(workspace, "borrowed", endpoint, {"digest": "f" * 64}, []): "not proven",
        register(workspace, "stale", endpoint, {}, []): "something else",
        register(workspace, "absent", endpoint, {}, []): "not loaded",
        register(workspace, "tampered", endpoint, {}, []): "files are not those",
        register(workspace, "foreign", endpoint, {}, ["other"]): "may not be used",
    }
    named = {name.partition("@")[0]: name for name in wrong}
    endpoint.listed[named["stale"]] = (endpoint.listed[right][0], BASE)
    del endpoint.listed[named["absent"]]
    (Path(endpoint.listed[named["tampered"]][0]) / "adapter_model.safetensors").write_bytes(b"flipped")

    async def send_all(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
        names = [right, "right", right[: len("right@") + 4], "newer", *wrong]
        answers = {name: await client.post("/v1/chat/completions", json={"model": name, "messages": TURNS}) for name in names}
        return {**answers, "models": await client.get("/v1/models")}

    answers = through(workspace, engine, send_all)
    assert [row["id"] for row in answers["models"].json()["data"]] == ["base", right, newer, "rag", "rag:fast", "all-minilm-l6-v2"]
    for name, why in wrong.items():
        assert answers[name].status_code == 404 and why in answers[name].json()["error"]["message"], name
        assert name in error_of(answers[name])["message"]
    assert "other" not in answers[named["foreign"]].text
    assert [body["model"] for body in endpoint.bodies] == [right, right, right, newer]


def test_a_proof_counts_from_the_moment_it_is_there(workspace: Workspace, endpoint: Endpoint) -> None:
    name = register(workspace, "right", endpoint, None, [])
    folder = Path(endpoint.listed[name][0])

    async def use(client: httpx.AsyncClient) -> list[int]:
        asked = [await client.post("/v1/chat/completions", json={"model": name, "messages": TURNS})]
        write_json(folder / "proof.json", {"digest": folder.name, "passed": True, "engine": {"base_digest": "d" * 64}})
        return [answer.status_code for answer in [*asked, await client.post("/v1/chat/completions", json={"model": name, "messages": TURNS})]]

    assert through(workspace, engine_of(endpoint), use) == [404, 200]


def test_an_engine_that_came_up_since_must_repeat_the_proof(workspace: Workspace, endpoint: Endpoint) -> None:
    sample = {"ids": [7, 8, 9], "completion": 1, "adapter": [-0.1, -0.2], "base": [-3.0, -4.0]}
    name = register(workspace, "right", endpoint, {"measured": {"sample": sample}}, [])

    def scoring(first: float, second: float) -> Any:
        entries = [None, {"8": {"logprob": first}}, {"9": {"logprob": second}}]
        return lambda handler: handler.send(200, {"choices": [{"prompt_logprobs": entries}]})

    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/v1/chat/completions", json={"model": name, "messages": TURNS}) for _ in range(2)]

    for figures, seen in (((-2.9, -4.2), 404), ((-0.2, -0.1), 200)):
        endpoint.bodies, endpoint.faults = [], [scoring(*figures)]
        answers = through(workspace, engine_of(endpoint), use)
        assert [answer.status_code for answer in answers] == [seen, seen]
        assert endpoint.bodies[0]["prompt"] == [7, 8, 9] and len(endpoint.bodies) == (1 if seen == 404 else 3)  # asked once an engine
        assert seen == 200 or "does not repeat its proof" in error_of(answers[0])["message"]
    for fault, seen in ((status(400), 404), (status(503), 503)):  # a refusal of the row stands; an engine that is away is asked again
        endpoint.faults = [fault]
        assert ask(workspace, engine_of(endpoint), model=name).status_code == seen
    assert "proof_not_repeated" in (workspace.logs / "gateway.jsonl").read_text()


def test_a_merged_adapter_is_all_there_is_once_it_is_proven_so(workspace: Workspace, endpoint: Endpoint) -> None:
    name = register(workspace, "lone", endpoint, {}, ["default"])
    folder = Path(endpoint.listed[name][0])
    endpoint.listed = {name: (str(workspace.merged / name), "")}
    engine = engine_of(endpoint, merged=name, base_digest="m" * 64, models=[name])
    del endpoint.listed[BASE]
    assert "not proven" in error_of(ask(workspace, engine, model=name))["message"]  # the proof beside its base is none of this
    proof = {"digest": folder.name, "passed": True, "engine": {"base_digest": "m" * 64, "precision": "bfloat16"}}
    write_json(folder / "proof-merged.json", proof)

    async def send_all(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = [await client.post("/v1/chat/completions", json={"model": model, "messages": TURNS}) for model in (name, "base")]
        return [*asked, await client.get("/v1/models")]

    answered, refused, models = through(workspace, engine, send_all)
    assert (answered.status_code, endpoint.bodies[-1]["model"]) == (200, name)
    assert refused.status_code == 404 and "merged into it" in error_of(refused)["message"]
    assert next(row["id"] for row in models.json()["data"]) == name
    with pytest.raises(NotFoundError, match="merged"):
        resolve(workspace, "base", engine)


def test_a_manifest_that_breaks_takes_no_other_models_traffic_away(workspace: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.names.FRESH_SECONDS", 0.0)
    right = register(workspace, "right", endpoint, {}, [])
    broken = register(workspace, "broken", endpoint, {}, [])

    async def use(client: httpx.AsyncClient) -> list[int]:
        body = {"model": "right", "messages": TURNS}
        before = await client.post("/v1/chat/completions", json=body)
        (Path(endpoint.listed[broken][0]) / "manifest.json").write_text('{"name": "broken"}')
        await client.get("/v1/models")
        return [before.status_code, (await client.post("/v1/chat/completions", json=body)).status_code]

    assert through(workspace, engine_of(endpoint), use) == [200, 200]
    assert [body["model"] for body in endpoint.bodies] == [right, right]
    assert "manifest.json" in (workspace.logs / "gateway.jsonl").read_text()


def test_an_engine_that_is_too_busy_to_list_its_models_keeps_its_traffic(workspace: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.names.FRESH_SECONDS", 0.0)
    monkeypatch.setattr("serve.gateway.names.LISTING_SECONDS", 0.05)

    async def use(client: httpx.AsyncClient) -> list[int]:
        body = {"model": "base", "messages": TURNS}
        answers = [await client.post("/v1/chat/completions", json=body)]
        endpoint.listing_seconds = 0.2
        answers += [await client.get("/ready"), await client.post("/v1/chat/completions", json=body)]
        return [answer.status_code for answer in answers]

    assert through(workspace, engine_of(endpoint), use) == [200, 200, 200]


def with_remote(workspace: Workspace, remote: Endpoint, **settings: Any) -> Workspace:
    remotes = {"far": Remote(base_url=remote.model.base_url, model="far-model", api_key_env="TEST_FAR_KEY")}
    return replace(workspace, config=workspace.config.model_copy(update={"remotes": remotes, **settings}))


def test_a_remote_is_asked_with_its_own_key_and_never_shows_it(workspace: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_FAR_KEY", "sk-secret")
    with scripted() as far:
        far.faults = [status(400, "key sk-secret is odd"), status(401, "bad key sk-secret")]
        made = with_remote(workspace, far)
        answers = [ask(made, engine_of(endpoint), model="far", seed=1) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [400, 502, 200]
        assert far.keys == ["Bearer sk-secret"] * 3 and far.bodies[0]["model"] == "far-model"
        assert "sk-secret" not in "".join(answer.text for answer in answers) + (workspace.logs / "gateway.jsonl").read_text()
        monkeypatch.delenv("TEST_FAR_KEY")
        assert error_of(ask(made, engine_of(endpoint), model="far"))["code"] == "remote_without_key"
    assert endpoint.bodies == []


def test_offline_refuses_every_remote(workspace: Workspace, endpoint: Endpoint) -> None:
    made = with_remote(workspace, endpoint, offline=True)
    answer = ask(made, engine_of(endpoint), model="far")
    assert answer.status_code == 403 and error_of(answer)["code"] == "offline"
    models = through(made, engine_of(endpoint), lambda client: client.get("/v1/models"))
    assert "far" not in [row["id"] for row in models.json()["data"]]
    with pytest.raises(UsageError, match="offline"):
        resolve(made, "far", None)  # as every command that answers does
    assert endpoint.bodies == []
