"""Crashes between any two writes, writers that race, and what is left of a forgotten user: nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import StoreError
from proper_ds.store import files as layer
from proper_ds.store import rewrite
from proper_ds.store.catalog import Catalog
from proper_ds.store.store import AdapterStore
from tests.store.stores import LAYOUT, put, rows


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.fixture
def kill_after(monkeypatch):
    """`kill_after(n)`: the process dies at the n-th change of the disk from now on, or half-way through it."""
    state = {"left": None, "half": False}
    real = {name: getattr(layer.LocalFiles, name) for name in ("write", "create", "remove")}

    def step():
        if state["left"] is not None:
            state["left"] -= 1
            return state["left"] < 0
        return False

    def write(self, name, chunks):
        if step():
            if state["half"]:
                whole = b"".join(bytes(chunk) for chunk in chunks)
                real["write"](self, name, [whole[: len(whole) // 2]])
            raise Killed
        return real["write"](self, name, chunks)

    def create(self, name, data):
        if step():
            if state["half"]:
                real["write"](self, f"{name.rpartition('/')[0]}/.half.tmp", [data[: len(data) // 2]])
            raise Killed
        return real["create"](self, name, data)

    def remove(self, names):
        for name in names:
            if step():
                raise Killed
            real["remove"](self, [name])

    for name, function in (("write", write), ("create", create), ("remove", remove)):
        monkeypatch.setattr(layer.LocalFiles, name, function)

    def arm(steps, half=False):
        state.update(left=steps, half=half)

    return arm


def filled(folder):
    """A compacted snapshot, fragments on top of it in two versions, a rollback, and a pack of a unit cut short."""
    store = AdapterStore(folder)
    found = rows(12)
    for unit in range(3):
        put(store, f"unit-{unit}", {f"u{n}": found[n] for n in range(unit, 6, 3)})
    store.compact()
    put(store, "unit-0", {f"u{n}": found[6 + n] for n in (0, 3)}, version=2)
    put(store, "unit-9", {"w": found[9]}, {"bad": "loss is nan"})
    store.rollback("u3")
    (folder / "packs" / "unit-5@1-00000000.safetensors").write_bytes(b"cut short")
    return AdapterStore(folder)


def reading(folder, without=()):
    store = AdapterStore(folder)
    assert store.verify().bad == ()
    users = [user for user in store.users() if user not in without]
    units = {version: store.units(version) for version in (1, 2)}
    return {user: (store.get(user).tolist(), store.history(user)[-1].status) for user in users}, units


def until_it_is_through(kill_after, what):
    """Calls `what(n)` with a death after n = 0, 1, 2, ... changes until it lives."""
    for steps in range(100):
        for half in (False, True):
            kill_after(steps, half)
            try:
                if what(steps, half):
                    assert steps > 2, "it changed the disk in several steps"
                    return
            finally:
                kill_after(None)
    raise AssertionError("it never came through")


def test_a_death_anywhere_in_put_leaves_the_unit_done_or_not_done(tmp_path, kill_after):
    adapters = {"a": rows(1, 5)[0], "b": rows(1, 6)[0]}

    def one(steps, half):
        folder = tmp_path / f"{steps}-{half}"
        filled_store = filled_without_kill(folder, kill_after, steps, half)
        before = reading_safely(folder, kill_after)
        kill_after(steps, half)
        try:
            put(filled_store, "unit-7", adapters)
            alive = True
        except Killed:
            alive = False
        kill_after(None)
        after = reading(folder)
        if alive:
            return steps >= 2  # the pack and the fragment
        assert after == before
        assert put(AdapterStore(folder), "unit-7", adapters) > 0, "a resumed run puts it again"
        assert torch.equal(AdapterStore(folder).get("b"), adapters["b"])
        return False

    for steps in range(4):
        for half in (False, True):
            if one(steps, half):
                assert steps == 2
                return
    raise AssertionError("it never came through")


def filled_without_kill(folder, kill_after, *_):
    kill_after(None)
    return filled(folder)


def reading_safely(folder, kill_after):
    kill_after(None)
    return reading(folder)
