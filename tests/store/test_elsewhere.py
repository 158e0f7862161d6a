"""A run's folder may point to where its adapters lie; the pointer is written once and followed by all."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from proper_ds.errors import StoreError
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.store.config import StoreConfig
from proper_ds.store.elsewhere import POINTER, location_of, open_store, point_to

LAYOUT = LoraLayout((ModuleShape("layers.0.q", 4, 3),), 2, 4.0)


def put(store):
    store.put_unit("unit-0", {"ann": torch.ones(14)}, {}, {"ann": (1, [1.0])}, LAYOUT, "float32")


def test_without_a_location_adapters_lie_in_the_runs_folder(tmp_path):
    folder = tmp_path / "run/store/OPPU"
    folder.mkdir(parents=True)
    point_to(folder, None)
    assert location_of(folder) == folder
    put(open_store(folder))
    with pytest.raises(StoreError, match="holds adapters itself"):
        point_to(folder, str(tmp_path / "elsewhere"))


def test_adapters_go_elsewhere_and_are_found_again_after_a_move(tmp_path):
    folder = tmp_path / "run/store/OPPU"
    folder.mkdir(parents=True)
    point_to(folder, str(tmp_path / "elsewhere"))
    point_to(folder, str(tmp_path / "elsewhere/"))
    put(open_store(folder))
    assert [path.name for path in folder.iterdir()] == [POINTER]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    moved = tmp_path / "run/superseded/store-OPPU"
    moved.parent.mkdir()
    folder.rename(moved)
    assert torch.equal(open_store(moved).get("ann"), torch.ones(14))
    folder.mkdir()
    point_to(folder, str(tmp_path / "elsewhere"))
    assert not open_store(folder).users()


def test_another_location_is_refused(tmp_path):
    folder = tmp_path / "run/store/OPPU"
    folder.mkdir(parents=True)
    point_to(folder, "memory://a/b")
    put(open_store(folder))
    assert open_store(folder).users() == ["ann"]
    for other in ("memory://a/c", None):
        with pytest.raises(StoreError, match=r"lie in memory://a/b; put it back"):
            point_to(folder, other)


def test_memory_is_no_place_for_a_run():
    with pytest.raises(ValidationError, match="one process only"):
        StoreConfig(location="memory://a")
