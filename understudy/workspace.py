"""A workspace is a folder: the configuration, and where everything lives in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.config import FILE_NAME, Config, load_config
from understudy.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from understudy.store import Store


@dataclass(frozen=True)
class Workspace:
    """Paths and settings of one workspace; the store opens on first use."""

    root: Path
    config: Config
    origins: dict[str, str]

    @cached_property
    def store(self) -> Store:
        """The record store named by the configuration."""
        from understudy.store import open_store

        return open_store(self.config.store, self.root)

    @property
    def models(self) -> Path:
        """models/NAME/: weights added with `understudy models add`."""
        return self.root / "models"

    @property
    def index(self) -> Path:
        """index/GENERATION/: immutable indexes, and the pointer to the live one."""
        return self.root / "index"

    @property
    def datasets(self) -> Path:
        """datasets/DIGEST/."""
        return self.root / "datasets"

    @property
    def adapters(self) -> Path:
        """adapters/NAME/DIGEST/."""
        return self.root / "adapters"

    @property
    def merged(self) -> Path:
        """merged/NAME@DIGEST/: adapters in their base's weights, to be served so; they can be made again."""
        return self.root / "merged"

    @property
    def runs(self) -> Path:
        """runs/DIGEST/: training checkpoints, until the adapter is whole."""
        return self.root / "runs"

    @property
    def releases(self) -> Path:
        """releases/ALIAS/: its releases, and what was decided about them."""
        return self.root / "releases"

    @property
    def cycles(self) -> Path:
        """cycles/NUMBER/: what each cycle did, stage by stage; and the frozen regression sets."""
        return self.root / "cycles"

    @property
    def reports(self) -> Path:
        """reports/NAME/: evaluations."""
        return self.root / "reports"

    @property
    def simulations(self) -> Path:
        """simulations/DIGEST/: what a teacher was asked and wrote, call by call, and the report."""
        return self.root / "simulations"

    @property
    def calibrations(self) -> Path:
        """calibrations/NAME/: of models without an adapter; an adapter's lies beside its weights."""
        return self.root / "calibrations"

    @property
    def logs(self) -> Path:
        """logs/: the engine's output."""
        return self.root / "logs"

    @property
    def engine_file(self) -> Path:
        """run/engine.json: where the running engine listens."""
        return self.root / "run" / "engine.json"

    def relative(self, path: Path) -> str:
        """A path as shown and stored: relative to the workspace where it lies inside."""
        try:
            return str(path.resolve().relative_to(self.root.resolve()))
        except ValueError:
            return str(path)


def workspace_root(argument: str | None) -> Path:
    """`--workspace`, else UNDERSTUDY_WORKSPACE, else ./workspace."""
    return Path(argument or os.environ.get("UNDERSTUDY_WORKSPACE") or "workspace")


def open_workspace(argument: str | None, overrides: list[str] | None = None) -> Workspace:
    """An existing workspace; raises NotFoundError where `understudy init` has not run."""
    root = workspace_root(argument)
    if not (root / FILE_NAME).is_file():
        raise NotFoundError(f"{root} is not a workspace", f"run `understudy --workspace {root} init`, or name another with --workspace")
    config, origins = load_config(root, overrides)
    return Workspace(root, config, origins)


def create_workspace(argument: str | None, settings: str = "") -> Workspace:
    """A new workspace with `settings` (YAML) as its file; an existing one is left as it is."""
    from understudy.files import write_text

    root = workspace_root(argument)
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file", "name another folder with --workspace")
    if not (root / FILE_NAME).exists():
        write_text(root / FILE_NAME, settings or "# Understudy workspace. `understudy config show` lists every setting.\n")
    return open_workspace(argument)
