"""The vLLM engine: its command, its adapters, and starting it. Everything it serves is found by digest in the workspace."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from serve.arguments import DEFAULT_RANK, LOOPBACK, NOT_INHERITED, EngineSpec, ServedAdapter, build_command, build_environment, find_device
from serve.supervise import Engine, spawn, wait_until_healthy
from understudy.adapters import is_served, manifests
from understudy.chat import closed_template
from understudy.engines import RunningEngine
from understudy.errors import AdapterError, EngineError, NotFoundError
from understudy.files import read_json, write_json, write_text
from understudy.models import CARD, model_path, weights_digest
from understudy.workspace import Workspace


def plan_engine(workspace: Workspace, port: int | None = None) -> EngineSpec:
    """The engine that this workspace needs now: its base, and every adapter made for it."""
    settings = workspace.config.serve
    path, base, digest = served_base(workspace)
    adapters = registered_adapters(workspace, digest)
    rank = settings.max_lora_rank or max([DEFAULT_RANK, *(adapter.rank for adapter in adapters)])
    return EngineSpec(path, base, digest, adapters, settings, LOOPBACK, port or settings.port, find_device(), rank)


def with_closed_template(spec: EngineSpec, file: Path) -> EngineSpec:
    """The spec with the chat template of training, written to `file`, where that is not the base's own. Raises EngineError.

    Templates that never speak of thinking are not looked at further: transformers and torch take seconds to import.
    """
    sources = [spec.base_path / name for name in ("chat_template.jinja", "tokenizer_config.json")]  # where transformers keeps a template
    if not any(source.is_file() and b"think" in source.read_bytes() for source in sources):
        return spec
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        template = closed_template(AutoTokenizer.from_pretrained(str(spec.base_path), local_files_only=True))
    except (OSError, ValueError, TemplateError) as error:
        raise EngineError(f"the chat template of {spec.base} cannot be used: {error}", "check it with `understudy models ls`") from error
    if template is None:
        return spec
    write_text(file, template)
    return replace(spec, chat_template=file)


def start_engine(spec: EngineSpec, log_file: Path, on_progress: Callable[[str], None], engine_file: Path | None = None) -> Engine:
    """Start the engine, wait until it is healthy, and announce it in `engine_file`. A context manager that stops it.

    The engine ends with this process, however this process ends. Raises EngineError, with nothing left running.
    """
    spec = with_closed_template(spec, log_file.with_name("chat_template.jinja"))
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    engine = spawn(build_command(spec), {**inherited, **build_environment(spec)}, spec.host, spec.port, log_file)
    try:
        wait_until_healthy(engine, spec.url, spec.settings.start_seconds, on_progress)
        names = served_models(spec.url)
        missing = {spec.merged or spec.base, *(adapter.name for adapter in spec.adapters)} - names.keys()
        if missing:
            raise EngineError(f"the engine came up without {', '.join(sorted(missing))}", f"see {log_file}")
        engine.running = RunningEngine(
            url=spec.url, pid=engine.pid, base=spec.base, base_digest=spec.base_digest, models=list(names), precision=spec.precision, merged=spec.merged
        )
        if engine_file is not None:
            write_json(engine_file, engine.running.model_dump())
            engine.engine_file = engine_file
    except BaseException:
        engine.stop()
        raise
    return engine


def served_models(url: str) -> dict[str, tuple[str, str]]:
    """Name → (root, parent) of everything that the endpoint serves; an adapter's root is its folder, its parent the base."""
    answer = httpx.get(f"{url}/models", timeout=10)
    answer.raise_for_status()
    return {row["id"]: (row.get("root") or "", row.get("parent") or "") for row in answer.json()["data"]}


def load_adapter(url: str, adapter: ServedAdapter) -> None:
    """Load an adapter into a running engine and check that it is listed as what it is. One that is there already is left.

    Raises AdapterError when the engine refuses it, or lists something else under its name.
    """
    folder = str(adapter.path.resolve())
    try:
        listed = served_models(url)
        if adapter.name not in listed:
            answer = httpx.post(f"{url}/load_lora_adapter", json={"lora_name": adapter.name, "lora_path": folder}, timeout=300)
            if answer.is_error:
                raise AdapterError(
                    f"the engine refuses {adapter.name}: {_reason(answer)}", "understudy adapters verify; a rank above serve.max_lora_rank needs a restart"
                )
            listed = served_models(url)
    except httpx.HTTPError as error:
        raise AdapterError(f"cannot load {adapter.name} into {url}: {error!r}", "see logs/engine.log") from error
    base = next(iter(listed))  # vLLM lists the base first
    if listed.get(adapter.name) != (folder, base):
        raise AdapterError(f"the engine lists {adapter.name} as {listed.get(adapter.name)}, not as {folder} on {base}", "restart the engine")


def unload_adapter(url: str, name: str) -> None:
    """Take an adapter out of a running engine. Raises AdapterError when the engine refuses, or still lists it."""
    try:
        answer = httpx.post(f"{url}/unload_lora_adapter", json={"lora_name": name}, timeout=300)
        still_there = not answer.is_error and name in served_models(url)
    except httpx.HTTPError as error:
        raise AdapterError(f"cannot unload {name} from {url}: {error!r}", "see logs/engine.log") from error
    if answer.is_error or still_there:
        raise AdapterError(f"the engine keeps {name}: {_reason(answer)}", "restart the engine")


def registered_adapters(workspace: Workspace, base_digest: str) -> list[ServedAdapter]:
    """The workspace's adapters that vLLM can apply and that must be served on exactly these weights, oldest first."""
    found = [(m, folder) for m, folder in manifests(workspace) if is_served(m.method) and m.served_base_digest == base_digest]
    return [ServedAdapter(manifest.served_name, folder, manifest.rank) for manifest, folder in found]


def served_base(workspace: Workspace) -> tuple[Path, str, str]:
    """(folder, id, weights digest) of the weights to serve: the ones that the newest adapter of the configured base was trained for.

    A QLoRA run's are its base's dequantised NF4 weights, kept in models/ by `train`. Raises NotFoundError where they are missing.
    """
    path = model_path(workspace, workspace.config.models.base)
    card = read_json(path / CARD) if (path / CARD).exists() else {}
    base = str(card.get("id", path.name))
    ours = [manifest for manifest, _ in manifests(workspace) if is_served(manifest.method) and manifest.base == base]
    digest = weights_digest(path)
    if not ours or ours[-1].served_base_digest == digest:
        return path, base, digest
    wanted = ours[-1].served_base_digest
    for folder in sorted(workspace.models.iterdir()):
        if (folder / "config.json").is_file() and weights_digest(folder) == wanted:
            return folder, base, wanted
    raise NotFoundError(
        f"the weights that {ours[-1].served_name} must be served on ({wanted[:12]}) are not in {workspace.models}", "train again, or restore models/"
    )


def _reason(answer: httpx.Response) -> str:
    """vLLM's error message, shortened."""
    try:
        body = answer.json()
        message = body["error"]["message"] if "error" in body else body["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return " ".join(str(message).split())[:300]
