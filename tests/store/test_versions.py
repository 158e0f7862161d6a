"""Versions: any sequence of puts, rollbacks, compactions and forgettings reads as a plain dict would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proper_ds.errors import StoreError
from proper_ds.store.store import AdapterStore
from tests.store.stores import LAYOUT, put, rows

USERS = [f"user-{number}" for number in range(6)]
NUM_UNITS = 3
BY_UNIT = {f"unit-{number}": USERS[number::NUM_UNITS] for number in range(NUM_UNITS)}


class StoreMachine(RuleBasedStateMachine):
    """The store beside a dict: by user, the rows by version and what is current."""

    folder = None

    @initialize()
    def open(self):
        self.store = AdapterStore(self.make_location())
        self.rows, self.current, self.units, self.forgotten, self.events = {}, {}, set(), set(), {}

    @rule(
        unit=st.sampled_from(sorted(BY_UNIT)),
        version=st.integers(1, 4),
        rank=st.sampled_from([1, 2]),
        seed=st.integers(0, 99),
        failed=st.booleans(),
    )
    def put(self, unit, version, rank, seed, failed):
        users = [user for user in BY_UNIT[unit] if user not in self.forgotten]
        found = rows(len(users), seed, LAYOUT.with_rank(rank))
        failures = {users[-1]: "loss is nan"} if failed and users else {}
        adapters = {user: row_P for user, row_P in zip(users, found, strict=True) if user not in failures}
        put(self.store, unit, adapters, failures, version=version, digests=dict.fromkeys(adapters, "ab"))
        if (unit, version) in self.units:
            return  # the first commit stands
        self.units.add((unit, version))
        for user in users:
            self.events[user] = self.events.get(user, 0) + 1
        for user, row_P in adapters.items():
            if version > max(self.rows.get(user, {0: 0})):
                self.current[user] = version
            self.rows.setdefault(user, {})[version] = row_P

    @rule(user=st.sampled_from(USERS), version=st.integers(0, 4))
    def rollback(self, user, version):
        held = self.rows.get(user, {})
        if version == 0:
            version = max((v for v in held if v < self.current.get(user, 0)), default=0)
            wanted = None
        else:
            wanted = version
        if version not in held:
            with pytest.raises(StoreError):
                self.store.rollback(user, wanted)
            return
        assert self.store.rollback(user, wanted).version == version
        self.events[user] += version != self.current[user]
        self.current[user] = version

    @rule()
    def compact(self):
        self.store.compact()
        assert len(self.store.catalog.listing("fragments")) == 0
        assert len(self.store.files.listing("packs")) <= 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def forget(self, data):
        users = data.draw(st.lists(st.sampled_from(USERS), max_size=2, unique=True))
        known = [user for user in users if user in self.events]
        report = self.store.forget(users)
        assert report.num_users == len(known)
        assert report.num_rows == sum(len(self.rows.get(user, {})) for user in users)
        for user in users:
            for held in (self.rows, self.current, self.events):
                held.pop(user, None)
            self.forgotten.add(user)

    @rule()
    def reopen(self):
        self.store = AdapterStore(self.store.location)

    @invariant()
    def reads_as_the_dict(self):
        if not hasattr(self, "store"):
            return
        assert sorted(self.store.users()) == sorted(self.rows)
        assert set(self.store.failures()) == {user for user in self.events if user not in self.rows}
        for user, versions in self.rows.items():
            entry = self.store.entry(user)
            assert entry.version == self.current[user]
            assert torch.equal(self.store.get_exact(user)[0], versions[entry.version])
            assert entry.digest == "ab"
        for user in USERS:
            assert len(self.store.history(user)) == self.events.get(user, 0)
            assert self.store.has(user) == (user in self.rows)
        for version in range(1, 5):
            assert self.store.units(version) == {unit for unit, held in self.units if held == version}
        assert self.store.last_version() == max((version for _, version in self.units), default=0)
        assert self.store.verify().bad == ()


class LocalMachine(StoreMachine):
    def make_location(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        return self.folder.name

    def teardown(self):
        if self.folder is not None:
            self.folder.cleanup()


class MemoryMachine(StoreMachine):
    def make_location(self):
        import uuid

        return f"memory://store-{uuid.uuid4().hex}"

    def teardown(self):
        from fsspec.implementations.memory import MemoryFileSystem

        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


TestLocal = LocalMachine.TestCase
TestMemory = MemoryMachine.TestCase
TestLocal.settings = TestMemory.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_history_tells_of_versions_and_rollbacks(tmp_path):
    store = AdapterStore(tmp_path)
    first, second, third = rows(3)
    put(store, "unit-0", {"u": first})
    put(store, "unit-0", {"u": second}, version=2)
    assert torch.equal(store.get("u"), second)
    assert store.rollback("u").version == 1
    assert torch.equal(AdapterStore(tmp_path).get("u"), first)
    with pytest.raises(StoreError, match="no version before 1; stored are 1, 2, current is 1"):
        store.rollback("u")
    with pytest.raises(StoreError, match="no version 7; stored are 1, 2"):
        store.rollback("u", 7)
    assert store.rollback("u", 2).version == 2
    put(store, "unit-0", {"u": third}, version=3)
    assert torch.equal(AdapterStore(tmp_path).get("u"), third), "a new version outweighs earlier rollbacks"
    seen = [(entry.status, entry.version) for entry in store.history("u")]
    assert seen == [("stored", 1), ("stored", 2), ("rollback", 1), ("rollback", 2), ("stored", 3)]


def test_a_failed_update_keeps_the_adapter(tmp_path):
    store = AdapterStore(tmp_path)
    put(store, "unit-0", {"u": rows(1)[0]})
    put(store, "unit-0", {}, {"u": "loss is nan"}, version=2)
    assert store.entry("u").version == 1
    assert store.failures() == {}
    assert [entry.reason for entry in store.history("u")] == ["", "loss is nan"]


def test_two_rollbacks_at_the_same_moment_cannot_both_win(tmp_path, monkeypatch):
    first, second, third = (AdapterStore(tmp_path) for _ in range(3))
    for version in (1, 2, 3):
        put(first, "unit-0", {"u": rows(1, version)[0]}, version=version)
    real = second.catalog.commit_rollback

    def after_another(entry):
        assert third.rollback("u", 1).version == 1
        return real(entry)

    monkeypatch.setattr(second.catalog, "commit_rollback", after_another)
    with pytest.raises(StoreError, match="somebody else at the same moment"):
        second.rollback("u", 2)
    assert AdapterStore(tmp_path).entry("u").version == 1
