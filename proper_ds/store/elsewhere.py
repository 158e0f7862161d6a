"""Where the adapters of a run lie: in the run's own folder, or where its `elsewhere.json` says.

The pointer moves with the folder, so that what is superseded, updated or forgotten keeps finding its adapters. Every
reader and writer of a run's store opens it here; `pipeline/run.py` writes the pointer.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from proper_ds.errors import StoreError
from proper_ds.files import write_json_atomic
from proper_ds.store.store import AdapterStore

POINTER = "elsewhere.json"


def location_of(folder: Path) -> str | Path:
    """The store of a run's folder `store/<set>`: a path or an fsspec URI."""
    path = folder / POINTER
    if not path.exists():
        return folder
    found: str = json.loads(path.read_text(encoding="utf-8"))["location"]
    return found


def open_store(folder: Path) -> AdapterStore:
    """The store of a run's folder `store/<set>`, wherever it lies."""
    return AdapterStore(location_of(folder))


def point_to(folder: Path, location: str | None) -> None:
    """Decide where a set's adapters go, once: below `location`, under a name of their own, or in the folder itself.

    Raises:
        StoreError: where the folder's adapters lie elsewhere already.
    """
    held = location_of(folder)
    parent = str(held).rsplit("/", 1)[0]
    if isinstance(held, str):
        if location is None or parent != location.rstrip("/"):
            raise StoreError(
                f"store.location is {location}, but the adapters of {folder} lie in {parent}; put it back, or give"
                " another output_dir"
            )
    elif location is not None:
        if AdapterStore(folder).catalog.has_anything():
            raise StoreError(
                f"store.location is {location}, but {folder} holds adapters itself; remove store.location, or give"
                " another output_dir"
            )
        name = f"{folder.parent.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
        write_json_atomic(folder / POINTER, {"location": f"{location.rstrip('/')}/{name}"})
