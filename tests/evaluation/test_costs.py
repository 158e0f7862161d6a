"""What methods cost, from markers and lines of metrics.jsonl."""

from __future__ import annotations

from proper_ds.config import RunConfig
from proper_ds.evaluation.costs import Work, answering_seconds, costs_of, work_of
from proper_ds.evaluation.methods import methods_of
from proper_ds.evaluation.report import _stages_behind

MARKER = {"seconds": 10.0}


def step(stage, number, num_tokens):
    return {"stage": stage, "step": number, "num_tokens": num_tokens}


def unit(part, name, **more):
    return {"stage": "user", "part": part, "unit": name} | more


def test_ranks_work_side_by_side_and_repeated_steps_count_once():
    events = [
        {"stage": "population", "event": "begins", "num_ranks": 2},
        *(step("population", n, 100) for n in (10, 20, 30)),
        *(step("population", n, 101) for n in (20, 30)),  # after a restart from step 10
        step("group/proper", 10, 7),
    ]
    assert work_of("population", MARKER, events) == Work(20.0, 302)
    assert work_of("group/proper", MARKER, events) == Work(10.0, 7)
    assert work_of("router/proper", MARKER, events) == Work(10.0, None)


def test_actors_units_are_added_up_and_one_done_twice_counts_once():
    events = [
        unit("store/OPPU", "a", seconds=1.0, num_tokens=5),
        unit("store/OPPU", "b", seconds=2.0, num_tokens=6),
        unit("store/OPPU", "b", seconds=4.0, num_tokens=6),
        unit("store/proper", "a", seconds=100.0, num_tokens=1000),
    ]
    assert work_of("store/OPPU", MARKER, events) == Work(5.0, 11)
    quarantined = [*events, unit("store/OPPU", "c", quarantined="why")]
    assert work_of("store/OPPU", MARKER, quarantined) == Work(10.0, None)


def test_seconds_before_an_interruption_count_up_to_the_checkpoint():
    def line(number, rate):
        return step("population", number, 100) | {"tokens_per_s": rate}

    events = [
        {"stage": "population", "event": "begins", "num_ranks": 4, "from_step": 0},
        *(line(n, 50) for n in (10, 20, 30)),  # two seconds each, on four ranks
        {"stage": "population", "event": "begins", "num_ranks": 2, "from_step": 20},
        *(line(n, 25) for n in (30, 40)),
    ]
    assert work_of("population", MARKER, events) == Work(2 * 2 * 4 + 10 * 2, 400)


def test_only_the_users_that_a_method_needs_are_its_cost():
    events = [
        unit("store/OPPU", "a", seconds=4.0, num_tokens=100, shares={"asked": 0.75, "merged": 0.25}),
        unit("store/OPPU", "b", seconds=2.0, num_tokens=50, shares={"asked": 0.0, "merged": 1.0}),
    ]
    work = work_of("store/OPPU", MARKER, events)
    assert (work.seconds, work.num_tokens) == (6.0, 150)
    assert (work.of("asked").seconds, work.of("asked").num_tokens) == (3.0, 75)
    assert (work.of("merged").seconds, work.of("merged").num_tokens) == (3.0, 75)
    assert work.of("router") == work, "not told apart"
    behind = {"OPPU": ["store/OPPU"], "merged": ["store/OPPU"]}
    costs = costs_of(behind, {"store/OPPU": work}, {}, [], {"OPPU": "asked", "merged": "merged"})
    assert [costs[name]["train_seconds"] for name in behind] == [3.0, 3.0]
    # units from before this was told
    assert work_of("store/OPPU", MARKER, [*events, unit("store/OPPU", "c", seconds=1.0, num_tokens=1)]).by_role == {}


def test_seconds_an_answer():
    events = [
        unit("predictions/OPPU", "a", seconds=9.0, answering_seconds=1.0, num_questions=10),
        unit("predictions/OPPU", "b", seconds=3.0, answering_seconds=3.0, num_questions=10),
        unit("predictions/base", "a", seconds=2.0, answering_seconds=1.0, num_questions=20),
        unit("store/OPPU", "a", seconds=50.0),
    ]
    assert answering_seconds(events) == {"OPPU": 0.2, "base": 0.05}


def test_profiles_that_a_model_writes_are_behind_a_method():
    prompt = {"profile": "model", "profile_model": "some/model"}
    config = RunConfig.model_validate(
        {"output_dir": "x", "recipes": {"mine": {"like": "PAG", "prompt": prompt}}, "evaluation": {"methods": ["mine"]}}
    )
    (method,) = methods_of(config)
    assert _stages_behind(method, config) == [f"profiles@{method.lane}", f"population@{method.lane}"]


def test_what_others_need_too_is_told_apart():
    behind = {
        "population": ["population"],
        "OPPU": ["population", "store/OPPU"],
        "proper": ["population", "group/proper", "store/proper"],
        "base": [],
    }
    works = {"population": Work(10, 100), "store/OPPU": Work(3, 30), "group/proper": Work(5, None)}
    costs = costs_of(behind, works, {"OPPU": 64.0}, [])
    oppu = costs["OPPU"]
    assert (oppu["train_seconds"], oppu["shared_train_seconds"]) == (13, 10)
    assert (oppu["train_tokens"], oppu["shared_train_tokens"]) == (130, 100)
    assert (oppu["bytes_per_user"], oppu["predict_seconds"]) == (64.0, None)
    assert costs["proper"]["train_seconds"] is None  # nobody knows what store/proper took
    assert costs["proper"]["shared_train_seconds"] == 10
    assert (costs["base"]["train_seconds"], costs["base"]["train_tokens"]) == (0, 0)
