"""The generated population: the same seed gives the same people, groups differ in taste, and it says what it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.generate import generate
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError

NUM_USERS, NUM_GROUPS = 120, 3


def make(out, seed=1, users=NUM_USERS, groups=NUM_GROUPS):
    for _ in generate(users, groups, seed, out):
        pass
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.json")}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    make(root / "raw")
    folders = sorted(str(path) for path in (root / "raw").iterdir())
    prepare(DataConfig(path=folders), root / "prepared")
    data = PreparedData(root / "prepared")
    return data, list(data.users())


def test_the_seed_decides_everything(tmp_path):
    one, same, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=2)
    assert one == same
    assert one.keys() == other.keys()
    assert one != other


def test_it_is_valid_lamp_data_without_leaks_and_says_that_it_is_generated(people):
    data, users = people
    assert {task.lamp_id for task in data.manifest.tasks.values()} == {"LaMP_2", "LaMP_3"}
    assert all(task.generated for task in data.manifest.tasks.values())
    assert all(name.startswith("generated_") for name in data.manifest.tasks)
    assert not any(data.manifest.set_aside.values())
    assert len(users) == NUM_USERS


def test_history_lengths_have_a_heavy_tail_and_some_users_are_cold(people):
    lengths = np.asarray([len(user.history) for user in people[1]])
    assert (lengths == 0).sum() >= 1
    assert np.median(lengths) < lengths.mean()
    assert lengths.max() > 4 * np.median(lengths)


def test_groups_differ_in_taste_and_users_deviate(people):
    """The number of a user modulo the number of groups is the true group."""
    tags = {user.key: Counter(i.answer for i in user.history if i.task == "generated_tags") for user in people[1]}
    by_group = [Counter() for _ in range(NUM_GROUPS)]
    for key, counts in tags.items():
        by_group[int(key.lstrip("g")) % NUM_GROUPS] += counts
    labels = sorted(set().union(*by_group))
    shares = np.asarray([[g[label] / g.total() for label in labels] for g in by_group])
    distances = [np.abs(shares[a] - shares[b]).sum() for a in range(NUM_GROUPS) for b in range(a)]
    assert min(distances) > 0.2


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(DataError):
        make(tmp_path, users=0)
