"""A study and a sweep of two tiny runs each: shared stages are made once, tables come out, and a choice is followed."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.end_to_end.runs import CONFIG, proper_ds

METHODS = ["own-habit", "base", "population", "group"]


def small_run():
    """The tests' configuration, cut down to what a few methods need."""
    short = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    create = CONFIG["base"]["create"] | {"max_steps": 30}
    return {
        "base": CONFIG["base"] | {"create": create},
        "population": short,
        "group": short | {"num_experts": 3},
        "distributed": CONFIG["distributed"] | {"num_ranks": 1},
        "fleet": CONFIG["fleet"],
        "evaluation": {"num_bootstrap_samples": 50, "methods": METHODS},
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(the study's YAML, its folder, what it printed)."""
    root = tmp_path_factory.mktemp("study")
    raw = {
        "output_dir": str(root / "out"),
        "run": small_run(),
        "tasks": {"made": None},
        "generate": {"made": {"num_users": 30, "num_groups": 3}},
        "vary": {"group.num_experts": [2]},
    }
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path, root / "out", proper_ds("compare", path)


def test_two_runs_make_one_table_and_share_what_they_have_in_common(study):
    _, out, printed = study
    main, fewer = out / "made" / "main", out / "made" / "group.num_experts=2"
    for name in ("prepared", "base", "tokens", "population", "features", "predictions/base", "predictions/own-habit"):
        assert f"{name}: adopted from {main}" in printed
        assert json.loads((fewer / name / "done.json").read_text())["adopted_from"] == str(main)
    assert "adopted_from" not in json.loads((fewer / "group/proper/done.json").read_text())
    reports = [json.loads((run / "report.json").read_text()) for run in (main, fewer)]
    assert list(reports[0]["methods"]) == METHODS
    for method in ("own-habit", "base", "population"):
        assert reports[0]["methods"][method] == reports[1]["methods"][method]
        assert reports[0]["costs"][method] == reports[1]["costs"][method], "what was taken over costs what it cost"
    assert reports[1]["experts"]["group"]["num_experts"] == 2
    grouping = reports[0]["grouping"]["group"]
    assert (grouping["num_groups"], grouping["num_experts"]) == (3, 3)
    assert -1 <= grouping["strongest"]["adjusted_rand_index"] <= 1
    results = json.loads((out / "results.json").read_text())
    assert results["missing"] == []
    assert "Scores over questions" in printed
    assert (out / "results.md").exists()


def test_the_same_command_again_trains_nothing(study):
    path, _, printed = study
    again = proper_ds("compare", path)
    assert "report: begins" in printed
    assert not any(f"{step}: begins" in again for step in ("prepare", "base", "group", "floors", "report"))
    assert again.endswith(printed[printed.index("┏") :])


def test_a_sweep_shares_stages_between_trials_and_its_choice_is_on_record(study, tmp_path):
    _, out, _ = study
    data = [str(out / "data" / "made" / name) for name in ("generated_tags", "generated_ratings")]
    raw = {
        "output_dir": str(tmp_path / "sweep"),
        "run": small_run() | {"data": {"path": data}},
        "objective": {"method": ["population", "group"], "task": "generated_tags"},
        "parameters": {"group.num_experts": [2, 3]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    printed = proper_ds("sweep", path)
    assert printed.count("INFO population: adopted from") == 1
    trials = [json.loads(line) for line in (tmp_path / "sweep/trials.jsonl").read_text().splitlines()]
    assert [trial["problem"] for trial in trials] == ["", ""]
    assert "2 of 2 trials are done already" in proper_ds("sweep", path)
    best = yaml.safe_load((tmp_path / "sweep/best.yaml").read_text())
    assert best["value"] == max(trial["value"] for trial in trials)
    final = small_run() | {"output_dir": str(tmp_path / "final"), "chosen_by": str(tmp_path / "sweep/best.yaml")}
    (tmp_path / "final.yaml").write_text(yaml.safe_dump(final | {"data": {"path": data}}))
    proper_ds("check", tmp_path / "final.yaml")
    assert "given besides chosen_by" in proper_ds("check", tmp_path / "final.yaml", "group.num_experts=5", expect=2)
