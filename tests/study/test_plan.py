"""From study files to runs: what varies, where data and base come from, and everything wrong said at once."""

from __future__ import annotations

import itertools

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.config import load_config
from proper_ds.errors import ConfigError
from proper_ds.study.load import load_study, load_sweep
from proper_ds.study.merge import merged
from proper_ds.study.plan import plan_runs
from proper_ds.study.trials import plan_trials
from tests.conftest import REPO
from tests.study.studies import RUN, write_study


def planned(path, *overrides):
    return plan_runs(load_study(path, overrides), str(path))


def test_tasks_variants_and_seeds_each_have_a_folder(tmp_path):
    variants = {"main": None, "wide": {"group.lora.r": 8}}
    path = write_study(tmp_path, tasks={"films": None, "books": {"seed_free": None}}, seeds=[1, 2], variants=variants)
    with pytest.raises(ConfigError, match=r"books/main and 3 more runs: seed_free: unknown key"):
        planned(path)
    path = write_study(tmp_path, tasks={"films": None, "books": None}, seeds=[1, 2], variants=variants)
    runs = planned(path)
    assert [run.name for run in runs[:4]] == ["films/main", "films/main-2", "films/wide", "films/wide-2"]
    assert [run.config.seed for run in runs] == [1, 2] * 4
    assert {run.config.data.path[0] for run in runs} == {str(tmp_path / "data" / t) for t in ("films", "books")}
    assert runs[2].config.group.lora.r == 8
    assert runs[2].config.group.lora.lora_alpha == 8, "the rest of the section stays"
    assert all(run.config.output_path.is_relative_to(tmp_path / "study") for run in runs)


def test_a_dry_run_lists_the_runs_and_makes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PROPER_DS_ROOT", str(REPO))
    path = write_study(tmp_path, tasks={"films": None, "books": None})
    shown = CliRunner().invoke(app, ["compare", str(path), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "films/main: " in shown.output
    assert "2 runs, all of them legal" in shown.output
    assert not (tmp_path / "study").exists()


def test_a_dry_run_refuses_what_the_study_would_refuse(tmp_path):
    changes = {"run": {"base": {"create": {}, "max_length": 120}, "evaluation": {"methods": ["base", "group"]}}}
    changes["run"]["evaluation"]["split"] = "test"
    path = write_study(tmp_path, vary={"group.num_experts": [2]}, **changes)
    command = ["compare", str(path), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert isinstance(shown.exception, ConfigError) or "would all read its test users" in shown.output
    assert shown.exit_code != 0
    assert CliRunner().invoke(app, [*command, "--again"]).exit_code == 0


def test_each_command_knows_the_files_of_the_others(tmp_path):
    study = write_study(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(RUN | {"output_dir": "x", "data": {"path": "y"}}))
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"output_dir": "x", "run": RUN, "parameters": {"seed": [1]}}))
    for load, wrong, command in (
        (load_config, study, "compare"),
        (load_config, sweep, "sweep"),
        (load_study, run, "run"),
        (load_study, sweep, "sweep"),
        (load_sweep, study, "compare"),
        (load_sweep, run, "run"),
    ):
        with pytest.raises(ConfigError, match=rf"Use `proper-ds {command} .*{wrong.name}`"):
            load(wrong)


def test_an_override_below_a_dotted_key_changes_what_is_there(tmp_path):
    limits = {"train": 5, "dev": 3}
    tasks = {"films": {"data.max_users_per_split": limits}}
    runs = planned(write_study(tmp_path, tasks=tasks), "tasks.films.data.max_users_per_split.dev=2")
    assert {str(run.config.data.max_users_per_split) for run in runs} == {"{'train': 5, 'dev': 2}"}


def test_factors_vary_one_at_a_time_or_all_together(tmp_path):
    vary = {"group.num_experts": [2, 4], "targets": {"attention": {"group.lora.target_modules": ["q_proj"]}}}
    names = [run.variant for run in planned(write_study(tmp_path, vary=vary))]
    assert names == ["main", "group.num_experts=2", "group.num_experts=4", "targets=attention"]
    grid = planned(write_study(tmp_path, vary=vary, vary_on="grid"))
    assert [run.variant for run in grid] == [f"group.num_experts={n},targets=attention" for n in (2, 4)]
    assert [run.config.group.num_experts for run in grid] == [2, 4]
    assert all(run.config.group.lora.target_modules == ["q_proj"] for run in grid)


def test_every_problem_is_told_before_anything_starts_and_once(tmp_path):
    vary = {"group.num_experts": [1, 2], "group.top_k": [5]}
    path = write_study(tmp_path, vary=vary, tasks={"films": None, "books": {"data.path": str(tmp_path / "no")}})
    with pytest.raises(ConfigError) as error:
        planned(path, "run.population.learning_rate=-1")
    text = str(error.value)
    assert text.count("more runs: population.learning_rate") == 1
    assert "and 7 more runs: population.learning_rate" in text
    assert "films/group.num_experts=1 and 1 more runs: group.num_experts" in text
    assert "group.top_k: 5 of 3 experts leaves none out" in text
    with pytest.raises(ConfigError, match=r"books: data.path: .*does not exist"):
        planned(write_study(tmp_path, tasks={"films": None, "books": {"data.path": str(tmp_path / "no")}}))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "Did you mean `seeds`"),
        ({"seeds": []}, "at least one of seeds"),
        ({"run": RUN | {"output_dir": "x"}}, "remove output_dir"),
        ({"tasks": {"../films": None}}, "folder names"),
        ({"tasks": {"data": None}}, "what the study generates lies there"),
        ({"tasks": {"films": {"seed": 3}}}, "use `output_dir` and `seeds`"),
        ({"generate": {"novels": {"num_users": 9}}}, "novels, which tasks does not have"),
        ({"vary": {"group.num_experts": [2, 2]}}, "made twice"),
        ({"vary": {"group.lora.layers": [[0, 1], "a/b"]}}, "no folder name"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        planned(write_study(tmp_path, **changes))


def test_no_two_runs_share_a_folder(tmp_path):
    variants = {"main": None, "main-2": {"group.lora.r": 8}}
    assert len(planned(write_study(tmp_path, variants=variants, seeds=[2, 3]))) == 4
    with pytest.raises(ConfigError, match=r"films/main-2: is the folder of variant main, seed 2 and of variant main-2"):
        planned(write_study(tmp_path, variants=variants, seeds=[1, 2]))


def test_prepared_data_is_looked_for_before_anything_runs(tmp_path):
    tasks = {"films": None, "books": {"data.prepared": str(tmp_path / "nowhere")}}
    with pytest.raises(ConfigError, match=r"books: data.prepared: .*nowhere holds no manifest\.json"):
        planned(write_study(tmp_path, tasks=tasks))


def test_variants_that_change_no_answer_are_refused(tmp_path):
    wrong = r"group.num_experts=3 and main: would give the same answers in all tasks"
    with pytest.raises(ConfigError, match=wrong):
        planned(write_study(tmp_path, vary={"group.num_experts": [3, 5]}, tasks={"films": None, "books": None}))
    with pytest.raises(ConfigError, match="fast and main"):
        planned(write_study(tmp_path, variants={"main": None, "fast": {"evaluation.num_tokens_per_batch": 512}}))
    # a task may have what a variant changes
    tasks = {"films": {"evaluation.ordinal": "median"}, "books": None}
    assert len(planned(write_study(tmp_path, vary={"evaluation.ordinal": ["median"]}, tasks=tasks))) == 4


def test_a_base_for_all_runs_takes_the_place_of_theirs(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}'
    )
    (run,) = planned(write_study(tmp_path), f"base={base}")
    assert run.config.base.model == str(base)
    assert run.config.base.create is None
    assert run.config.base.max_length == 120


def test_a_runs_file_is_found_beside_the_study(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"output_dir": "elsewhere", "seed": 9}))
    (run,) = planned(write_study(tmp_path, run="run.yaml"))
    assert (run.config.seed, run.config.group.num_experts) == (41, 3)


def test_generated_data_needs_no_folder(tmp_path):
    study = write_study(
        tmp_path, data_root=None, tasks={"made": None}, generate={"made": {"num_users": 20, "num_groups": 2}}
    )
    runs = planned(study)
    assert runs[0].config.data.path == [
        str(tmp_path / "study/data/made" / name) for name in ("generated_tags", "generated_ratings")
    ]


def test_a_data_root_that_no_task_reads_is_refused(tmp_path):
    generate = {"made": {"num_users": 20, "num_groups": 2}}
    with pytest.raises(ConfigError, match=r"data_root: .*data: no task reads it, each has data of its own or gener"):
        planned(write_study(tmp_path, tasks={"made": None}, generate=generate))
    assert len(planned(write_study(tmp_path, tasks={"made": None, "films": None}, generate=generate))) == 2


def test_a_task_takes_what_a_sweep_chose_unless_a_variant_says_otherwise(tmp_path):
    best = {"overrides": {"group.num_experts": 4}, "split": "dev", "method": "group", "metric": "f1", "num_trials": 2}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    tasks = {"films": {"chosen_by": str(tmp_path / "best.yaml")}, "books": None}
    films, books = planned(write_study(tmp_path, tasks=tasks))
    assert (films.config.group.num_experts, books.config.group.num_experts) == (4, 3)
    assert films.config.chosen_by[0].num_trials == 2
    assert books.config.chosen_by == []
    with pytest.raises(ConfigError, match=r"films/few: group.num_experts: given besides chosen_by"):
        planned(write_study(tmp_path, tasks=tasks, variants={"few": {"group": {"num_experts": 2}}}))


scalars = st.integers(0, 9)
paths = st.sampled_from(["group.num_experts", "group.lora.r", "user.lora.r", "user.min_steps", "seed"])


@given(st.lists(st.dictionaries(paths, scalars), max_size=4))
def test_the_last_layer_wins_and_nothing_else_changes(layers):
    flat = dict(itertools.chain.from_iterable(layer.items() for layer in layers))
    found = merged(*layers)
    for dotted, value in flat.items():
        inner = found
        for key in dotted.split("."):
            inner = inner[key]
        assert inner == value
    assert merged(found, {}) == found


def test_tables_of_numbers_are_replaced_and_sections_merge():
    before = {"user": {"rank_by_history": {1: 1, 10: 2}, "lora": {"r": 2, "lora_alpha": 4}}}
    found = merged(before, {"user.rank_by_history": {1: 4}}, {"user": {"lora": {"r": 4}}})
    assert found == {"user": {"rank_by_history": {1: 4}, "lora": {"r": 4, "lora_alpha": 4}}}
    assert before["user"]["rank_by_history"] == {1: 1, 10: 2}


STUDIES, SWEEPS = (sorted((REPO / "cluster" / kind).glob("*.yaml")) for kind in ("studies", "sweeps"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_with_it_are_sound(path, shared_data):
    study = yaml.safe_load(path.read_text())
    base = [] if "create" in study["run"]["base"] else [f"base={shared_data}/base_models/real-text-3m"]
    data = [] if "generate" in study else [f"data_root={shared_data}"]
    assert planned(path, *base, *data)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_it_are_sound(path, shared_data):
    given = [f"run.data.path={shared_data}/movie_rating", f"base={shared_data}/base_models/real-text-3m"]
    trials = plan_trials(load_sweep(path, given), str(path))
    assert (len(trials), trials[0].config.evaluation.split) == (12, "tune"), "every family has the same chance"


def test_one_run_takes_the_choices_of_all_shipped_sweeps(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("PROPER_DS_ROOT", str(REPO))
    given = [f"run.data.path={shared_data}/movie_rating", f"base={shared_data}/base_models/real-text-3m"]
    paths, chosen = [], {}
    for path in SWEEPS:
        trial = plan_trials(load_sweep(path, given), str(path))[-1]
        best = {"overrides": trial.overrides, "split": "tune", "method": path.stem, "metric": "mae", "num_trials": 12}
        (tmp_path / path.name).write_text(yaml.safe_dump(best))
        paths.append(str(tmp_path / path.name))
        chosen |= trial.overrides
    run = [f"data.path={shared_data}/movie_rating", f"base.model={shared_data}/base_models/real-text-3m"]
    config = load_config(REPO / "cluster/runs/fair_cpu.yaml", [*run, f"chosen_by={paths}"])
    assert [choice.method for choice in config.chosen_by] == [path.stem for path in SWEEPS]
    assert config.user_for("OPPU").learning_rate == chosen["adapter_sets.OPPU.learning_rate"]
    assert config.user_for("proper").learning_rate == chosen["adapter_sets.proper.learning_rate"]
    assert config.user_for("OPPU").learning_rate != config.user_for("proper").learning_rate
    assert config.evaluation.split == "dev"
