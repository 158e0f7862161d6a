"""A set's folder points to where its adapters lie; the pointer is written once and followed by all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from proper_ds.errors import StoreError
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.store.config import StoreConfig
from proper_ds.store.elsewhere import (
    POINTER,
    STORES,
    all_stores,
    check_in_place,
    location_of,
    open_store,
    point_to,
    start_over,
)
from proper_ds.store.store import AdapterStore

LAYOUT = LoraLayout((ModuleShape("layers.0.q", 4, 3),), 2, 4.0)


def put(store):
    store.put_unit("unit-0", {"ann": torch.ones(14)}, {}, {"ann": (1, [1.0])}, LAYOUT, "float32")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run/store/OPPU"
    path.mkdir(parents=True)
    return path


def moved_aside(folder):
    """What a run of other settings does."""
    target = folder.parent.parent / "superseded/store-OPPU-20260101-000000-000000000"
    target.parent.mkdir()
    folder.rename(target)
    folder.mkdir()
    return target


def keys_in(root):
    return sorted(user for each in all_stores(root) for user in open_store(each).users())


def test_without_a_location_adapters_lie_below_the_folder_and_move_with_it(folder, tmp_path):
    point_to(folder, None)
    point_to(folder, None)
    assert Path(location_of(folder)).parent == folder
    put(open_store(folder))
    with pytest.raises(StoreError, match="holds adapters itself"):
        point_to(folder, str(tmp_path / "elsewhere"))
    moved = moved_aside(folder)
    assert torch.equal(open_store(moved).get("ann"), torch.ones(14))


def test_a_worker_left_over_writes_into_its_own_store_only(folder):
    """Its store was moved aside, with other settings another one is filled; it comes too late."""
    point_to(folder, None)
    late = open_store(folder)
    check_in_place(late)
    moved_aside(folder)
    point_to(folder, None)
    with pytest.raises(StoreError, match="is not there"):
        check_in_place(late)
    put(late)  # it looked a moment before
    assert open_store(folder).units() == set()
    assert not open_store(folder).users()
    assert keys_in(folder.parent.parent) == ["ann"], "forgetting reaches it"


def test_a_set_from_before_there_were_pointers_is_read_where_it_is(folder):
    put(AdapterStore(folder))
    point_to(folder, None)
    assert location_of(folder) == folder
    assert open_store(folder).users() == ["ann"]


def test_adapters_go_elsewhere_and_are_found_again_after_a_move(folder, tmp_path):
    point_to(folder, str(tmp_path / "elsewhere"))
    point_to(folder, str(tmp_path / "elsewhere/"))
    put(open_store(folder))
    assert [path.name for path in folder.iterdir()] == [POINTER]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    moved = moved_aside(folder)
    assert torch.equal(open_store(moved).get("ann"), torch.ones(14))
    point_to(folder, str(tmp_path / "elsewhere"))
    assert not open_store(folder).users()


def test_a_relative_location_is_the_same_from_every_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    point_to(folder, "elsewhere")
    put(open_store(folder))
    monkeypatch.chdir("/")
    assert open_store(folder).users() == ["ann"]
    point_to(folder, str(tmp_path / "elsewhere"))


def test_another_location_is_refused(folder):
    point_to(folder, "memory://a/b")
    put(open_store(folder))
    assert open_store(folder).users() == ["ann"]
    for other in ("memory://a/c", None):
        with pytest.raises(StoreError, match=r"lie in memory://a/b; put it back"):
            point_to(folder, other)


def test_a_store_whose_disk_is_not_mounted_is_no_empty_store(folder, tmp_path):
    point_to(folder, str(tmp_path / "elsewhere"))
    put(open_store(folder))
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StoreError, match=r"store\.json is missing\. Mount its disk"):
        open_store(folder)
    with pytest.raises(StoreError, match="Mount its disk"):
        keys_in(folder.parent.parent)
    (tmp_path / "elsewhere").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "elsewhere")
    assert open_store(folder).users() == ["ann"]


def test_stores_elsewhere_are_known_without_the_folders_that_pointed_to_them(folder, tmp_path):
    root = folder.parent.parent
    point_to(folder, str(tmp_path / "elsewhere"))
    put(open_store(folder))
    aside = moved_aside(folder)
    point_to(folder, str(tmp_path / "elsewhere"))
    assert len(all_stores(root)) == 2
    shutil.rmtree(aside)
    with (root / STORES).open("a") as file:
        file.write('{"location": "/cut sh')
    assert len(all_stores(root)) == 2
    assert keys_in(root) == ["ann"]
    moved_aside_again = root / "superseded/store-OPPU-20260102-000000-000000000"
    folder.rename(moved_aside_again)
    folder.mkdir()
    point_to(folder, str(tmp_path / "elsewhere"))
    shutil.rmtree(root / "superseded")
    assert len(all_stores(root)) == 3


@pytest.mark.parametrize("location", [None, "elsewhere"])
def test_a_set_that_starts_over_has_an_empty_store_and_the_old_one_is_still_known(folder, tmp_path, location):
    location = location and str(tmp_path / location)
    point_to(folder, location)
    before = location_of(folder)
    start_over(folder)
    assert location_of(folder) == before, "nothing was there to be left behind"
    put(open_store(folder))
    start_over(folder)
    assert location_of(folder) != before
    assert Path(location_of(folder)).parent == Path(before).parent
    assert not open_store(folder).users()
    point_to(folder, location)
    assert keys_in(folder.parent.parent) == ["ann"], "so that it can be forgotten"


def test_memory_is_no_place_for_a_run():
    with pytest.raises(ValidationError, match="give a folder, s3:// or gs://"):
        StoreConfig(location="memory://a")
