"""The plan: units cover all users with tokens once, in order, of similar cost, whoever makes it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.fleet.plan import plan_units


@given(st.lists(st.integers(0, 500), max_size=200), st.integers(1, 800))
def test_units_cover_all_users_with_tokens_once_in_order(costs, size):
    found = plan_units(np.asarray(costs, dtype=np.int64), size)
    assert [u.cost for u in found] == sorted((u.cost for u in found), reverse=True)
    by_first = sorted(found, key=lambda unit: unit.first)
    covered = [user for unit in by_first for user in range(unit.first, unit.stop)]
    assert len(covered) == len(set(covered))
    assert {user for user, cost in enumerate(costs) if cost} <= set(covered)
    assert sum(unit.cost for unit in found) == sum(costs)
    assert len({unit.name for unit in found}) == len(found)
    assert sum(unit.num_users for unit in found) == sum(cost > 0 for cost in costs)
    assert all(unit.cost < size + max(costs) for unit in found)
    last = max((unit.stop for unit in found), default=0)
    assert all(unit.cost >= size for unit in found if unit.stop < last), "only the last unit may be small"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 100))
def test_units_are_cut_as_by_counting_user_by_user(costs, size):
    cuts, first, cost = [], 0, 0
    for user, tokens in enumerate(costs):
        cost += tokens
        if cost >= size:
            cuts.append((first, user + 1))
            first, cost = user + 1, 0
    if cost:
        cuts.append((first, len(costs)))
    assert sorted((unit.first, unit.stop) for unit in plan_units(np.asarray(costs), size)) == cuts


def test_the_plan_does_not_depend_on_who_runs_it():
    costs = np.random.default_rng(1).integers(0, 100, 500)
    assert plan_units(costs, 700) == plan_units(costs.copy(), 700)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 120), st.data())
def test_removing_a_whole_unit_leaves_the_users_of_every_other_together(costs, size, data):
    units = sorted(plan_units(np.asarray(costs), size), key=lambda unit: unit.first)
    if len(units) < 2:
        return
    gone = data.draw(st.sampled_from(units[:-1]))  # the last one is closed by the end of the data
    left = [user for user in range(len(costs)) if not gone.first <= user < gone.stop]
    again = plan_units(np.asarray([costs[user] for user in left]), size)
    found = {tuple(user for user in left[unit.first : unit.stop] if costs[user]) for unit in again}
    wanted = {tuple(u for u in range(unit.first, unit.stop) if costs[u]) for unit in units if unit is not gone}
    assert found == wanted
