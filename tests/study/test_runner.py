"""Working through a study with runs that only pretend: failures, what is written down, test users, generated data."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from proper_ds.errors import ConfigError, FleetError, StudyError, UserError
from proper_ds.observe.progress import ProgressView
from proper_ds.study import runner
from proper_ds.study.config import GeneratedData
from proper_ds.study.finished import STATE
from proper_ds.study.load import load_study
from proper_ds.study.plan import plan_runs
from proper_ds.study.runner import Failure, compare, generate_data, raise_for, run_all
from tests.study.studies import write_study


def pretend(run):
    """What a run leaves for the tables."""
    root = run.config.output_path
    root.mkdir(parents=True, exist_ok=True)
    report = {"config_digest": f"{run.variant}", "stages": {"population": 2.5, "report": 0.5}}
    (root / "report.json").write_text(json.dumps(report))


@pytest.fixture
def planned(tmp_path):
    path = write_study(tmp_path, tasks={"films": None, "books": None}, vary={"group.num_experts": [2]})
    return plan_runs(load_study(path), str(path))


def state(tmp_path):
    found = json.loads((tmp_path / "study" / STATE).read_text())
    return found["is_partial"], [run["state"] for run in found["runs"]]


def test_one_that_fails_does_not_keep_the_others_from_running(planned, tmp_path):
    def do(run):
        if run.task == "films" and run.variant == "main":
            raise FleetError("its ranks were lost")
        if run.task == "books" and run.variant == "main":
            raise RuntimeError("a defect")
        pretend(run)

    tables = []
    finished, failures = run_all(planned, do, tmp_path / "study", lambda runs, folder: tables.append(len(runs)))
    assert tables == [2]
    assert [(run.task, run.variant) for run in finished] == [(t, "group.num_experts=2") for t in ("films", "books")]
    assert finished[0].seconds == 3
    assert finished[0].name == "films/group.num_experts=2"
    assert [str(failure) for failure in failures] == ["films/main: its ranks were lost", "books/main: a defect"]
    assert state(tmp_path) == (True, ["failed", "done", "failed", "done"])
    finished, failures = run_all(planned, pretend, tmp_path / "study", lambda runs, folder: None)
    assert (len(finished), failures) == (4, [])
    assert state(tmp_path) == (False, ["done"] * 4)


def test_ctrl_c_ends_the_study_and_what_is_done_is_on_record(planned, tmp_path):
    def do(run):
        if run.task == "books":
            raise KeyboardInterrupt
        pretend(run)

    tables = []
    with pytest.raises(KeyboardInterrupt):
        run_all(planned, do, tmp_path / "study", lambda runs, folder: tables.append([run.task for run in runs]))
    assert tables == [["films", "films"]]
    assert state(tmp_path) == (True, ["done", "done", "open", "open"])


def test_the_exit_code_says_who_must_mend_it(planned):
    def failures(*errors):
        return [Failure(run, error) for run, error in zip(planned, errors, strict=False)]

    with pytest.raises(UserError, match=r"2 of 4 runs failed, .*PARTIAL\n  films/main: no data") as error:
        raise_for(failures(UserError("no data"), UserError("no base")), 4)
    assert error.value.exit_code == 2
    with pytest.raises(StudyError, match="same command again") as error:
        raise_for(failures(UserError("no data"), FleetError("lost")), 4)
    assert error.value.exit_code == 1


def test_several_configurations_on_test_users_are_refused_before_anything_runs(tmp_path, monkeypatch):
    changes = {"run": {"base": {"create": {}, "max_length": 120}, "evaluation": {"methods": ["base", "group"]}}}
    changes["run"]["evaluation"]["split"] = "test"
    path = write_study(tmp_path, vary={"group.num_experts": [2]}, **changes)
    study = load_study(path)
    runs = plan_runs(study, str(path))
    with pytest.raises(ConfigError, match=r"films: films/main and films/group.num_experts=2 would all read"):
        compare(study, runs, ProgressView(None), again=False, command="")
    assert not (tmp_path / "study").exists()
    seeds = load_study(write_study(tmp_path, seeds=[1, 2], **changes))
    monkeypatch.setattr(runner, "run_all", lambda planned, do, folder, write: ([], []))
    monkeypatch.setattr(runner, "check_data", lambda planned, job_of: None)
    compare(seeds, plan_runs(seeds, str(path)), ProgressView(None), again=False, command="")


def test_data_of_all_runs_is_read_before_the_first_one_trains(tmp_path, monkeypatch):
    base = {"create": {}, "max_length": 120}
    run = {"base": base, "evaluation": {"methods": ["base"]}}
    path = write_study(tmp_path, tasks={"films": None, "books": {"evaluation.split": "tune"}}, run=run)
    (tmp_path / "data" / "films" / "dev.jsonl").write_text('{"user": "u", "history": "none"}')
    study = load_study(path)
    begun = []
    monkeypatch.setattr(runner, "run_all", lambda planned, do, folder, write: begun.append(planned))
    with pytest.raises(UserError, match=r"2 of 2 runs cannot begin[\s\S]*is `run.a.b`") as error:
        compare(study, plan_runs(study, str(path)), ProgressView(Console(quiet=True)), again=False, command="")
    assert "films/main: " in str(error.value) and "no questions of split 'tune'" in str(error.value)
    assert not begun
    assert state(tmp_path) == (True, ["open", "open"])


def test_generated_data_is_whole_or_not_there_and_keeps_its_numbers(tmp_path, monkeypatch):
    wanted = GeneratedData(num_users=8, num_groups=2)

    def cut(*args):
        yield 1, 8
        raise KeyboardInterrupt

    out = tmp_path / "data" / "small"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runner, "generate", cut)
        generate_data(wanted, out)
    assert not out.exists()
    generate_data(wanted, out)
    made = (out / "generated_tags" / "dev_questions.json").read_bytes()
    generate_data(wanted, out)
    assert (out / "generated_tags" / "dev_questions.json").read_bytes() == made
    with pytest.raises(UserError, match="generated with other numbers"):
        generate_data(GeneratedData(num_users=9, num_groups=2), out)
