"""Sweeps: which trials there are, how they share a cluster, what is chosen, and that test users never choose."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from proper_ds.config import load_config
from proper_ds.errors import ConfigError, StudyError, UserError
from proper_ds.fleet.cluster import Cluster, Node
from proper_ds.observe.log import get_logger
from proper_ds.observe.progress import ProgressView
from proper_ds.study import sweep as module
from proper_ds.study.config import Objective
from proper_ds.study.load import load_sweep
from proper_ds.study.sweep import BEST, LOG, Process, _settle, check_objective, share_of, work_through
from proper_ds.study.trials import Score, plan_trials, score_of
from tests.study.studies import RUN, write_study

NUM_EXPERTS = {"group.num_experts": [2, 3, 4]}


def write_sweep(tmp_path, **changes):
    write_study(tmp_path)
    run = RUN | {"data": {"path": str(tmp_path / "data/films")}}
    sweep = {"output_dir": str(tmp_path / "sweep"), "run": run, "parameters": NUM_EXPERTS}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep | {"objective": {"method": "group"}} | changes, sort_keys=False))
    return path


def trials_of(path):
    return plan_trials(load_sweep(path), str(path))


def test_a_grid_has_all_combinations_each_in_a_folder_after_its_values(tmp_path):
    path = write_sweep(tmp_path, parameters=NUM_EXPERTS | {"group.lora.r": [2, 4]})
    trials = trials_of(path)
    assert [(t.config.group.num_experts, t.config.group.lora.r) for t in trials] == [
        (n, r) for n in (2, 3, 4) for r in (2, 4)
    ]
    assert all(t.config.evaluation.methods == ["group"] and t.config.evaluation.split == "dev" for t in trials)
    fewer = trials_of(write_sweep(tmp_path, parameters={"group.num_experts": [3], "group.lora.r": [4]}))
    assert fewer[0].config.output_path == trials[3].config.output_path


def test_random_trials_are_different_within_bounds_and_the_same_every_time(tmp_path):
    parameters = {
        "group.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "group.num_experts": {"low": 2, "high": 9, "integer": True},
        "group.train_on": [["history"], ["history", "queries"]],
    }
    path = write_sweep(tmp_path, parameters=parameters, search="random", num_trials=20)
    first, again = trials_of(path), trials_of(path)
    assert [t.overrides for t in first] == [t.overrides for t in again]
    assert len({t.name for t in first}) == 20
    assert all(1e-4 <= t.config.group.learning_rate <= 1e-2 and 2 <= t.config.group.num_experts <= 9 for t in first)
    assert sum(t.config.group.learning_rate < 1e-3 for t in first) > 4, "half of a log range lies below 1e-3"
    other = trials_of(write_sweep(tmp_path, parameters=parameters, search="random", num_trials=20, search_seed=1))
    assert [t.overrides for t in first] != [t.overrides for t in other]
    with pytest.raises(ConfigError, match="There are 3 different ones"):
        trials_of(write_sweep(tmp_path, search="random", num_trials=4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"method": "group", "split": "test"}}, "never made on test users"),
        ({"parameters": {"evaluation.split": ["dev", "test"]}}, "evaluation.split cannot be swept"),
        ({"objective": {"method": "groop"}}, "groop"),
        ({"parameters": {"group.num_expert": [2]}}, "Did you mean `num_experts`"),
        ({"parameters": {"group.num_experts": {"low": 2, "high": 4}}}, "a grid needs lists"),
        ({"num_trials": 3}, "num_trials with search `random`"),
        ({"parameters": {"group.num_experts": []}}, "has no values"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        trials_of(write_sweep(tmp_path, **changes))


@pytest.mark.parametrize(
    ("method", "parameters", "idle"),
    [
        ("population", NUM_EXPERTS, "group.num_experts"),
        ("OPPU", {"router.learning_rate": [1e-3, 2e-3], "user.learning_rate": [1e-3, 2e-3]}, "router.learning_rate"),
        ("group", {"evaluation.confidence": [0.9, 0.95]}, "evaluation.confidence"),
        (["OPPU", "proper"], {"router.learning_rate": [1e-3, 2e-3]}, None),
        ("RAG", {"recipes.RAG.prompt.num_retrieved": [1, 4]}, None),
        ("group", {"evaluation.ordinal": ["mode", "median"]}, None),
    ],
)
def test_parameters_without_effect_on_the_objective_are_refused(tmp_path, method, parameters, idle):
    run = {"base": RUN["base"], "data": {"path": str(tmp_path / "data/films")}}
    path = write_sweep(tmp_path, run=run, objective={"method": method}, parameters=parameters)
    if idle is None:
        assert len(trials_of(path)) == 2
    else:
        with pytest.raises(ConfigError, match=rf"parameters\.{idle}: has no effect"):
            trials_of(path)


def test_trials_that_must_give_the_same_answers_are_refused(tmp_path):
    wrong = r"num_experts=2 \(1\) and group.num_experts=2 \(2\) would give the same answers"
    with pytest.raises(ConfigError, match=wrong):
        trials_of(write_sweep(tmp_path, parameters={"group.num_experts": [2, 2, 3]}))


def report(value=0.5, other=0.4, metric="accuracy", higher=True):
    tasks = {"films": {"metrics": {metric: higher}}}
    return {
        "tasks": tasks,
        "methods": {"group": {"films": {metric: {"value": value}}}, "OPPU": {"films": {metric: {"value": other}}}},
    }


def test_the_score_is_the_best_methods_in_the_metrics_direction():
    both = Objective(method=["group", "OPPU"])
    assert score_of(report(), both).method == "group"
    error = score_of(report(metric="mae", higher=False), both)
    assert (error.method, error.metric, error.value) == ("OPPU", "mae", 0.4)
    assert score_of(report(value=float("nan")), both).method == "OPPU"
    with pytest.raises(UserError, match="has accuracy"):
        score_of(report(), Objective(method="group", metric="f1"))
    with pytest.raises(UserError, match="name one"):
        score_of(report() | {"tasks": {"a": {"metrics": {}}, "b": {"metrics": {}}}}, Objective(method="group"))


def test_trials_at_the_same_time_share_the_cluster_evenly(tmp_path):
    config = trials_of(write_sweep(tmp_path))[0].config
    cluster = Cluster({"a": Node(4, 0), "b": Node(4, 0)}, on_gpu=False, is_ours=True)
    assert share_of(config, cluster, 1).fleet.num_actors == "auto"
    assert share_of(config, cluster, 4).fleet.num_actors == 2
    four = config.model_copy(update={"distributed": config.distributed.model_copy(update={"num_ranks": 4})})
    assert share_of(four, cluster, 2).distributed.num_ranks == 4
    with pytest.raises(ConfigError, match=r"distributed.num_ranks: 4 in each of 3 trials"):
        share_of(four, cluster, 3)
    growing = Cluster(cluster.nodes, on_gpu=False, is_ours=False)
    assert share_of(four, growing, 3).distributed.num_ranks == 4


class Pretended(Process):
    """A trial that ends at once, with a report or an exit code."""

    def __init__(self, trial, code=0, seconds=0.0):
        root = trial.config.output_path
        root.mkdir(parents=True, exist_ok=True)
        (root / "report.json").write_text(json.dumps(report(value=trial.config.group.num_experts / 10)))
        self._output = root.parent / f"{trial.name}.log"
        self._file = self._output.open("w")
        self.trial, self._start_s = trial, 0.0
        program = f"import time; print('error: lost its ranks'); time.sleep({seconds}); raise SystemExit({code})"
        self._process = subprocess.Popen([sys.executable, "-c", program], stdout=self._file)


def test_failed_trials_are_named_and_the_best_of_the_others_is_kept(tmp_path):
    path = write_sweep(tmp_path, max_concurrent=2)
    config, trials, told = load_sweep(path), trials_of(path), []
    view = ProgressView(Console(quiet=True))

    def start(trial):
        return Pretended(trial, code=trial.config.group.num_experts == 4)

    results = work_through(trials, config, start, view, told.append)
    assert told == results
    with pytest.raises(StudyError, match=r"1 of 3 trials failed(.|\n)*exit code 1: error: lost its ranks"):
        _settle(results, config, tmp_path / "sweep")
    best = yaml.safe_load((tmp_path / "sweep" / BEST).read_text())
    assert (best["overrides"], best["value"], best["num_trials"]) == ({"group.num_experts": 3}, 0.3, 2)
    assert (best["split"], best["method"], best["metric"]) == ("dev", "group", "accuracy")


def test_a_tie_is_told_and_on_record(tmp_path, caplog):
    config, trials = load_sweep(path := write_sweep(tmp_path)), trials_of(path)
    (tmp_path / "sweep").mkdir()
    scores = [Score("group", "films", "accuracy", value, True) for value in (0.25, 0.5, 0.5)]
    results = [module.Result(trial, score, "", 1.0) for trial, score in zip(trials, scores, strict=True)]
    get_logger().addHandler(caplog.handler)
    assert _settle(results, config, tmp_path / "sweep")[0] is trials[1]
    get_logger().removeHandler(caplog.handler)
    assert "2 of 3 trials tie at accuracy 0.5000" in caplog.text
    assert yaml.safe_load((tmp_path / "sweep" / BEST).read_text())["num_tied"] == 2


def test_an_objective_that_the_data_cannot_have_is_refused_before_a_trial(tmp_path):
    run = RUN | {"data": {"path": str(tmp_path / "data/films")}, "base": {"create": {}, "max_length": 120}}
    for objective, said in (
        ({"method": "group", "metric": "mae"}, r"given 'mae'; generic has .*rouge-1"),
        ({"method": "group", "task": "LaMP_4"}, r"given 'LaMP_4'; the data has generic"),
        ({"method": "group", "split": "tune"}, "no questions of split 'tune'"),
    ):
        path = write_sweep(tmp_path, run=run, objective=objective)
        trial = trials_of(path)[0].config
        with pytest.raises(UserError, match=said):
            check_objective(trial, load_sweep(path), ProgressView(Console(quiet=True)))


def test_no_trial_outlives_its_sweep(tmp_path):
    path = write_sweep(tmp_path, max_concurrent=3)
    config, trials, started = load_sweep(path), trials_of(path), []

    def start(trial):
        started.append(Pretended(trial, seconds=0 if not started else 60))
        return started[-1]

    def stop(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_through(trials, config, start, ProgressView(Console(quiet=True)), stop)
    assert len(started) == 3
    assert not any(process.is_running for process in started)


def test_a_trial_is_on_record_when_it_ends(tmp_path):
    path = write_sweep(tmp_path)
    trial = trials_of(path)[0]
    (tmp_path / "sweep").mkdir()
    module._tell(module.Result(trial, score_of(report(), Objective(method="group")), "", 1.0), tmp_path / "sweep")
    (line,) = [json.loads(line) for line in (tmp_path / "sweep" / LOG).read_text().splitlines()]
    assert (line["trial"], line["overrides"], line["value"]) == (trial.name, {"group.num_experts": 2}, 0.5)
    assert line["config_hash"] == trial.config_hash


@pytest.fixture
def chosen(tmp_path):
    """A run's YAML that takes what a sweep chose."""
    best = {"overrides": {"group.num_experts": 4, "group.lora.r": 2}, "split": "dev", "method": "group"}
    best |= {"metric": "accuracy", "num_trials": 3, "value": 0.5}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    run = RUN | {"output_dir": str(tmp_path / "run"), "data": {"path": "somewhere"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"chosen_by": str(tmp_path / "best.yaml")}))
    return tmp_path / "run.yaml"


def test_a_choice_is_followed_and_recorded(chosen, tmp_path):
    config = load_config(chosen)
    assert (config.group.num_experts, config.group.lora.r) == (4, 2)
    assert config.group.lora.lora_alpha == 8
    (choice,) = config.chosen_by
    assert (choice.split, choice.method, choice.metric, choice.num_trials) == ("dev", "group", "accuracy", 3)
    assert choice.overrides == {"group.num_experts": 4, "group.lora.r": 2}
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "best.yaml").unlink()
    assert load_config(written) == config, "a written configuration needs the sweep's file no more"


def test_a_sweep_may_build_on_what_another_chose(chosen, tmp_path):
    run = yaml.safe_load(chosen.read_text()) | {"data": {"path": str(tmp_path / "data/films")}}
    del run["output_dir"]
    trials = trials_of(write_sweep(tmp_path, run=run, parameters={"group.learning_rate": [1e-3, 2e-3]}))
    assert [trial.config.group.num_experts for trial in trials] == [4, 4]
    assert trials[0].config.chosen_by[0].method == "group"
    with pytest.raises(ConfigError, match=r"group.num_experts: given besides chosen_by"):
        trials_of(write_sweep(tmp_path, run=run, parameters=NUM_EXPERTS))


def test_a_choice_is_not_contradicted_unnoticed(chosen, tmp_path):
    with pytest.raises(ConfigError, match=r"group.num_experts: given besides chosen_by"):
        load_config(chosen, ["group.num_experts=3"])
    for section in ("group={num_experts: 4}", "group.lora={r: 2}"):
        with pytest.raises(ConfigError, match=r"group.num_experts|group.lora.r: given besides chosen_by"):
            load_config(chosen, [section])
    (tmp_path / "best.yaml").write_text("overrides: 3\n")
    with pytest.raises(ConfigError, match=r"Give a best\.yaml"):
        load_config(chosen)


def test_a_choice_on_record_is_the_one_that_is_followed(chosen, tmp_path):
    """Also where the record is all that is left of the sweep: in a configuration that a run wrote down."""
    raw = load_config(chosen).model_dump(mode="json")
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"group.lora.r: given besides chosen_by"):
        load_config(written, ["group.lora.r=8"])
    raw["group"]["lora"]["r"] = 8
    written.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"group.lora.r: is not 2, which .*best\.yaml is on record to choose"):
        load_config(written)


def test_several_choices_are_followed_unless_they_contradict_each_other(chosen, tmp_path):
    run = yaml.safe_load(chosen.read_text())
    best = {"split": "tune", "method": "OPPU", "metric": "mae", "num_trials": 3}

    def load(**overrides):
        other = tmp_path / "other.yaml"
        other.write_text(
            yaml.safe_dump(best | {"overrides": {key.replace("__", "."): v for key, v in overrides.items()}})
        )
        chosen.write_text(yaml.safe_dump(run | {"chosen_by": [str(tmp_path / "best.yaml"), str(other)]}))
        return load_config(chosen)

    config = load(population__learning_rate=0.5, group__num_experts=4)
    assert (config.population.learning_rate, config.group.lora.r) == (0.5, 2)
    assert [(choice.method, choice.split, choice.metric) for choice in config.chosen_by] == [
        ("group", "dev", "accuracy"),
        ("OPPU", "tune", "mae"),
    ]
    with pytest.raises(ConfigError, match=r"other\.yaml chose group.num_experts: 5, .*best\.yaml chose .* 4"):
        load(group__num_experts=5)
    with pytest.raises(ConfigError, match=r"other\.yaml chose group.lora: .*best\.yaml chose group.lora.r: 2"):
        load(group__lora={"r": 2})
