"""Rows hold every token of every item once, and a token sees its own item and nothing of its siblings."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.batches import length_batches
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.training.rows import common_prefix, micro_batches, pack, rows_of_step

BUDGET = 60


@st.composite
def steps(draw):
    """Items of one user's step: each of some task, beginning with that task's tokens."""
    found = []
    for position in range(draw(st.integers(1, 8))):
        task = draw(st.integers(0, 2))
        shared = [10 * task + n for n in range([0, 3, 12][task])]
        own = draw(st.lists(st.integers(50, 90), min_size=1, max_size=9))
        answer = draw(st.lists(st.integers(50, 90), min_size=1, max_size=3))
        ids = np.asarray(shared + own + answer, dtype=np.int64)
        found.append(Example(0, HISTORY, task, position, len(shared) + len(own), ids))
    return found


def prefixes(examples):
    return {task: common_prefix([e for e in examples if e.task == task]) for task in {e.task for e in examples}}


def texts_of(packed, number):
    """For each target of a row: the tokens its prediction sees, in order, and the target."""
    mask = packed.mask(torch.float32)
    ids = packed.ids_RT[number]
    found = []
    of_row = packed.places.row_K == number
    columns = packed.places.column_K[of_row].tolist()
    for column, target in zip(columns, packed.target_K[of_row].tolist(), strict=True):
        seen = torch.arange(len(ids)) <= column if mask is None else mask[number, 0, column] == 0
        if packed.position_RT is not None:
            positions = packed.position_RT[number][seen].tolist()
            assert positions == list(range(len(positions)))
        found.append((ids[seen].tolist(), target))
    return found


@given(steps(), st.booleans(), st.sampled_from([8, 64]))
def test_each_target_sees_exactly_its_own_item(examples, is_sparse, hidden_size):
    rows = list(rows_of_step(3, examples, prefixes(examples), BUDGET, hidden_size, is_sparse))
    found = []
    for part in micro_batches(rows, BUDGET):
        packed = pack(part)
        assert packed.ids_RT.shape == (len(part), max(row.num_tokens for row in part))
        assert packed.num_tokens == sum(row.num_tokens for row in part)
        assert packed.slot_R.tolist() == [3] * len(part)
        assert len(part) == 1 or packed.ids_RT.numel() <= BUDGET
        for number in range(len(part)):
            found += texts_of(packed, number)
    wanted = [
        (example.ids[:at].tolist(), int(example.ids[at]))
        for example in examples
        for at in range(example.num_prompt, len(example.ids))
    ]
    assert sorted(found) == sorted(wanted)


@given(steps())
def test_a_prefix_is_shared_and_leaves_every_item_a_token(examples):
    length = common_prefix(examples)
    for example in examples:
        assert (example.ids[:length] == examples[0].ids[:length]).all()
        assert length < example.num_prompt
    if len(examples) > 1 and all(length + 1 < e.num_prompt for e in examples):
        assert len({int(e.ids[length]) for e in examples}) > 1


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(16, 256), st.none() | st.integers(0, 30))
def test_batches_hold_everything_once_within_the_budget(lengths, budget, max_padding):
    batches = length_batches(lengths, budget, max_padding)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * width <= budget
        assert max_padding is None or sum(width - lengths[i] for i in batch) <= max_padding
