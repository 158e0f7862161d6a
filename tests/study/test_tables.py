"""A study's tables, from runs with crafted predictions."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proper_ds.study.finished import FinishedRun
from proper_ds.study.paired import paired_difference
from proper_ds.study.plots import unbeaten
from proper_ds.study.results import results_of
from proper_ds.study.rows import (
    NOBODY,
    NOT_RUN,
    difference_table,
    notes_of,
    score_table,
    tables_of,
    verdict_table,
)
from proper_ds.study.tables import write_results
from tests.evaluation.crafted import PROTOCOL, ratings, write_run

COMMAND = "proper-ds compare some/study.yaml run.user.min_steps=4"
CHANCES = {"words": 0.5, "population": 0.3, "OPPU": 0.6, "proper": 0.9}


@pytest.fixture
def finish(tmp_path):
    """`finish(task, variant, rows, seed)`: a finished run with its predictions on disk."""

    def made(task, variant, rows, seed=41):
        folder = tmp_path / task / (variant if seed == 41 else f"{variant}-{seed}")
        folder.mkdir(parents=True, exist_ok=True)
        report = write_run(folder, rows, references=("population", "OPPU"))
        return FinishedRun(task, variant, seed, folder, report, f"hash-{variant}", 12.0)

    return made


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_main_table_has_every_method_and_task_and_says_what_was_not_run(finish, tmp_path):
    films = finish("films", "main", ratings(CHANCES, 40))
    books = finish("books", "main", ratings({"OPPU": 0.5, "proper": 0.9}, 20, seed=1))
    write_results([films, books], tmp_path, COMMAND)
    results = read(tmp_path)
    assert list(results["columns"]) == ["films", "books"]
    cell = results["methods"]["all"]["proper"]["films"]
    assert cell["value"] == films.report["methods"]["proper"]["LaMP_3"]["mae"]["value"]
    assert cell["interval"] == films.report["methods"]["proper"]["LaMP_3"]["mae"]["interval"]
    assert "books" not in results["methods"]["all"]["population"]
    first = tables_of(results)[0]
    assert first.rows[0][0] == "proper"
    by_method = {row[0]: row[1:] for row in first.rows}
    assert by_method["population"][1] == NOT_RUN
    assert by_method["population"][0].endswith("▼")  # a bag of words does better
    assert {(0, 1), (0, 2)} == set(first.best)
    text = (tmp_path / "results.md").read_text()
    assert f"| **{by_method['proper'][0]}** |" in text
    assert "hash-main" in text
    assert results["made_by"] == COMMAND
    assert f"Made by `{COMMAND}` from 2 runs" in text
    assert (tmp_path / "results.html").read_text().count("<svg") >= 3
    linked = links_of(text)
    assert len(linked) >= 3
    assert all((tmp_path / name).read_text().startswith("<svg") for name in linked)


def test_a_part_without_anybody_and_tasks_without_a_verdict_are_told_as_such(finish, tmp_path):
    alike = [one | {"num_history": 5} for one in ratings(CHANCES, 40)]
    runs = [finish("films", "main", alike), finish("books", "main", ratings(CHANCES, 5))]
    results = results_of(runs, tmp_path)
    lower = difference_table(results, "lower half", "OPPU")
    assert {row[1] for row in lower.rows} == {NOBODY}
    assert {tuple(row[1:]) for row in score_table(results, "lower half").rows} != {(NOBODY, NOBODY)}
    table = verdict_table(results)
    column = table.header.index("over OPPU, all")
    assert {row[0]: row[column] for row in table.rows}["proper"] == "1 / 0 / 0", "five users of books decide nothing"


def test_few_users_are_told_of_several_seeds_too(finish, tmp_path):
    runs = [finish("books", "main", ratings(CHANCES, 5), seed) for seed in (41, 42)]
    shown = score_table(results_of(runs, tmp_path), "all").rows[0][1]
    assert "2 seeds; too few users)" in shown


def test_what_is_told_of_some_variants_names_them(finish, tmp_path):
    runs = [finish(task, variant, ratings(CHANCES, 20)) for task in ("films", "books") for variant in ("main", "short")]
    for run in runs:
        cautions = ["of all"] + (["of short"] if run.variant == "short" else []) + (["one"] if run is runs[1] else [])
        run.report["protocol"] = run.report["protocol"] | {"cautions": cautions}
    told = notes_of(results_of(runs, tmp_path) | {"made_by": "x", "missing": []})
    assert [line for line in told if "Not comparable" in line] == [
        "Not comparable: of all",
        "Not comparable: (short): of short",
        "Not comparable: films (short): one",
    ]


def links_of(text):
    return re.findall(r"\]\((figures/[A-Za-z0-9._+-]+\.svg)\)", text)


def test_figures_have_names_that_a_link_can_hold_and_go_with_their_tasks(finish, tmp_path):
    runs = [finish(task, "main", ratings(CHANCES, 40)) for task in ("made: films (all)", "made; films; all;", "books")]
    write_results(runs, tmp_path, COMMAND)
    gains = {name for name in links_of((tmp_path / "results.md").read_text()) if "gain" in name}
    assert gains == {f"figures/gain-{name}.svg" for name in ("made-films-all-", "made-films-all--2", "books")}
    write_results(runs[2:], tmp_path, COMMAND)
    assert [path.name for path in (tmp_path / "figures").glob("gain-*")] == ["gain-books.svg"]


def test_methods_that_learned_from_those_who_are_asked_are_marked(finish, tmp_path):
    run = finish("films", "main", ratings(CHANCES, 20))
    for taught, shown in ((["proper"], "proper †"), ([], "proper")):
        run.report["taught_by_asked"] = taught
        write_results([run], tmp_path, COMMAND)
        first = tables_of(read(tmp_path))[0]
        assert shown in [row[0] for row in first.rows]
        assert ("†: weights shared by all users" in first.note) == bool(taught)


def test_a_task_of_a_few_users_decides_nothing(finish, tmp_path):
    runs = [finish("films", "main", ratings(CHANCES, 40), seed) for seed in (41, 42)]
    runs += [finish("books", "main", ratings({"OPPU": 0, "proper": 1}, 5), seed) for seed in (41, 42)]
    results = results_of(runs, tmp_path)
    found = results["differences"]["all"]["OPPU"]["proper"]
    assert (found["films"]["verdict"], found["books"]["verdict"]) == ("better", "too few users")
    assert found["books"]["interval"] is None and found["books"]["gain"] > 0
    scores = tables_of(results)[0]
    assert [title.rpartition(", ")[2] for title in scores.header[1:]] == ["40 users", "5 users"]
    assert results["columns"]["books"]["num_users"] == {"all": 5, "cold": 2, "lower half": 2, "upper half": 3}


def test_halves_and_cold_users_have_tables_of_their_own(finish, tmp_path):
    run = finish("films", "main", ratings(CHANCES, 40))
    results = results_of([run], tmp_path)
    parts = {part["part"]: part for part in run.report["tasks"]["LaMP_3"]["parts"]}
    for part in ("lower half", "upper half", "cold"):
        wanted = parts[part]["methods"]["OPPU"]["mae"]["value"]
        assert results["methods"][part]["OPPU"]["films"]["value"] == wanted
    (wanted,) = (
        pair
        for pair in parts["lower half"]["comparisons"]["mae"]
        if (pair["method"], pair["than"]) == ("proper", "OPPU")
    )
    found = results["differences"]["lower half"]["OPPU"]["proper"]["films"]
    assert (found["gain"], found["interval"], found["verdict"]) == (wanted["gain"], wanted["interval"], "better")


def test_every_row_of_every_table_is_as_wide_as_its_header(finish, tmp_path):
    runs = [finish("films", variant, ratings(CHANCES, 20)) for variant in ("main", "wide")]
    runs.append(finish("books", "wide", ratings({"OPPU": 0.5}, 20)))
    results = results_of(runs, tmp_path) | {"made_by": "x", "missing": []}
    tables = tables_of(results)
    assert len(tables) > 10
    assert not any(table.title.startswith("Variants") for table in tables)  # the same answers
    assert any("No variant changed an answer of words, population" in line for line in notes_of(results))
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.header)}, table.title


def test_without_any_run_there_is_a_file_that_says_so(tmp_path):
    lines = [{"task": "a", "variant": "main", "seed": 41, "folder": "studies/a/main", "state": "failed"}]
    (tmp_path / "study.json").write_text(json.dumps({"is_partial": True, "runs": lines}))
    write_results([], tmp_path, COMMAND)
    assert read(tmp_path)["missing"] == ["a/main"]
    assert "PARTIAL: a/main" in (tmp_path / "results.md").read_text()


def test_several_seeds_have_a_mean_and_a_range(finish, tmp_path):
    runs = [finish("films", "main", ratings(CHANCES, 30, seed=seed), seed) for seed in (41, 42, 43)]
    results = results_of(runs, tmp_path) | {"made_by": "x", "missing": []}
    values = [run.report["methods"]["OPPU"]["LaMP_3"]["mae"]["value"] for run in runs]
    cell = results["methods"]["all"]["OPPU"]["films"]
    assert cell["value"] == pytest.approx(sum(values) / 3)
    assert cell["by_seed"] == {"41": values[0], "42": values[1], "43": values[2]}
    row = next(row for row in tables_of(results)[0].rows if row[0] == "OPPU")
    assert f"({min(values):.3f} to {max(values):.3f}, 3 seeds)" in row[1]


def test_variants_are_paired_by_question_whatever_else_differs(finish, tmp_path):
    rows = ratings({"OPPU": 0.4}, 30)
    better = [r | {"prediction": r["gold"]} if r["user"] % 2 else r for r in rows]
    fewer = [r | {"user": 29 - r["user"]} for r in reversed(better) if r["user"] < 20]  # other users, other indices
    main, other = finish("films", "main", rows), finish("films", "other", fewer)
    results = results_of([main, other], tmp_path)
    cells = results["ablations"]["OPPU"]["films"]
    assert cells["main"]["difference"] is None
    difference = cells["other"]["difference"]
    assert (difference["num_questions"], difference["num_users"]) == (60, 20)
    assert difference["verdict"] == "better"
    common = [r for r in rows if r["user"] < 20]
    errors = sum(abs(int(r["prediction"]) - int(r["gold"])) for r in common if r["user"] % 2)
    assert difference["gain"] == pytest.approx(errors / len(common))
    text = "\n".join(table.title for table in tables_of(results | {"made_by": "x", "missing": []}))
    assert "Variants, method OPPU" in text


def test_runs_without_a_common_question_are_not_compared(finish):
    rows = ratings({"OPPU": 0.4}, 5)
    others = [r | {"id": f"other-{r['id']}"} for r in rows]
    main, other = finish("films", "main", rows), finish("films", "other", others)
    assert paired_difference([main], [other], "LaMP_3", "OPPU") is None


def test_seeds_are_paired_with_themselves(finish):
    main = [finish("films", "main", ratings({"OPPU": 0.5}, 20, seed=seed), seed) for seed in (41, 42)]
    same = [finish("films", "same", ratings({"OPPU": 0.5}, 20, seed=seed), seed) for seed in (42, 41, 43)]
    found = paired_difference(main, same, "LaMP_3", "OPPU")
    assert (found["gain"], found["interval"], sorted(found["seeds"])) == (0, [0, 0], [41, 42])


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 12))
def test_the_difference_of_runs_is_that_of_two_methods_of_one_run(finish, one, other, num_users):
    both = ratings({"OPPU": one, "proper": other}, num_users)
    inside = finish("films", "both", both)
    first = finish("films", "main", [r for r in both if r["method"] == "OPPU"])
    second = finish("films", "other", [r | {"method": "OPPU"} for r in both if r["method"] == "proper"])
    found = paired_difference([first], [second], "LaMP_3", "OPPU")
    (wanted,) = (
        pair
        for pair in inside.report["tasks"]["LaMP_3"]["comparisons"]["mae"]
        if (pair["method"], pair["than"]) == ("proper", "OPPU")
    )
    for key in ("gain", "interval", "user_mean_gain", "user_mean_interval", "verdict"):
        assert found[key] == (wanted[key] if isinstance(wanted[key], str) else pytest.approx(wanted[key]))
    assert PROTOCOL["num_bootstrap_samples"] == 100  # both drew as often


def test_costs_are_summed_over_tasks_and_unknown_ones_are_not_guessed(finish, tmp_path):
    films, books = (finish(task, "main", ratings(CHANCES, 10)) for task in ("films", "books"))
    books.report["costs"]["OPPU"]["train_tokens"] = None
    results = results_of([films, books], tmp_path) | {"made_by": "x", "missing": []}
    table = next(table for table in tables_of(results) if table.title == "What each method cost")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["proper"][:4] == ["2", "30", "3,000", "300"]
    assert rows["OPPU"][2] == "?"


def test_how_well_groups_were_found_and_how_often_test_users_were_read_is_told(finish, tmp_path):
    run = finish("films", "main", ratings({"OPPU": 0.5}, 5))
    agreement = {"adjusted_rand_index": 0.875, "normalized_mutual_information": 0.75}
    about = {"num_users": 5, "num_groups": 2, "num_experts": 4, "strongest": agreement, "k_means": agreement}
    run.report.update(grouping={"proper": about}, test_reads=3)
    write_results([run], tmp_path, COMMAND)
    text = (tmp_path / "results.md").read_text()
    assert "| films/main | proper | 5 | 2 | 4 | 0.875 | 0.875 | 0.750 |" in text
    assert "films/main: 3" in text


POINTS = st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(POINTS, st.booleans())
def test_nothing_cheaper_beats_the_front(points, higher):
    front = unbeaten(points, higher)
    sign = 1 if higher else -1
    for method, (cost, value) in points.items():
        as_good = [n for n in front if points[n][0] <= cost and sign * points[n][1] >= sign * value]
        assert as_good, method
    for earlier, later in itertools.pairwise(front):
        assert points[earlier][0] < points[later][0]
        assert sign * points[earlier][1] < sign * points[later][1]


def test_of_several_seeds_the_worst_says_how_a_method_stands_to_the_floor(finish, tmp_path):
    """One lucky seed must not hide that the method is no better than a bag of words."""
    above, below = CHANCES, CHANCES | {"OPPU": 0.2}
    runs = [finish("films", "main", ratings(chances, 40), seed) for seed, chances in ((41, above), (42, below))]
    stands = [run.report["tasks"]["LaMP_3"]["floor"]["methods"]["OPPU"]["standing"] for run in runs]
    assert stands[0] != stands[1] == "below"
    results = results_of(runs, tmp_path)
    assert results["methods"]["all"]["OPPU"]["films"]["standing"] == "below"
    assert results["methods"]["all"]["proper"]["films"]["standing"] == "above"


def test_notes_say_of_which_tasks_they_are():
    about = {"split": "dev", "name": "user-based", "base_parameters": 1000}
    runs = [
        {
            "task": "films",
            "variant": "main",
            "protocol": about | {"base": "small"},
            "cautions": ["few people", "short prompts"],
        },
        {
            "task": "books",
            "variant": "main",
            "protocol": about | {"base": "large"},
            "cautions": ["few people", "books: not LaMP's"],
        },
    ]
    empty = {"missing": [], "ablations": {}, "columns": {}, "test_reads": {}}
    results = empty | {
        "made_by": "x",
        "baseline": "main",
        "variants": ["main"],
        "runs": [r | {"chosen_by": []} for r in runs],
    }
    notes = notes_of(results)
    assert "Protocol: films: split dev, user-based, base small (1,000 parameters)." in notes
    assert "Not comparable: few people" in notes
    assert "Not comparable: films: short prompts" in notes
    assert "Not comparable: books: not LaMP's" in notes


def test_a_method_that_leaves_a_task_out_has_no_cells_there(finish, tmp_path):
    """As label priors do on tasks with open answers."""
    runs = []
    for variant, chance in (("main", 0.5), ("wide", 0.8)):
        run = finish("films", variant, ratings({"population": 0.3, "OPPU": chance}, 20))
        run.report["methods"]["group+prior"] = {}
        runs.append(run)
    write_results(runs, tmp_path, COMMAND)
    assert set(read(tmp_path)["ablations"]) == {"population", "OPPU"}
