"""Feature files: what is written by unit is read by user and item, and statistics cover the chosen users only."""

from __future__ import annotations

import numpy as np
import torch

from proper_ds.model.user_vectors import PRIOR_ITEMS, UserEncoder, pooled
from proper_ds.training.features import FeatureData, is_written, write_features
from proper_ds.training.group_inputs import all_blocks

COUNTS = ([2, 0, 3], [1, 4])


def digests_of(users, counts):
    return [f"{user:032x}" if count else "" for user, count in zip(users, counts, strict=True)]


def write_all(folder):
    generator = torch.Generator().manual_seed(1)
    items, first = [], 0
    for counts in COUNTS:
        made = torch.randn(sum(counts), 5, generator=generator)
        write_features(folder, first, counts, made, digests_of(range(first, first + len(counts)), counts))
        items += list(made.split(counts))
        first += len(counts)
    return items


def test_users_and_items_are_found_across_units(tmp_path):
    items = write_all(tmp_path)
    data = FeatureData(tmp_path)
    assert data.feature_size == 5
    for user, wanted in enumerate(items):
        total, count = data.user(user)
        assert count == len(wanted)
        torch.testing.assert_close(total, wanted.sum(0))
        assert data.items(user).equal(wanted)
    assert is_written(tmp_path, 0)
    assert is_written(tmp_path, 3)
    assert not is_written(tmp_path, 1)


def test_statistics_are_over_the_chosen_users_with_history(tmp_path):
    items = write_all(tmp_path)
    chosen = np.asarray([True, True, False, True, True])
    mean, std = FeatureData(tmp_path).mean_and_std(chosen)
    wanted = torch.stack([items[user].sum(0) / (len(items[user]) + PRIOR_ITEMS) for user in (0, 3, 4)])
    torch.testing.assert_close(mean, wanted.mean(0))
    torch.testing.assert_close(std, wanted.std(0, correction=0))


def test_blocks_of_all_users_at_once_are_those_of_each(tmp_path):
    write_all(tmp_path)
    data = FeatureData(tmp_path)
    generator = torch.Generator().manual_seed(3)
    encoder = UserEncoder(5, 4, generator, num_blocks=3)
    encoder.centroids.copy_(torch.randn(3, 5, generator=generator) * 0.3)
    found = all_blocks(encoder, data)
    assert found.itemsize == 1
    assert found.tolist() == [int(encoder.blocks(pooled(*data.user(user)).unsqueeze(0))) for user in range(5)]
    assert len(set(found.tolist())) > 1


def test_features_are_taken_over_for_the_very_same_history_only(tmp_path):
    items = write_all(tmp_path)
    data = FeatureData(tmp_path)
    for user, wanted in enumerate(items):
        if len(wanted):
            assert data.items_of_history(user, f"{user:032x}").equal(wanted)
        assert data.items_of_history(user, f"{user + 1:032x}") is None
        assert data.items_of_history(user, "") is None
    assert data.items_of_history(len(items), f"{len(items):032x}") is None
