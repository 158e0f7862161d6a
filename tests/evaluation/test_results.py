"""From predictions to the report's numbers: pairing, history buckets, floors, directions, LaMP files."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.evaluation.bootstrap import MIN_USERS
from proper_ds.evaluation.history import history_buckets, history_parts
from proper_ds.evaluation.metrics import metrics_of
from proper_ds.evaluation.plots import expert_spread, gain_by_history, learning_curves
from proper_ds.evaluation.questions import Answers, answers_of
from proper_ds.evaluation.report_rows import gain_text
from proper_ds.evaluation.results import Scoring, evaluate_task, expert_use, write_lamp_files
from proper_ds.evaluation.verify import differences
from tests.evaluation.crafted import RATINGS, TAGS, ratings, row, table

BOTH = ("population", "OPPU")
SCORING = Scoring(200, 0.95, ("population",))


def rows_of_two():
    found = []
    for user in range(30):
        for n in range(3):
            gold = str(1 + (user + n) % 5)
            gates = {"personal": True, "gates": [0.2, 0.8, 0.9, 0.1], "num_experts": 2}
            found.append(row("population", user, n, gold, "3", user))
            found.append(row("OPPU", user, n, gold, gold, user, **gates))
    return found


def result_of(rows, methods=BOTH, scoring=SCORING):
    return evaluate_task(RATINGS, answers_of(table(rows), "LaMP_3", methods), scoring)


def test_a_task_is_scored_for_every_method_bucket_and_pair():
    result = result_of(rows_of_two())
    assert result["methods"]["OPPU"]["mae"]["value"] == 0
    (pair,) = result["comparisons"]["mae"]
    assert (pair["method"], pair["than"], pair["verdict"]) == ("OPPU", "population", "better")
    assert pair["gain"] == pytest.approx(result["methods"]["population"]["mae"]["value"])
    assert pair["user_mean_gain"] == pytest.approx(result["methods"]["population"]["mae"]["user_mean"])
    assert pair["interval"][0] > 0
    assert result["by_history"][0]["history"] == "0"
    assert sum(bucket["num_users"] for bucket in result["by_history"]) == 30
    assert sum(bucket["num_questions"] for bucket in result["by_history"]) == 90
    assert [(part["part"], part["history"], part["num_users"]) for part in result["parts"]] == [
        ("cold", "0-1", 2),
        ("lower half", "0-14", 15),
        ("upper half", "15-29", 15),
    ]
    for bucket in result["by_history"] + result["parts"]:
        assert bucket["methods"]["OPPU"]["mae"]["value"] == 0
        assert bucket["comparisons"]["mae"][0]["gain"] > 0
    assert gain_by_history(result, "mae", "population", ["OPPU"]).startswith("<svg")


def test_the_matrix_has_every_pair_and_agrees_with_the_comparisons():
    result = result_of(ratings({"base": 0.2, "population": 0.5, "OPPU": 0.8}), ("base", *BOTH))
    found = result["matrix"]["mae"]
    of = found["methods"].index
    for pair in result["comparisons"]["mae"]:
        place = of(pair["method"]), of(pair["than"])
        assert found["gain"][place[0]][place[1]] == pytest.approx(pair["gain"])
        assert found["low"][place[0]][place[1]] == pytest.approx(pair["interval"][0])
        assert found["high"][place[0]][place[1]] == pytest.approx(pair["interval"][1])
    gain = np.asarray(found["gain"])
    assert np.allclose(gain, -gain.T)
    assert gain[of("OPPU"), of("base")] > 0


CHANCES = st.dictionaries(st.sampled_from(["base", "OPPU", "words", "proper"]), st.floats(0, 1), min_size=1)


@settings(max_examples=25)
@given(CHANCES, st.randoms())
def test_the_order_of_lines_does_not_matter(chances, random):
    rows = ratings(chances, num_users=8)
    shuffled = list(rows)
    random.shuffle(shuffled)
    scoring = Scoring(30, 0.9, ("OPPU",))
    assert result_of(rows, list(chances), scoring) == result_of(shuffled, list(chances), scoring)


@settings(max_examples=25)
@given(st.floats(0, 1), st.integers(1, 12))
def test_a_method_does_not_differ_from_itself(chance, num_users):
    rows = ratings({"population": chance, "OPPU": chance}, num_users)
    (pair,) = result_of(rows)["comparisons"]["mae"]
    many = num_users >= MIN_USERS
    assert (pair["gain"], pair["interval"], pair["user_mean_gain"]) == (0, [0, 0] if many else None, 0)
    assert pair["verdict"] == ("no difference beyond the interval" if many else "too few users")


@pytest.mark.parametrize(("num_users", "few"), [(MIN_USERS - 1, True), (MIN_USERS, False)])
def test_a_few_users_give_values_but_no_verdict(num_users, few):
    chances = {"words": 0.2, "population": 0.5, "OPPU": 1.0}
    result = result_of(ratings(chances, num_users), list(chances))
    pair = next(pair for pair in result["comparisons"]["mae"] if pair["method"] == "OPPU")
    assert (pair["verdict"], pair["interval"] is None) == ("too few users" if few else "better", few)
    assert pair["gain"] > 0 and (pair["user_mean_interval"] is None) == few
    entry, floor = result["methods"]["OPPU"]["mae"], result["floor"]["methods"]["OPPU"]
    assert entry["value"] == 0 and (entry["interval"] is None) == few
    assert (floor["standing"], floor["below_floor"]) == (None if few else "above", False)
    assert (result["matrix"]["mae"]["low"] is None) == few
    assert gain_text(pair).endswith("(too few users)" if few else "better")


def test_parts_of_a_few_users_have_no_verdict_beside_a_whole_that_has():
    result = result_of(rows_of_two())
    cold, lower, _ = result["parts"]
    assert (cold["num_users"], cold["comparisons"]["mae"][0]["verdict"]) == (2, "too few users")
    assert lower["comparisons"]["mae"][0]["verdict"] == "better"
    assert result["comparisons"]["mae"][0]["verdict"] == "better"
    assert gain_by_history(result, "mae", "population", ["OPPU"]).startswith("<svg")


def test_memory_grows_with_users_not_with_their_questions():
    """For each method; 15 labels make 45 numbers a question."""
    num, generator = 3000, np.random.default_rng(0)
    answers = Answers(
        [str(n) for n in range(num)],
        np.arange(num) // 150,
        np.arange(num) // 150,
        generator.choice(TAGS.labels, num).tolist(),
        {f"m{k}": generator.choice(TAGS.labels, num).tolist() for k in range(20)},
    )
    tracemalloc.start()
    evaluate_task(TAGS, answers, Scoring(5, 0.95, ()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * num * 45 * 20 / 4, "not even a quarter of all questions' statistics"


@given(st.lists(st.integers(1, 6), min_size=2, max_size=10))
def test_adding_a_method_changes_no_other_number(counts):
    rows = [r for user, n in enumerate(counts) for r in ratings({"OPPU": 0.4}, user + 1, n, seed=user)[-n:]]
    other = [r | {"method": "base", "prediction": "2"} for r in rows]
    alone, both = result_of(rows, ["OPPU"]), result_of(rows + other, ["base", "OPPU"])
    assert not differences(alone["methods"]["OPPU"], both["methods"]["OPPU"])


def test_methods_are_held_against_the_best_floor():
    chances = {"own-habit": 0.3, "words": 0.6, "base": 0.2, "OPPU": 0.61, "proper": 0.95}
    floor = result_of(ratings(chances, 60), list(chances))["floor"]
    assert floor["than"] == "words"
    assert {name: about["standing"] for name, about in floor["methods"].items()} == {
        "base": "below",
        "OPPU": "within the interval",
        "proper": "above",
    }
    assert [name for name, about in floor["methods"].items() if about["below_floor"]] == ["base"]
    assert result_of(ratings({"base": 1}), ["base"])["floor"] is None


def test_equal_to_the_floor_is_below_it():
    floor = result_of(ratings({"words": 0.5, "OPPU": 0.5}), ["words", "OPPU"])["floor"]
    assert floor["methods"]["OPPU"]["below_floor"]


def test_a_method_may_leave_a_task_out_but_not_a_question():
    rows = ratings({"base": 0.5, "OPPU": 0.7})
    assert set(result_of(rows, ["base", "OPPU", "words"])["methods"]) == {"base", "OPPU"}
    with pytest.raises(AssertionError, match="same questions"):
        answers_of(table(rows[:-1]), "LaMP_3", ["base", "OPPU"])


def test_questions_with_hidden_golds_are_not_scored():
    hidden = [r | {"gold": None} if r["user"] == 3 else r for r in rows_of_two()]
    answers = answers_of(table(hidden), "LaMP_3", BOTH)
    assert 3 not in answers.users
    assert len(answers.ids) == 87


def test_two_people_may_have_questions_of_the_same_name():
    rows = [row("OPPU", user, 0, "1", answer, 2, id="q") for user, answer in ((0, "1"), (1, "5"))]
    result = result_of(rows, ["OPPU"])
    assert (result["num_questions"], result["methods"]["OPPU"]["mae"]["value"]) == (2, 2)


def test_values_are_the_metrics_over_all_questions():
    generator = np.random.default_rng(0)
    labels = TAGS.labels[:4]
    golds, given_ = generator.choice(labels, 40), generator.choice(labels, 40)
    rows = [row("base", n % 7, n, g, p, n % 7, "tags") for n, (g, p) in enumerate(zip(golds, given_, strict=True))]
    result = evaluate_task(TAGS, answers_of(table(rows), "tags", ["base"]), SCORING)
    for metric in metrics_of(TAGS):
        wanted = metric.value(sum(metric.statistics(g, p) for g, p in zip(golds, given_, strict=True)))
        assert result["methods"]["base"][metric.name]["value"] == pytest.approx(float(wanted))


def test_lamp_files_are_what_lamps_evaluator_reads(tmp_path):
    answers = table([r for r in rows_of_two() if r["method"] == "OPPU"])
    write_lamp_files(answers, {"LaMP_3": RATINGS}, tmp_path / "OPPU")
    found = json.loads((tmp_path / "OPPU" / "lamp" / "LaMP_3.json").read_text())
    assert found["task"] == "LaMP_3"
    assert len(found["golds"]) == 90
    assert set(found["golds"][0]) == {"id", "output"}


def test_expert_use_and_plots():
    use = expert_use(table(rows_of_two()), BOTH)
    assert list(use) == ["OPPU"]
    assert use["OPPU"]["dominant_share"] == [[0.0, 1.0], [1.0, 0.0]]
    assert use["OPPU"]["mean_largest_gate"] == pytest.approx(0.85)
    assert expert_spread(use).startswith("<svg")
    events = [{"stage": "population", "step": s, "loss": 1 / s, "num_steps": 4} for s in (1, 2, 3, 2, 3, 4)]
    assert learning_curves(events).startswith("<svg")
    assert learning_curves([]) is None


LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=50)


@given(LENGTHS)
def test_every_user_falls_into_exactly_one_bucket(lengths):
    history = np.asarray(lengths)
    hits = np.zeros(len(lengths), dtype=int)
    for _, low, high in history_buckets(history, np.arange(len(lengths))):
        hits += (history >= low) & (history <= high)
        assert {low, high} <= set(lengths), "its label names lengths that somebody has"
    assert (hits == 1).all()


@given(LENGTHS)
def test_halves_part_the_users_and_no_other_cut_is_nearer_to_the_middle(lengths):
    history = np.asarray(lengths)
    parts = dict(history_parts(history, np.arange(len(lengths))))
    assert ("cold" in parts) == (history <= 1).any()
    if len(set(lengths)) == 1:
        assert not {"lower half", "upper half"} & set(parts)
        return
    inside = {name: (history >= low) & (history <= high) for name, (_, low, high) in parts.items()}
    assert (inside["lower half"] ^ inside["upper half"]).all()
    num = inside["lower half"].sum()
    for cut in sorted(set(lengths))[:-1]:
        assert abs(2 * num - len(lengths)) <= abs(2 * (history <= cut).sum() - len(lengths))
