"""The actors' job: commits without users forgotten meanwhile or whose adapter is damaged; reads the catalog once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proper_ds.config import RunConfig
from proper_ds.data.forgotten import Forgotten
from proper_ds.errors import BusyError, StoreError
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import Decision, Failure, FailurePolicy
from proper_ds.run_folder import RunFolder
from proper_ds.store.catalog import Catalog
from proper_ds.store.elsewhere import open_store, point_to
from proper_ds.training import unit_jobs
from proper_ds.training.set_plan import _file
from proper_ds.training.users import UserResult
from tests.store.stores import LAYOUT, put, rows

KEYS = ["ann", "bob", "cleo", "dora"]
UNIT = Unit(0, 4, 10, "store/OPPU", 4)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """`job(version)`: a job of a night that trains everybody, its model left out; training adds 1 to each start."""
    folder = RunFolder(tmp_path)
    place = folder.stage("store/OPPU")

    def train(model, layout, tasks, settings, seed, counters, start):
        during()
        build.settings = settings
        made = [task.start_P + 1 if task.start_P is not None else rows(1)[0] for task in tasks]
        return [UserResult(t.key, row_P, "", [2.0, 1.0], 3) for t, row_P in zip(tasks, made, strict=True)]

    def during():
        build.during()

    monkeypatch.setattr(unit_jobs, "train_users", train)
    monkeypatch.setattr(unit_jobs, "num_history", lambda tokens: np.ones(4, dtype=int))

    def build(version):
        place.begin(f"night {version}", {"version": version, "settings": build.settings_of_set}, update=True)
        point_to(place.path, None)
        np.save(place.path / _file(version), np.ones(4, dtype=bool))
        made = unit_jobs.UsersJob.__new__(unit_jobs.UsersJob)
        tokens = SimpleNamespace(history_digests=lambda start, stop: [f"0{n}" for n in range(start, stop)])
        config = RunConfig(output_dir=str(tmp_path), adapter_sets={"OPPU": {"min_steps": 7}})
        made._config, context = config, SimpleNamespace(config=config, keys=KEYS, tokens=tokens)
        made._lanes = SimpleNamespace(folder=folder, enter=lambda stage: context)
        made._model = SimpleNamespace(attach_groups=lambda by_module, dropout: None)
        made._layout, made._levels, made._features, made._sets, made._by_role = LAYOUT, {}, {}, {}, {}
        made._locations = {"store/OPPU": str(open_store(place.path).location)}
        made._task = lambda context, user, level, start_P: SimpleNamespace(
            key=KEYS[user], start_P=start_P, examples=[SimpleNamespace(ids=[0] * 10)] * (user + 1)
        )
        return made

    build.folder, build.root, build.during = place.path, tmp_path, lambda: None
    build.settings_of_set = {}
    return build


def test_who_was_forgotten_during_training_is_not_stored(job):
    job.during = lambda: Forgotten.read(job.root).add(["bob"], job.root)
    report = job(1).run(UNIT)
    store = open_store(job.folder)
    assert store.users() == ["ann", "cleo", "dora"]
    assert not store.history("bob")
    assert store.units() == {UNIT.name}
    assert report["num_users"] == 3


def test_a_set_is_trained_with_its_own_settings(job):
    job(1).run(UNIT)
    assert job.settings == RunConfig(output_dir="x", user={"min_steps": 7}).user


def test_a_unit_says_how_much_of_it_was_for_whom(job, monkeypatch):
    """Two steps each; a user's items of one batch make an epoch, so users took 20, 40, 60 and 80 tokens."""
    masks = {"asked": [1, 0, 0, 1], "merged": [0, 1, 0, 0]}
    monkeypatch.setattr(unit_jobs, "users_of_role", lambda context, role: np.asarray(masks[role], dtype=bool))
    assert job(1).run(UNIT)["shares"] == {}, "everybody is trained"
    job.settings_of_set = {"splits": ["train", "dev"], "num_anchors": 1}
    assert job(2).run(UNIT)["shares"] == {"asked": pytest.approx(0.5), "merged": pytest.approx(0.2)}


def test_one_damaged_adapter_fails_its_user_alone_and_for_this_night_only(job):
    job(1).run(UNIT)
    store = open_store(job.folder)
    (pack,) = (store.location / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1  # of dora, the last one
    pack.write_bytes(data)
    report = job(2).run(UNIT)
    assert (report["num_users"], report["num_failed"], report["num_warm"]) == (3, 1, 3)
    store.refresh()
    newest = store.history("dora")[-1]
    assert (newest.version, newest.status, newest.digest) == (2, "failed", "")
    assert "the adapter to start from cannot be read: pack " in newest.reason
    assert store.entry("dora").version == 1
    assert torch.equal(store.get("ann"), rows(1)[0] + 1)


def test_a_worker_left_over_does_not_store_once_its_set_was_moved_aside(job):
    late = job(1)
    job.during = lambda: job.folder.rename(job.root / "elsewhere")
    with pytest.raises(StoreError, match="is not there"):
        late.run(UNIT)
    assert not job.folder.exists()


def test_a_catalog_is_read_once_a_job_and_no_listing_grows_with_the_units(job, monkeypatch):
    job(1).run(UNIT)
    for n in range(3):
        put(open_store(job.folder), f"unit-x{n}", {f"x{n}": rows(1)[0]})
    loads, folders = [], []
    load, listing = Catalog.load, Catalog.listing
    monkeypatch.setattr(Catalog, "load", lambda self: loads.append(1) or load(self))
    monkeypatch.setattr(Catalog, "listing", lambda self, name: folders.append(name) or listing(self, name))
    made = job(2)
    made.run(Unit(0, 2, 5, "store/OPPU", 2))
    num_fragment_listings = folders.count("fragments")
    for unit in (Unit(2, 3, 5, "store/OPPU", 1), Unit(3, 4, 5, "store/OPPU", 1)):
        assert made.run(unit)["num_warm"] == 1
        assert made.run(unit)["num_users"] == 0, "it is committed"
    assert len(loads) == 1
    assert folders.count("fragments") == num_fragment_listings


def test_a_catalog_that_changes_all_the_time_is_tried_again():
    error = BusyError("catalog changes faster than it can be read")
    assert FailurePolicy(1).decide(Failure("unit", error, 1)) is Decision.RETRY
