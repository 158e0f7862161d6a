"""The order of examples: everybody once an epoch, the same whoever runs, from any step on, in memory that stays."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.data.batches import StepPlan
from proper_ds.data.indices import Chosen
from proper_ds.data.order import POOL_BATCHES, Order
from proper_ds.files import seed_of

FIRST_INDEX = 1000


class MadeUp:
    """Examples of made-up lengths in blocks of uneven sizes; none is kept."""

    def __init__(self, count, block=7, longest=50):
        self._starts = np.unique(np.append(np.arange(0, count, block) - np.arange(-(-count // block)) % 3, count))
        self._starts = self._starts[self._starts >= 0]
        self.counts, self._longest = np.diff(self._starts), longest

    def block(self, number):
        indices = np.arange(self._starts[number], self._starts[number + 1])
        lengths = (5 + (indices * 7919 + 13) % 1009 % self._longest).astype(np.int32)
        return Chosen(FIRST_INDEX + indices, lengths, lengths // 4 + 1)


def plan_of(count, num_ranks, per_device, batch_size, epochs, seed=5, **given):
    return StepPlan(
        MadeUp(count),
        num_ranks=num_ranks,
        per_device=per_device,
        train_batch_size=batch_size,
        num_epochs=epochs,
        max_steps=None,
        seed=seed,
        **given,
    )


def held(step):
    return sorted(i for parts in step.micro for indices in parts for i in indices.tolist())


def plain_epoch(lengths, batch_size, seed, epoch):
    """An epoch's batches of a set that is shuffled as a whole, written down plainly."""
    generator = np.random.default_rng(seed_of(seed, "epoch", epoch))
    order, batches = generator.permutation(len(lengths)), []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = sorted(order[start : start + batch_size * POOL_BATCHES].tolist(), key=lambda i: -lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4))
def test_a_set_of_one_window_is_shuffled_as_a_whole(count, batch_size):
    blocks = MadeUp(count)
    lengths = np.concatenate([blocks.block(n).lengths for n in range(len(blocks.counts))])
    order = Order(blocks, batch_size, seed=3).batches()
    for epoch in range(2):
        for wanted in plain_epoch(lengths, batch_size, 3, epoch):
            found = next(order)
            assert (found.indices - FIRST_INDEX).tolist() == wanted
            assert found.lengths.tolist() == lengths[wanted].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 2), st.integers(0, 3), st.integers(0, 800))
def test_windows_hold_everybody_once_an_epoch_and_any_step_is_found_at_once(count, batch_size, num_pools, first):
    order = Order(MadeUp(count), batch_size, 5, window_examples=num_pools * batch_size * POOL_BATCHES)
    batches = order.batches()
    whole = [next(batches) for _ in range(2 * order.batches_per_epoch)]
    for epoch in range(2):
        part = whole[epoch * order.batches_per_epoch : (epoch + 1) * order.batches_per_epoch]
        assert sorted(np.concatenate([b.indices for b in part])) == list(range(FIRST_INDEX, FIRST_INDEX + count))
        assert sorted(len(b) for b in part)[1:] == [batch_size] * (len(part) - 1)
    for a, b in zip(whole[first:], order.batches(first), strict=False):
        assert a.indices.tolist() == b.indices.tolist()


def test_batches_that_are_packed_hold_examples_of_all_lengths():
    def mean_spread(by_length):
        order = Order(MadeUp(1000), 10, 5, by_length=by_length)
        whole = [batch for batch, _ in zip(order.batches(), range(order.batches_per_epoch), strict=False)]
        assert len(np.unique(np.concatenate([batch.indices for batch in whole]))) == 1000
        return np.mean([np.ptp(batch.lengths) for batch in whole])

    assert mean_spread(by_length=False) > 10 * mean_spread(by_length=True)


def test_neighbours_part_in_a_set_of_many_windows():
    order = Order(MadeUp(4000, block=10), 4, 5, window_examples=400)
    batches = order.batches()
    for _ in range(order.batches_per_epoch):
        near = np.diff(np.sort(next(batches).indices)) < 10
        assert near.sum() < 3, "no batch is a stretch of the data"


def test_memory_does_not_grow_with_the_examples():
    def peak_bytes(count):
        blocks = MadeUp(count, block=5_000)
        order = Order(blocks, 64, 5, window_examples=20_000)
        tracemalloc.start()
        for first in (0, order.batches_per_epoch // 2, order.batches_per_epoch - 1):
            next(order.batches(first))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(100_000), peak_bytes(5_000_000)
    assert many < few + 100 * (5_000_000 - 100_000) // 5_000, "at most some bytes a block"


SHAPES = st.tuples(st.integers(1, 80), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_every_epoch_shows_every_example_once(shape):
    plan = plan_of(*shape)
    steps = list(plan.steps())
    assert len(steps) == plan.num_steps == plan.steps_per_epoch * shape[4]
    for epoch in range(shape[4]):
        part = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(i for step in part for i in held(step)) == list(range(FIRST_INDEX, FIRST_INDEX + shape[0]))
    for step in steps:
        sizes = [len(indices) for parts in step.micro for indices in parts]
        assert max(sizes) <= shape[2]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 50))
def test_a_plan_goes_on_where_it_was(shape, first):
    plan = plan_of(*shape)
    for a, b in zip(list(plan.steps())[first:], plan.steps(first), strict=True):
        assert [held(a), a.num_targets, a.num_rows] == [held(b), b.num_targets, b.num_rows]
        assert all((x == y).all() for p, q in zip(a.micro, b.micro, strict=True) for x, y in zip(p, q, strict=True))


def owner_of(indices):
    return indices * 31 % 101 % 2


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(1, 4))
def test_steps_hold_the_same_examples_for_any_ranks_and_owners(shape, replicas, per_device):
    count, _, _, batch_size, epochs = shape
    plain = plan_of(count, 1, 64, batch_size, epochs)
    others = [
        plan_of(*shape),
        plan_of(count, 2 * replicas, per_device, batch_size, epochs, owner_of=owner_of, num_owners=2),
    ]
    for other in others:
        for a, b in zip(plain.steps(), other.steps(), strict=True):
            assert [held(a), a.num_targets, a.num_rows] == [held(b), b.num_targets, b.num_rows]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20))
def test_examples_go_to_ranks_of_their_owner_evenly(count, replicas, per_device, batch_size):
    num_ranks = 2 * replicas
    plan = plan_of(count, num_ranks, per_device, batch_size, 1, owner_of=owner_of, num_owners=2)
    for step in plan.steps():
        assert len(step.micro) == -(-batch_size // (num_ranks * per_device)), "as many in every step"
        for owner in range(2):
            parts = [parts[rank] for parts in step.micro for rank in range(owner, num_ranks, 2)]
            assert all((owner_of(part) == owner).all() for part in parts)
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
        assert step.largest == max(len(part) for parts in step.micro for part in parts)


def test_a_plan_for_ranks_that_owners_cannot_share_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="same number of ranks"):
        plan_of(10, 3, 1, 6, 1, owner_of=owner_of, num_owners=2)
