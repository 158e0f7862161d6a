"""What a report says of methods of one run that were not treated alike, and the sign that some of them bear."""

from __future__ import annotations

import pytest

from proper_ds.config import RunConfig
from proper_ds.evaluation.cautions import answer_cautions, prior_cautions, run_cautions, taught_by_asked
from proper_ds.evaluation.methods import METHODS, all_methods
from proper_ds.evaluation.report_html import html_of
from proper_ds.evaluation.report_text import markdown_of
from tests.evaluation.crafted import ratings, row, table, write_run


def config_of(methods, **sections):
    given = {"output_dir": "x", "data": {"path": ["x"]}, "base": {"model": "x"}}
    return RunConfig.model_validate(given | {"evaluation": {"methods": methods}} | sections)


def counts(num_prompts, **others):
    names = ("num_cut", "num_tokens_cut", "num_bare", "num_no_items", "num_fewer_items")
    return {"num_prompts": num_prompts} | dict.fromkeys(names, 0) | others


def test_one_answer_to_everything_and_equal_answers_are_told():
    rows = [row(method, user, 0, "1", "5", 2) for method in ("population", "OPPU") for user in range(4)]
    rows += [row(method, user, 0, "1", str(user), 2) for method in ("group", "proper") for user in (3, 1, 2, 0)]
    rows += [row("words", user, 0, "1", str(user % 2), 2) for user in range(4)]
    methods = ["words", "population", "OPPU", "group", "proper", "not run"]
    assert answer_cautions(table(rows), methods) == [
        "LaMP_3: population, OPPU: one answer, '5', to all 4 questions.",
        "LaMP_3: group, proper gave identical answers to all 4 questions.",
    ]


@pytest.mark.parametrize(
    ("methods", "sections", "wanted"),
    [
        (["population", "OPPU", "proper", "PPlug"], {}, []),
        (["PLoRA", "proper-released", "group-released", "proper"], {}, ["PLoRA", "proper-released", "group-released"]),
        (["PLoRA", "OPPU"], {"plora": {"train_on": ["queries"]}}, []),
        (["group", "OPPU"], {"group": {"users": "all"}}, ["group"]),
        (["group", "proper"], {"group": {"user_vector": "table"}}, ["group", "proper"]),
        (["proper", "proper-joint"], {}, ["proper-joint"]),
        (["proper", "proper-user-gates"], {"router": {"users": "all", "train_on": ["history"]}}, ["proper"]),
    ],
)
def test_methods_that_learned_from_evaluated_users_are_named(methods, sections, wanted):
    config = config_of(methods, **sections)
    assert taught_by_asked(config, 0.5) == wanted
    assert taught_by_asked(config, 1.0) == [], "all that are asked are training users, from whom everything learns"
    lines = [line for line in run_cautions(config, {}, wanted) if "users who are asked" in line]
    assert [line.split(":")[0] for line in lines] == ([", ".join(wanted)] if wanted else [])


def test_tasks_that_label_priors_leave_out_are_told():
    config = config_of(["group", "group+prior", "population+prior"])
    assert prior_cautions(config, ["films"], ["films"]) == []
    (line,) = prior_cautions(config, ["films", "titles"], ["films"])
    assert line.startswith("group+prior, population+prior: not run on titles")
    assert prior_cautions(config_of(["group"]), ["titles"], []) == []


def test_choices_on_the_users_that_are_scored_are_told():
    choice = {"path": "best.yaml", "digest": "d", "overrides": {"plora.learning_rate": 1.0e-3}, "method": "PLoRA"}
    choice |= {"metric": "accuracy", "num_trials": 12}

    def told(split):
        return run_cautions(config_of(["PLoRA"], chosen_by=[choice | {"split": split}]), {}, [])

    assert told("tune") == []
    (line,) = told("dev")
    assert "plora.learning_rate: chosen on the same users that are scored here (dev), which flatters PLoRA" in line


def test_the_tables_mark_them_and_say_what_the_sign_means(tmp_path):
    report = write_run(tmp_path, ratings({"OPPU": 0.5, "PLoRA": 0.6}))
    assert "†" not in markdown_of(report) + html_of(report, [])
    report["taught_by_asked"] = ["PLoRA"]
    text = markdown_of(report)
    assert "| **PLoRA †** |" in text
    assert "OPPU †" not in text
    assert "†: weights shared by all users" in text
    assert "PLoRA †" in html_of(report, [])


def test_a_limit_on_users_own_training_is_told():
    user = {"max_history_items": 7}
    assert "newest 7 items" in " ".join(run_cautions(config_of(["OPPU"], user=user), {}, []))
    assert run_cautions(config_of(["OPPU"]), {}, []) == []


def test_profiles_of_whole_histories_are_told(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    recipes = {"read": {"like": "PAG", "prompt": {"profile": "file", "profile_file": str(tmp_path / "p.json")}}}
    config = config_of(["PAG", "read"], recipes=recipes)
    assert set(all_methods(config)) > {"PAG", "read"}
    assert [line.split(":")[0] for line in run_cautions(config, {}, [])] == ["read"]


def test_questions_without_room_are_told_from_five_in_a_hundred_on():
    config = config_of(["population", "PAG+RAG"])
    lane = METHODS["PAG+RAG"].lane
    few = {"dev": counts(100, num_cut=5, num_tokens_cut=50, num_no_items=5)}
    assert run_cautions(config, {"": few, lane: few}, []) == []
    plain = {"dev": counts(100, num_cut=6, num_tokens_cut=90), "train": counts(10, num_cut=10, num_tokens_cut=99)}
    lacking = {"dev": counts(100, num_no_items=33, num_fewer_items=50)}
    found = run_cautions(config, {"": plain, lane: lacking}, [])
    assert len(found) == 2
    assert "(population): 6% of the questions were cut" in found[0]
    assert "by 0.9 tokens" in found[0]
    assert found[1].startswith("PAG+RAG: ")
    assert "33% show the profile and none of the items found" in found[1]
    assert "50% show fewer items" in found[1]
