"""Where the adapters of a run lie: below the set's folder, or where `store.location` says; `elsewhere.json` names it.

Each set that is begun gets a store under a name of its own, so that a worker left over from an earlier attempt, which
knows the store it was started for, can never write into a later one. The pointer moves with the folder, so that what
is superseded, updated or forgotten keeps finding its adapters. Every reader and writer of a run's store opens it here;
`pipeline/run.py` writes the pointer, and the joint stage another where it starts over. Sets made before there were
pointers have their store in the folder itself.

Stores outside the run are also on a list in its root: they outlive the folders that point to them.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from proper_ds.errors import StoreError
from proper_ds.files import sync_folder, write_json_atomic
from proper_ds.store.files import open_files
from proper_ds.store.store import AdapterStore

POINTER = "elsewhere.json"
STORES = "stores.jsonl"
IDENTITY = "store.json"
"""Stands in every store that a pointer names: where it is missing, so is the store."""


def location_of(store: Path | str) -> str | Path:
    """The place of a store: a path in the run, or a folder or fsspec URI outside of it.

    Args:
        store: a run's folder `store/<set>`, also one moved aside, or a location from `all_stores`.
    """
    if isinstance(store, str):
        return store
    found = _pointer_of(store)
    if "inside" in found:
        return store / str(found["inside"])
    return str(found["location"]) if found else store


def open_store(store: Path | str) -> AdapterStore:
    """The store of a run's folder `store/<set>`, or one from `all_stores`.

    Raises:
        StoreError: where it is not where it was: its disk is not mounted, or it was moved or deleted.
    """
    opened = AdapterStore(location_of(store))
    if isinstance(store, str) or _pointer_of(store):
        check_in_place(opened)
    return opened


def check_in_place(store: AdapterStore) -> None:
    """Raise StoreError where a store that a pointer named is not there any more: it must not pass for an empty one."""
    if store.files.exists(IDENTITY) or store.catalog.has_anything():  # or from before there were identities
        return
    raise StoreError(
        f"store {store.location} is not there: {IDENTITY} is missing. Mount its disk, or bring it back to where it was;"
        f" if it was deleted for good, take its line out of {STORES} in the run's folder, and move away the folder"
        f" below store/ or superseded/ whose {POINTER} names it"
    )


def all_stores(root: Path) -> list[Path | str]:
    """Every store of a run, for `open_store`: of sets, of those moved aside, and outside, pointed to or not."""
    folders = [*sorted(root.glob("store/*")), *sorted(root.glob("superseded/store-*"))]
    pointed = {str(location_of(folder)) for folder in folders}
    # a worker cut off may have committed just as its store was moved aside, and so made that folder again
    inside = [str(path) for folder in folders for path in sorted(folder.glob("adapters-*"))]
    left = [path for path in inside if path not in pointed and AdapterStore(path).catalog.has_anything()]
    return [*folders, *left, *(location for location in _listed(root) if location not in pointed)]


def point_to(folder: Path, location: str | None) -> None:
    """Decide where a set's adapters go, once: below `location` or below the folder, under a name of their own.

    Raises:
        StoreError: where the folder's adapters lie elsewhere already.
    """
    found = _pointer_of(folder)
    wanted = _absolute(location.rstrip("/")) if location is not None else None
    if "location" in found:
        parent = _absolute(str(found["location"])).rsplit("/", 1)[0]
        if parent != wanted:
            raise StoreError(
                f"store.location is {location}, but the adapters of {folder} lie in {parent}; put it back, or give"
                " another output_dir"
            )
        return
    held = AdapterStore(location_of(folder))
    if held.catalog.has_anything():
        if wanted is not None:
            raise StoreError(
                f"store.location is {location}, but {folder} holds adapters itself; remove store.location, or give"
                " another output_dir"
            )
        return
    if found and wanted is None:
        return
    _point_to_new(folder, wanted)


def start_over(folder: Path) -> None:
    """Give a set a new, empty store beside the one it has, where that one holds anything; nothing is deleted.

    For what is trained whole: adapters of a training that was broken off must not stand beside those of the next one.

    Raises:
        StoreError: where the store is not where it was.
    """
    if not open_store(folder).catalog.has_anything():
        return
    found = _pointer_of(folder)
    assert found, "a set that was begun has a pointer"
    _point_to_new(folder, str(found["location"]).rsplit("/", 1)[0] if "location" in found else None)


def _point_to_new(folder: Path, wanted: str | None) -> None:
    root, token = folder.parent.parent, uuid.uuid4().hex[:8]
    if wanted is None:
        name = f"adapters-{token}"
        _mark(folder / name)
        write_json_atomic(folder / POINTER, {"inside": name})
        return
    outside = f"{wanted}/{root.name}-{folder.name}-{token}"
    _mark(outside)
    _list(root, outside)
    write_json_atomic(folder / POINTER, {"location": outside})


def _pointer_of(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / POINTER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())


def _mark(location: str | Path) -> None:
    """The first file of a store; fails where it could not be written to later."""
    open_files(location).create(IDENTITY, json.dumps({"format": "proper_ds adapter store"}).encode())


def _listed(root: Path) -> list[str]:
    path = root / STORES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [str(json.loads(line)["location"]) for line in lines if line.endswith("}")]  # not one cut short


def _list(root: Path, location: str) -> None:
    with (root / STORES).open("a+b") as file:
        file.seek(0)
        start = b"" if file.read()[-1:] in (b"", b"\n") else b"\n"  # after a line cut short
        file.write(start + json.dumps({"location": location}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(root)
