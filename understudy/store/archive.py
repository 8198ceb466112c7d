"""A store's records as one file: a zip of an SQLite store and a manifest with the digests of everything in it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.digests import digest_of_file
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import sync_file, sync_folder
from understudy.progress import Progress
from understudy.records import SCHEMA_VERSION
from understudy.store import Store, open_store
from understudy.store.copying import copy_store, digest_store
from understudy.store.urls import resolve_url

RECORDS, MANIFEST = "store.db", "manifest.json"


def back_up(store: Store, path: Path, progress: Callable[[str, int], Progress]) -> dict[str, dict[str, object]]:
    """Write every record of a store into a new file; {collection: {count, sha256}}.

    The file is there whole or not at all. Raises UsageError where there is one already, StorageError where it cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} is there already", "name a new file")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            scratch = Path(folder)
            copy = open_store(f"sqlite:///{RECORDS}", scratch)
            digests = copy_store(store, copy, progress)
            copy.close()
            manifest = {"schema_version": SCHEMA_VERSION, "created_at": time.time(), "sha256": digest_of_file(scratch / RECORDS), "collections": digests}
            with zipfile.ZipFile(scratch / "archive", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(MANIFEST, json.dumps(manifest, indent=2))
                archive.write(scratch / RECORDS, RECORDS)
            sync_file(scratch / "archive")
            (scratch / "archive").rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free space or fix the folder's permissions") from error
    return digests


def restore(path: Path, url: str, root: Path, progress: Callable[[str, int], Progress]) -> dict[str, dict[str, object]]:
    """Bring the records of a backup into the empty store behind a URL; {collection: {count, sha256}}.

    An SQLite store gets all of them or none. On MongoDB an interrupted restore is finished by the next.
    Raises NotFoundError, StorageError where the file is damaged, UsageError where the store holds other records.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", "check the path")
    resolved = resolve_url(url)
    place = root / resolved.removeprefix("sqlite:///") if resolved.startswith("sqlite:") else None
    with tempfile.TemporaryDirectory(prefix=".restore.", dir=place.parent if place else root) as folder:
        scratch = Path(folder)
        expected = _unpack(path, scratch)
        unpacked = open_store(f"sqlite:///{RECORDS}", scratch)
        try:
            if digest_store(unpacked, progress) != expected:
                raise StorageError(f"{path} does not hold the records that its manifest names", "take another backup")
            target = open_store(url, root)
            try:
                if place is None:
                    return copy_store(unpacked, target, progress)
                if target.tenants():
                    raise UsageError("the store holds records already", "restore into an empty store: name another with --set store=…")
            finally:
                target.close()
        finally:
            unpacked.close()
        sync_file(scratch / RECORDS)
        if place.with_name(f"{place.name}-wal").exists():
            raise StorageError(f"another process uses {place.name}", "end it, then run the command again")
        (scratch / RECORDS).replace(place)
        sync_folder(place.parent)
    return expected


def _unpack(path: Path, folder: Path) -> dict[str, dict[str, object]]:
    """Take the SQLite file out of an archive; the digests that its manifest gives. Raises StorageError where it is not what it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
            with archive.open(RECORDS) as packed, (folder / RECORDS).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        digests: dict[str, dict[str, object]] = manifest["collections"]
        if manifest["schema_version"] == SCHEMA_VERSION and digest_of_file(folder / RECORDS) == manifest["sha256"]:
            return digests
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise StorageError(f"{path} is not a whole backup: {error}", "take another backup") from error
    raise StorageError(f"{path} is damaged, or of another version", "take another backup")
