"""A whole run through the command line: what it leaves, what a second run does, and its adapters in plain PEFT."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from proper_ds.data.prepared import PreparedData
from proper_ds.observe.metrics import read_events
from tests.end_to_end.runs import CONFIG, proper_ds, write_run

METHODS = ("base", "population", "group", "OPPU", "proper", "proper-released")


def answers(run, method):
    """(user, task, id) -> the row of the predictions file."""
    rows = [row for path in run.glob("predictions/*/units/*.parquet") for row in pq.read_table(path).to_pylist()]
    return {(row["user"], row["task"], row["id"]): row for row in rows if row["method"] == method}


def test_the_report_has_every_method_task_and_metric(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert tuple(report["methods"]) == METHODS
    for tasks in report["methods"].values():
        assert {task: set(scores) for task, scores in tasks.items()} == {
            "generated_tags": {"accuracy", "f1_macro"},
            "generated_ratings": {"mae", "rmse"},
        }
        for scores in tasks.values():
            for cell in scores.values():
                low, high = cell["interval"]
                assert low <= cell["value"] <= high
                assert isinstance(cell["user_mean"], float)
    page = (finished.folder / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "the page must need nothing else"
    assert "GENERATED data" in finished.output
    for name in METHODS:
        assert name in finished.output
    assert str(finished.folder / "report.html") in finished.output


def test_predictions_come_in_lamp_form_for_every_question(finished):
    for folder in sorted(finished.data.iterdir()):
        golds = json.loads((folder / "dev_outputs.json").read_text())
        for method in METHODS:
            made = json.loads((finished.folder / "predictions" / method / "lamp" / f"{folder.name}.json").read_text())
            assert made["task"] == golds["task"]
            assert {row["id"] for row in made["golds"]} == {row["id"] for row in golds["golds"]}
            assert all(isinstance(row["output"], str) for row in made["golds"])


def test_logs_name_who_wrote_them_and_nothing_noisy_is_printed(finished):
    names = {path.name for path in (finished.folder / "logs").iterdir()}
    assert {"driver.log", "population-rank-0.log", "population-rank-1.log", "user-actor-0.log"} <= names
    for noise in ("it/s]", "Warning", "accelerator", "deprecated", "Traceback"):
        assert noise not in finished.output
    events, _ = read_events(finished.folder / "metrics.jsonl", 0)
    assert {"population", "group/proper", "router/proper-released", "user", "evaluate"} <= {e["stage"] for e in events}


def test_a_second_run_trains_nothing_and_prints_the_same_table(finished):
    before, _ = read_events(finished.folder / "metrics.jsonl", 0)
    again = proper_ds("run", finished.yaml)
    after, _ = read_events(finished.folder / "metrics.jsonl", 0)
    assert after == before
    table = finished.output[finished.output.index("generated_tags (GENERATED") :]
    assert again.endswith(table)


def test_one_step_alone_and_what_it_lacks(finished, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(finished.folder, twin)
    run = write_run(twin, finished.data)
    lacking = proper_ds("run", run, "population.learning_rate=1e-3", "--steps", "evaluate", expect=2)
    assert "step evaluate needs population, which is not done" in lacking
    unknown = proper_ds("run", run, "--steps", "grupe", expect=2)
    assert "unknown step grupe; legal are prepare, base" in unknown
    made = proper_ds("run", run, "evaluation.num_bootstrap_samples=60", "--steps", "report")
    assert "report: done" in made
    assert "evaluate: " not in made


def test_check_prints_the_plan_and_starts_nothing(finished):
    plan = proper_ds("check", finished.yaml)
    for word in ("40 (", "516 history items", "ranks", "actors", "numbers", "tokens", "GENERATED data", "done"):
        assert word in plan, word
    bad = proper_ds("check", finished.yaml, "sede=1", "user.learning_rate=-1", "data.path=nowhere", expect=2)
    assert "sede" in bad
    assert "user.learning_rate" in bad
    assert "Traceback" not in bad


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(user number, key, folder) of users with questions, their adapters written by `store get`."""
    out = tmp_path_factory.mktemp("adapters")
    users = sorted({user for user, _, _ in answers(finished.folder, "OPPU")})[:8]
    found = []
    for number, user in enumerate(PreparedData(finished.folder / "prepared").users()):
        if number in users and user.history:
            proper_ds("store", "get", user.key, "--run", finished.folder, "--out", out / str(number))
            found.append((number, user, out / str(number)))
    return found


def label_scores(model, tokenizer, prompt_ids, labels):
    """Log-probability of each label after the prompt, one plain forward pass each."""
    scores = []
    for label in labels:
        ids = [*tokenizer(" " + label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
        start = len(prompt_ids) - 1
        scores.append(sum(float(logits[start + n, token]) for n, token in enumerate(ids)))
    return scores


def test_plain_peft_reproduces_the_predictions_of_oppu(finished, exported):
    run = finished.folder
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    expected = answers(run, "OPPU")
    others = answers(run, "population")
    tasks = PreparedData(run / "prepared").manifest.tasks
    compared = personal = 0
    for number, user, folder in exported:
        assert PeftConfig.from_pretrained(folder).peft_type == "LORA"
        base = AutoModelForCausalLM.from_pretrained(run / "base")
        merged = PeftModel.from_pretrained(base, run / "population" / "adapter").merge_and_unload()
        model = PeftModel.from_pretrained(merged, folder).eval()
        for query in user.queries:
            row = expected[number, query.task, query.id]
            if query.split != "dev":
                continue
            ids = tokenizer(query.input)["input_ids"]
            ids += tokenizer("\n### Output:", add_special_tokens=False)["input_ids"]
            if len(ids) > CONFIG["base"]["max_length"] - 10:
                continue
            scores = label_scores(model, tokenizer, ids, tasks[query.task].labels)
            torch.testing.assert_close(torch.tensor(scores), torch.tensor(row["scores"]), rtol=0, atol=2e-4)
            assert tasks[query.task].labels[scores.index(max(scores))] == row["prediction"]
            compared += 1
            personal += row["scores"] != others[number, query.task, query.id]["scores"]
    assert compared >= 15
    assert personal == compared


def test_store_get_says_what_is_missing(finished, tmp_path):
    run = finished.folder
    nobody = proper_ds("store", "get", "nobody", "--run", run, "--out", tmp_path / "a", expect=2)
    assert "no user 'nobody'" in nobody
    wrong = proper_ds("store", "get", "nobody", "--run", run, "--set", "opu", "--out", tmp_path / "a", expect=2)
    assert "no set 'opu'; it has OPPU, proper, proper-released" in wrong
    nowhere = proper_ds("store", "get", "nobody", "--run", tmp_path, "--out", tmp_path / "a", expect=2)
    assert "no run's folder" in nowhere


def test_the_written_configuration_is_the_resolved_one(finished):
    written = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert written["user"]["learning_rate"] == CONFIG["user"]["learning_rate"]
    assert written["user"]["lora"]["r"] == 4
    versions = json.loads((finished.folder / "versions.json").read_text())
    assert {"torch", "deepspeed", "ray", "peft", "transformers"} <= set(versions)
