"""What a request may call a model, and what answers under that name. Names resolve to digests; only proven adapters take traffic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from serve.gateway.errors import Refused, paused, unavailable
from serve.gateway.routing import ReleaseBook
from serve.prove import MERGED_PROOF, PROOF
from serve.repeat import Repeated
from understudy.adapters import CONFIG, WEIGHTS, AdapterManifest, manifests, verify_adapter
from understudy.client import Model, StepModels, engine_model, remote_model, served_model
from understudy.config import Config
from understudy.engines import RunningEngine
from understudy.errors import NotFoundError, UnderstudyError
from understudy.files import read_json
from understudy.releases import ENGINE, Release
from understudy.workspace import Workspace

Listing = Mapping[str, tuple[str, str]]  # what the engine says it serves: name → (folder, base)


@dataclass(frozen=True)
class AgentModel:
    """The agent as a model: `rag`, or `rag:fast`, which writes while it thinks."""

    name: Literal["rag", "rag:fast"]

    @property
    def mode(self) -> Literal["agentic", "fast"]:
        """The agent's mode."""
        return "fast" if self.name == "rag:fast" else "agentic"


AGENTS = {"rag": AgentModel("rag"), "rag:fast": AgentModel("rag:fast")}


@dataclass(frozen=True)
class ServedAdapter:
    """A registered adapter of this base, and why it takes no traffic, where it does not."""

    manifest: AdapterManifest
    model: Model | None
    fault: str = ""

    def is_for(self, tenant: str) -> bool:
        """Whether a tenant may name it: it learnt from that tenant's answers, or from nobody's."""
        return not self.manifest.tenants or tenant in self.manifest.tenants


@dataclass(frozen=True)
class Catalogue:
    """What can be named at one moment."""

    engine: RunningEngine | None
    adapters: list[ServedAdapter]  # oldest first
    config: Config
    releases: ReleaseBook
    is_paused: bool = False

    def find(self, name: str, tenant: str) -> Model | AgentModel | StepModels:
        """What is behind a name: base (or its id), name@digest, an adapter's name for its newest proven one, an alias for its live release,
        rag, rag:fast, a remote.

        The one place where names get their meaning. Raises Refused.
        """
        if name in AGENTS:
            return AGENTS[name]
        if name in self.config.remotes:
            return self._remote(name)
        ours = self.config.models.base if self.engine is None else self.engine.base
        if name in ("base", ours):
            if self.engine is None:
                raise self._away()
            if self.engine.merged:
                raise Refused(404, "model_not_found", f"the base is not served: {self.engine.merged} is merged into it (serve.merge)", "model")
            return engine_model(self.engine, "base")
        if live := self.releases.live(name):
            return self.models_of(live, tenant)
        wanted, _, digest = name.partition("@")
        known = [each for each in self.adapters if each.is_for(tenant) and each.manifest.name == wanted and each.manifest.digest.startswith(digest)]
        if found := next((each.model for each in reversed(known) if each.model), None):
            return found
        if known and self.engine is None:
            raise self._away()
        why = f": {known[-1].fault}" if known else ""
        raise Refused(404, "model_not_found", f"the model `{name[:100]}` does not exist or may not be used{why}", "model")

    def answering(self, tenant: str) -> Model:
        """The model that the agent asks for a tenant: the newest adapter that may take its traffic, else the base. Raises Refused."""
        newest = next((each.model for each in reversed(self.adapters) if each.model and each.is_for(tenant)), None)
        found = newest or self.find("base", tenant)
        assert isinstance(found, Model)
        return found

    def models_of(self, release: Release, tenant: str) -> StepModels:
        """The models of a release. Raises Refused where one takes no traffic, or none of this tenant's: another never takes its place."""
        if release.endpoint != ENGINE:
            return replace(StepModels.alike(self._remote(release.endpoint)), release=release.name)
        models = {step: self._served(release, adapter, tenant) for step, adapter in release.adapters.items()}
        return StepModels(models["answer"], models["plan"], models["validate"], release.name)

    def _served(self, release: Release, adapter: str, tenant: str) -> Model:
        if self.engine is None:
            raise self._away()
        if adapter == "base":
            return engine_model(self.engine, "base")
        known = next((each for each in self.adapters if each.manifest.served_name == adapter), None)
        if known is not None and not known.is_for(tenant):
            raise Refused(404, "model_not_found", f"the model `{release.alias}` does not exist or may not be used", "model")
        if known is None or known.model is None:
            why = known.fault if known else "it is not registered for the engine's base"
            raise Refused(503, "release_unavailable", f"{release.name} cannot answer: {adapter}: {why}")
        return known.model

    def names(self, tenant: str, scopes: frozenset[str]) -> list[str]:
        """Every name that this tenant may use within these scopes."""
        found = []
        if "chat" in scopes and self.engine:
            found = [*([] if self.engine.merged else ["base"]), *(each.model.name for each in self.adapters if each.model and each.is_for(tenant))]
            found += [alias for alias in self.releases.aliases() if self._is_answered(alias, tenant)]
        if "rag" in scopes:
            found += AGENTS
        if "embeddings" in scopes:
            found.append(self.config.models.embedder)
        if "remotes" in scopes and not self.config.offline:
            found += self.config.remotes
        return found

    def _away(self) -> Refused:
        return paused() if self.is_paused else unavailable("the engine")

    def _is_answered(self, alias: str, tenant: str) -> bool:
        try:
            return isinstance(self.find(alias, tenant), StepModels)
        except UnderstudyError:
            return False

    def _remote(self, name: str) -> Model:
        if name not in self.config.remotes:
            raise Refused(503, "release_unavailable", f"{name} is no configured remote any more")
        if self.config.offline:
            raise Refused(403, "offline", f"{name} is a remote, and this workspace is offline", "model")
        try:
            return remote_model(name, self.config.remotes[name])
        except NotFoundError as error:
            raise Refused(503, "remote_without_key", f"the gateway has no key for {name}") from error


def read_catalogue(
    workspace: Workspace, engine: RunningEngine | None, listing: Listing, releases: ReleaseBook, repeated: Repeated, is_paused: bool = False
) -> Catalogue:
    """What the engine serves of the registry, each adapter with what keeps it from traffic."""
    adapters = []
    for manifest, folder in manifests(workspace):
        if engine is None:  # known, so that their names are not called unknown while it is away
            adapters.append(ServedAdapter(manifest, None))
        elif manifest.served_name == engine.merged or (manifest.served_base_digest == engine.base_digest and not engine.merged):
            fault = find_fault(manifest, folder, engine, listing) or repeated.fault(engine, manifest.served_name, proof_file(folder, engine))
            model = None if fault else served_model(engine, manifest.served_name, manifest.served_name)
            adapters.append(ServedAdapter(manifest, model, fault))
    return Catalogue(engine, adapters, workspace.config, releases, is_paused)


def find_fault(manifest: AdapterManifest, folder: Path, engine: RunningEngine, listing: Listing) -> str:
    """What keeps an adapter from traffic; empty where nothing does."""
    name = manifest.served_name
    if name not in listing:
        return "the engine has not loaded it; restart `understudy serve`"
    root, parent = listing[name]
    is_elsewhere = engine.capabilities is not None  # its folders are not ours to compare
    if not engine.merged and (parent != engine.base or not (is_elsewhere or Path(root).resolve() == folder.resolve())):
        return "the engine loaded something else under its name; restart `understudy serve`"
    if not _is_intact(folder, _stamp(folder)):
        return "its files are not those of its digest"
    proof = _read_proof(proof_file(folder, engine))
    about = {"precision": "bfloat16", **proof.get("engine", {})}
    if proof.get("digest") != manifest.digest or (about.get("base_digest"), about["precision"]) != (engine.base_digest, engine.precision):
        return f"it is not proven; run `understudy prove {name}`"
    if proof.get("passed") is True:
        return ""
    return "its proof is undecided: the dataset has too few rows" if proof.get("verdict") == "undecided" else "its proof failed"


def proof_file(folder: Path, engine: RunningEngine) -> Path:
    """The proof of an adapter that is about the way in which this engine serves it."""
    return folder / (MERGED_PROOF if engine.merged else PROOF)


def _read_proof(file: Path) -> dict[str, Any]:
    try:
        proof = read_json(file)
    except UnderstudyError:
        return {}
    return proof if isinstance(proof, dict) else {}


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when one of the adapter's files does."""
    return tuple(os.stat(folder / name).st_mtime_ns if (folder / name).exists() else 0 for name in (WEIGHTS, CONFIG, "manifest.json"))


@lru_cache(maxsize=1024)
def _is_intact(folder: Path, _stamp: tuple[int, ...]) -> bool:
    """Whether the files are those of the digest; read once until they change."""
    try:
        verify_adapter(folder)
    except (UnderstudyError, ValidationError, OSError):
        return False
    return True
