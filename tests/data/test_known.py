"""What a run knows before it prepares: forgotten users stay out, known ones keep their places, words stay the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.config import DataConfig
from proper_ds.data.forgotten import FORGOTTEN, Forgotten, tombstone
from proper_ds.data.prepare import Known, prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.problems import NOW_HISTORY
from proper_ds.errors import DataError
from tests.fakes import write_json


def write(folder, users, item="old"):
    profile = [{"id": "h", "text": f"{item} film", "score": "2"}]
    questions = [
        {"id": f"q{user}", "user_id": user, "input": f"1 to 5? review: {user}", "profile": profile} for user in users
    ]
    write_json(folder / "dev_questions.json", questions)
    golds = [{"id": f"q{user}", "output": "3"} for user in users]
    write_json(folder / "dev_outputs.json", {"task": "LaMP_3", "golds": golds})
    return DataConfig(path=str(folder), train_split="dev")


def test_known_users_come_first_whatever_the_data_says(tmp_path):
    config = write(tmp_path / "in", ["new", "b", "a"])
    known = Known(users=["a", "gone", "b"], instructions={"LaMP_3": "Rate: "})
    manifest = prepare(config, tmp_path / "out", known=known)
    data = PreparedData(tmp_path / "out")
    assert data.keys() == ["a", "gone", "b", "new"]
    users = list(data.users())
    assert [len(user.history) for user in users] == [1, 0, 1, 1]
    assert (manifest.num_users, manifest.num_empty, manifest.num_cold_users) == (4, 1, 0)
    assert manifest.tasks["LaMP_3"].instruction == "Rate: "


def test_forgotten_users_are_left_out_without_complaint(tmp_path):
    config = write(tmp_path / "in", ["a", "b", "c"])
    forgotten = Forgotten.read(tmp_path)
    forgotten.add(["b"], tmp_path)
    manifest = prepare(config, tmp_path / "out", known=Known(forgotten=Forgotten.read(tmp_path)))
    assert PreparedData(tmp_path / "out").keys() == ["a", "c"]
    assert manifest.num_forgotten == 1
    assert manifest.set_aside == {NOW_HISTORY: 0}
    assert "b" not in json.loads((tmp_path / FORGOTTEN).read_text())["hashes"]


def test_given_prepared_data_is_read_without_them(tmp_path):
    prepare(write(tmp_path / "in", ["a", "b", "c"]), tmp_path / "out")
    forgotten = Forgotten.read(tmp_path)
    forgotten.add(["b"], tmp_path)
    data = PreparedData(tmp_path / "out", forgotten)
    assert data.keys() == ["a", tombstone(1), "c"]
    assert [user.key for user in data.users()] == data.keys()
    assert [user.key for user in data.users(1, 2)] == [tombstone(1)]
    assert not next(data.users(1, 2)).history


def test_a_damaged_list_stops_everything(tmp_path):
    (tmp_path / FORGOTTEN).write_text("{")
    with pytest.raises(DataError, match="it keeps forgotten users out"):
        Forgotten.read(tmp_path)


@given(st.sets(st.text(min_size=1), max_size=8), st.text(min_size=1))
def test_the_list_knows_exactly_those_it_was_given(tmp_path_factory, keys, other):
    root = tmp_path_factory.mktemp("list")
    Forgotten.read(root).add(sorted(keys), root)
    again = Forgotten.read(root)
    assert all(again.has(key) for key in keys)
    assert again.has(other) == (other in keys)
