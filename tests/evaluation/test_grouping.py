"""Agreement of groups with the true ones: against scikit-learn, and from gates to the report's numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from proper_ds.data.generate import generate
from proper_ds.evaluation.grouping import (
    adjusted_rand_index,
    grouping_of,
    k_means,
    normalized_mutual_information,
    read_truth,
)
from tests.conftest import REPO

labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40)


@given(labels)
def test_both_measures_are_those_of_scikit_learn(pairs):
    one, other = (np.asarray(column) for column in zip(*pairs, strict=True))
    assert adjusted_rand_index(one, other) == pytest.approx(adjusted_rand_score(one, other), abs=1e-12)
    expected = normalized_mutual_info_score(one, other)
    assert normalized_mutual_information(one, other) == pytest.approx(expected, abs=1e-9)


def test_names_of_groups_do_not_matter_and_chance_is_zero():
    truth = np.repeat([0, 1, 2], 50)
    assert adjusted_rand_index(truth, (truth + 7) * 3) == 1
    shuffled = np.random.default_rng(0).permutation(truth)
    assert abs(adjusted_rand_index(truth, shuffled)) < 0.05


def test_k_means_finds_clusters_that_lie_apart():
    generator = np.random.default_rng(1)
    truth = np.repeat(np.arange(4), 25)
    points = np.eye(4)[truth] + generator.normal(0, 0.1, (100, 4))
    assert adjusted_rand_index(truth, k_means(points, 4, seed=0)) == 1
    assert set(k_means(np.zeros((5, 2)), 3, seed=0)) == {0}


def test_gates_that_follow_the_groups_are_told_from_those_that_do_not(tmp_path):
    list(generate(12, 3, 1, tmp_path))
    truth = read_truth([str(tmp_path / "generated_tags"), str(tmp_path / "generated_ratings")])
    assert truth["g0000004"] == 1
    assert len(truth) == 12
    keys = sorted(truth)
    groups = np.asarray([truth[key] for key in keys])
    follow = np.stack([np.eye(3)[groups]] * 2, axis=1)
    one_for_all = np.tile(np.asarray([0.6, 0.3, 0.1]), (12, 2, 1))
    found = grouping_of({"proper": (keys, follow), "group": (keys, one_for_all)}, truth)
    assert found["proper"]["strongest"]["adjusted_rand_index"] == 1
    assert found["proper"]["k_means"]["adjusted_rand_index"] == 1
    assert found["group"]["strongest"]["adjusted_rand_index"] == 0
    assert grouping_of({"proper": (["unknown"], follow[:1])}, truth) == {}


def test_only_the_report_reads_the_true_groups():
    readers = {path.name for path in (REPO / "proper_ds").rglob("*.py") if "TRUTH" in path.read_text(encoding="utf-8")}
    named = {path.name for path in (REPO / "proper_ds").rglob("*.py") if "groups.json" in path.read_text()}
    assert readers == {"generate.py", "grouping.py"}
    assert named == {"generate.py"}
