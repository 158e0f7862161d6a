"""A second night: new data comes in, and only the users it concerns are trained, from where they were."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from proper_ds.config import load_config
from proper_ds.data.prepared import PreparedData
from proper_ds.fleet.plan import Unit
from proper_ds.observe.metrics import read_events
from proper_ds.store.elsewhere import open_store
from proper_ds.training.unit_jobs import UsersJob
from tests.end_to_end.nights import FOLDERS, add_user, lengthen
from tests.end_to_end.runs import proper_ds, write_run
from tests.end_to_end.test_kill import Driver, wait_for

SETS = ("OPPU", "proper", "proper-released")
UPDATE = "user.only_changed=true"
NEWCOMER = "aaa-newcomer"
SHARED = ("base", "population", "group/proper", "group/proper-released", "router/proper", "router/proper-released")


@dataclass(frozen=True)
class Night:
    """A finished run, and what its second night brought."""

    yaml: Path
    folder: Path
    before: Path
    changed: list[str]
    output: str


def twin_of(finished, root: Path) -> Path:
    """A copy of a finished run and its data; the YAML of the copy."""
    shutil.copytree(finished.data, root / "data")
    shutil.copytree(finished.folder, root / "run")
    return write_run(root / "run", root / "data")


def next_day(data: Path, folder: Path) -> list[str]:
    """New data: some users did something more, and somebody new came. Returns all of them."""
    users = list(PreparedData(folder / "prepared").users())
    warm = [user.key for user in users if user.history]
    asked = [user.key for user in users if user.history and any(query.split == "dev" for query in user.queries)]
    changed = [*warm[::6], asked[0]]
    lengthen(data, changed)
    add_user(data, asked[2], NEWCOMER)
    return sorted({*changed, NEWCOMER})


@pytest.fixture(scope="module")
def night(finished, tmp_path_factory) -> Night:
    root = tmp_path_factory.mktemp("nightly")
    yaml = twin_of(finished, root)
    changed = next_day(root / "data", root / "run")
    return Night(yaml, root / "run", finished.folder, changed, proper_ds("run", yaml, UPDATE))


def test_only_users_with_new_data_get_a_new_version(night):
    for name in SETS:
        then, now = (open_store(run / "store" / name) for run in (night.before, night.folder))
        assert sorted(now.users()) == sorted([*then.users(), NEWCOMER])
        assert sorted(user for user in now.users() if now.entry(user).version == 2) == night.changed
        kept = [user for user in then.users() if user not in night.changed]
        assert len(kept) > 20
        assert then.get_many(kept).equal(now.get_many(kept))


def tasks_of(folder: Path, yaml: Path, user: str, monkeypatch):
    """What the job of actors asks to have trained for one user, if it were that user's turn."""

    class AskedError(Exception):
        pass

    def ask(model, layout, tasks, *settings):
        raise AskedError(tasks)

    monkeypatch.setattr("proper_ds.training.unit_jobs.train_users", ask)
    config = load_config(yaml).model_copy(update={"output_dir": str(folder)})
    index = PreparedData(folder / "prepared").keys().index(user)
    stores = {"store/OPPU": str(open_store(folder / "store/OPPU").location)}
    with pytest.raises(AskedError) as asked:
        UsersJob(config, torch.device("cpu"), stores).run(Unit(index, index + 1, 1, "store/OPPU", 1))
    return asked.value.args[0]


def test_training_goes_on_from_the_last_version(night, monkeypatch):
    user = next(user for user in night.changed if user != NEWCOMER)
    (first,) = tasks_of(night.before, night.yaml, user, monkeypatch)
    assert first.initial_row_P is None
    (again,) = tasks_of(night.folder, night.yaml, user, monkeypatch)
    store = open_store(night.folder / "store/OPPU")
    assert [entry.version for entry in store.history(user)] == [1, 2]
    assert again.initial_row_P.equal(store.get(user))
    assert len(again.examples) == len(first.examples) + 2, "one more item in each task"


def test_shared_stages_are_kept_and_said_to_be(night):
    report = json.loads((night.folder / "report.json").read_text())
    assert tuple(report["kept"]) == SHARED
    for name in SHARED:
        done = json.loads((night.before / name / "done.json").read_text())
        assert json.loads((night.folder / name / "done.json").read_text()) == done
        assert report["kept"][name] == done["finished"]
        assert f"{name}: kept as it was made on {done['finished']}" in night.output
    assert "of version 2" in (night.folder / "report.md").read_text()
    assert "of version 2" in (night.folder / "report.html").read_text()


def test_users_keep_their_places(night):
    then, now = (PreparedData(run / "prepared").keys() for run in (night.before, night.folder))
    assert now == [*then, NEWCOMER]


def test_features_of_unchanged_histories_are_taken_over(night):
    events, _ = read_events(night.folder / "metrics.jsonl")
    second = [e for e in events if e["stage"] == "features" and "unit" in e][len(events_of_features(night.before)) :]
    num_warm = len(open_store(night.before / "store/OPPU").users())
    assert sum(event["num_taken"] for event in second) == num_warm - (len(night.changed) - 1)


def events_of_features(run: Path):
    events, _ = read_events(run / "metrics.jsonl")
    return [event for event in events if event["stage"] == "features" and "unit" in event]


def test_without_new_data_nothing_is_done(night):
    before, _ = read_events(night.folder / "metrics.jsonl")
    again = proper_ds("run", night.yaml, UPDATE)
    after, _ = read_events(night.folder / "metrics.jsonl")
    assert after == before
    assert "user: done already" in again


def test_changed_settings_are_refused_by_name(night):
    refused = proper_ds("run", night.yaml, UPDATE, "user.lora.r=2", "group.learning_rate=1e-5", expect=2)
    assert "user.lora.r: 2, but store/OPPU was made with 4" in refused
    assert "group.learning_rate: 1e-05, but group/proper was made with 0.003" in refused


def test_new_questions_alone_train_nobody(finished, tmp_path):
    yaml = twin_of(finished, tmp_path)
    for name in FOLDERS:
        path = tmp_path / "data" / name / "dev_questions.json"
        golds = path.with_name("dev_outputs.json")
        dropped = json.loads(path.read_text())
        path.write_text(json.dumps(dropped[1:]))
        left = json.loads(golds.read_text())
        left["golds"] = [gold for gold in left["golds"] if gold["id"] != dropped[0]["id"]]
        golds.write_text(json.dumps(left))
    told = proper_ds("run", yaml, UPDATE, "--steps", "prepare,tokens,features,user")
    assert "user: no history changed, so no adapter is trained" in told
    for name in SETS:
        assert open_store(tmp_path / "run/store" / name).last_version() == 1


def test_a_night_cut_short_ends_as_an_undisturbed_one(night, finished, tmp_path):
    yaml = twin_of(finished, tmp_path)
    assert next_day(tmp_path / "data", tmp_path / "run") == night.changed
    run = tmp_path / "run"

    def num_units() -> int:
        return sum(len(open_store(run / "store" / name).units(2)) for name in SETS)

    steps = ("--steps", "prepare,tokens,features,user")
    with Driver(yaml, tmp_path / "driver.log", (UPDATE, *steps)) as driver:
        wait_for(num_units, "the first unit of the new version")
        assert driver.end(signal.SIGKILL) == -signal.SIGKILL
    committed = num_units()
    proper_ds("run", yaml, UPDATE, *steps)
    assert 0 < committed < num_units(), "the kill came too late: nothing was tested"
    for name in SETS:
        whole, killed = open_store(night.folder / "store" / name), open_store(run / "store" / name)
        users = whole.users()
        assert sorted(killed.users()) == sorted(users)
        assert whole.get_many(users).equal(killed.get_many(users))
