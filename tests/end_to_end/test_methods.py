"""Every shipped method in one run, and that none needs an evaluated user's data to answer another's questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from proper_ds.config import RunConfig, load_config
from proper_ds.data.prompt_maker import PromptMaker, maker_for
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.records import User
from proper_ds.data.tokens import QUERY
from proper_ds.distributed.ranks import Ranks
from proper_ds.erasure.forget import forget
from proper_ds.evaluation.answers import read_answers
from proper_ds.evaluation.floors import predict_floors
from proper_ds.evaluation.label_prior import load_priors
from proper_ds.evaluation.methods import METHODS, needs_of
from proper_ds.evaluation.predict_job import PredictJob
from proper_ds.fleet.plan import Unit
from proper_ds.run_folder import in_lane, split_lane
from proper_ds.training.context import RunContext
from proper_ds.training.rank_jobs import make_stage
from tests.end_to_end.runs import CONFIG, proper_ds

CPU = torch.device("cpu")
FEW = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
FLOORS = [name for name, method in METHODS.items() if method.kind == "floor"]
MODELS = [name for name in METHODS if name not in FLOORS]


@dataclass(frozen=True)
class Case:
    """A finished run of all methods, and one of its evaluated users.

    Attributes:
        others: keys of all other evaluated users.
    """

    config: RunConfig
    index: int
    user: User
    others: list[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    root = tmp_path_factory.mktemp("methods")
    proper_ds("data", "generate", "--users", "24", "--groups", "2", "--seed", "3", "--out", root / "data")
    config = CONFIG | {
        "output_dir": str(root / "run"),
        "data": {"path": [str(root / "data/generated_tags"), str(root / "data/generated_ratings")]},
        "base": {"create": CONFIG["base"]["create"] | {"max_steps": 20}, "max_length": 120},
        "population": FEW,
        "group": FEW | {"num_experts": 2},
        "router": FEW,
        "joint": FEW,
        "pplug": FEW,
        "plora": FEW,
        "merge": {"num_anchors": 4, "num_neighbours": 2},
        "user": {"learning_rate": 2e-2, "users": "needed", "start": "learned"},
        "start": {"max_steps": 2, "per_device_train_batch_size": 4, "adapter_sets": ["proper", "OPPU"]},
        "distributed": CONFIG["distributed"] | {"num_ranks": 1},
        "evaluation": {"num_bootstrap_samples": 50, "methods": list(METHODS)},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    proper_ds("run", path)
    loaded = load_config(path)
    asked = [
        (index, user)
        for index, user in enumerate(RunContext(loaded, CPU).prepared.users())
        if any(query.split == "dev" for query in user.queries)
    ]
    index, user = max(asked[1:], key=lambda pair: len(pair[1].history))
    return Case(loaded, index, user, [other.key for _, other in asked if other.key != user.key])


def answers_of(config: RunConfig, case: Case) -> dict[tuple[str, str, str], tuple]:
    """(method, task, question) -> what the method says to the user's questions, asked alone, in this run's folder."""
    context, found = RunContext(config, CPU), list[pa.Table]()
    job = PredictJob(config, CPU)
    for method in MODELS:
        folder = context.folder.stage(f"predictions/{method}").path
        shutil.rmtree(folder / "units")
        job.run(Unit(case.index, case.index + 1, 1, f"predictions/{method}", 1))
        found.append(read_answers(folder))
    floors = predict_floors(context.prepared, "dev", "train", FLOORS, config.seed, 10_000)
    rows = [row for table in (*found, floors) for row in table.to_pylist() if row["user"] == case.index]
    return {
        (row["method"], row["task"], row["id"]): (row["prediction"], row["scores"], row["gates"], row["personal"])
        for row in rows
    }


def prompts_of(config: RunConfig, case: Case) -> dict[str, list[str]]:
    """By lane, every prompt of the user, for training and for answering, made anew from the run's prepared data."""
    context, base = RunContext(config, CPU), config.base
    encoder = PromptEncoder(context.tokenizer, base.prompt_suffix, base.max_length)
    found = {}
    for lane in needs_of(config).lanes:
        out = context.folder.root / "made-again" / lane.recipe.lane
        out.mkdir(parents=True, exist_ok=True)
        maker = maker_for(lane.recipe, context.prepared, encoder, out, out, "train", config.seed)
        for user in context.prepared.users():  # whoever comes first leaves no trace in what comes later
            made = _all_prompts(maker, user)
            if user.key == case.user.key:
                found[lane.recipe.lane] = made
    return found


def _all_prompts(maker: PromptMaker, user: User) -> list[str]:
    history = [maker.history(user, position, 8) for position in range(len(user.history))]
    return history + [maker.query(user, position, 8) for position in range(len(user.queries))]


def copied(case: Case, folder: Path, without_others: bool) -> RunConfig:
    """The run in another folder, from which all other evaluated users were taken out."""
    shutil.copytree(case.config.output_path, folder)
    config = case.config.model_copy(update={"output_dir": str(folder)})
    if without_others:
        forget(config, folder, case.others)
    return config


def test_every_method_answers_every_question(case):
    report = json.loads((case.config.output_path / "report.json").read_text())
    assert set(report["methods"]) == set(METHODS)
    context = RunContext(case.config, CPU)
    asked = {q.id for user in context.prepared.users() for q in user.queries if q.split == "dev"}
    for name, method in METHODS.items():
        rows = read_answers(context.folder.stage(f"predictions/{name}").path).to_pylist()
        assert {row["id"] for row in rows} == asked
        assert all(row["method"] == name for row in rows)
        if method.user_lora or method.kind in ("PPlug", "PLoRA", "merged"):
            assert all(row["personal"] == (row["num_history"] > 0) for row in rows), name


def test_label_priors_were_fitted_to_training_questions_and_weigh_answers(case):
    context = RunContext(case.config, CPU)
    train = sum(q.split == "train" for user in context.prepared.users() if user.history for q in user.queries)
    for name in ("population", "group"):
        stage = f"prior/{'proper' if name == 'group' else name}"
        folder = context.folder.stage(stage).path
        assert sorted(path.name for path in folder.iterdir()) == ["begun.json", "done.json", "prior.json"]
        priors = load_priors(folder)
        assert sum(prior.num_questions for prior in priors.values()) == train
        plain, weighed = (
            {(row["user"], row["task"], row["id"]): row for row in read_answers(path).to_pylist()}
            for path in (context.folder.stage(f"predictions/{name}{end}").path for end in ("", "+prior"))
        )
        users = list(context.prepared.users())
        for key, row in plain.items():
            own = [item.answer for item in users[key[0]].history if item.task == key[1]]
            assert weighed[key]["scores"] == pytest.approx(priors[key[1]].weighed(row["scores"], own), abs=1e-3)


def test_no_answer_needs_another_evaluated_users_data(case, tmp_path):
    """Forgetting everybody else who is asked, data, prompts, features, vectors and adapters, changes no answer."""
    with_them = answers_of(copied(case, tmp_path / "with", without_others=False), case)
    without = answers_of(copied(case, tmp_path / "without", without_others=True), case)
    assert {method for method, _, _ in with_them} == set(METHODS)
    for question, said in with_them.items():
        assert without[question] == said, question


def check_prompts(case: Case, tmp_path: Path) -> None:
    """Raise AssertionError where a prompt is another one once all other evaluated users are gone."""
    with_them = prompts_of(copied(case, tmp_path / "with", without_others=False), case)
    without = prompts_of(copied(case, tmp_path / "without", without_others=True), case)
    assert len(with_them) == len({method.lane for method in METHODS.values() if method.kind != "floor"})
    assert with_them == without


def test_no_prompt_needs_another_evaluated_users_data(case, tmp_path):
    check_prompts(case, tmp_path)


def test_a_method_that_reads_other_users_data_is_caught(case, tmp_path, monkeypatch):
    """What is planted tells each prompt of a split those before it; whatever it saw goes with its maker."""
    honest = PromptMaker.query

    def telling(split):
        def query(self, user, position, num_reserved):
            made = honest(self, user, position, num_reserved)
            seen = vars(self).setdefault("seen", [])
            if user.queries[position].split == split:
                seen.append(made)
            return "\n".join([made, *seen])

        return query

    monkeypatch.setattr(PromptMaker, "query", telling("train"))
    check_prompts(case, tmp_path / "training users")
    monkeypatch.setattr(PromptMaker, "query", telling("dev"))
    with pytest.raises(AssertionError):
        check_prompts(case, tmp_path / "evaluated users")


@pytest.fixture
def one_rank(tmp_path) -> Iterator[Ranks]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield Ranks(0, 1, CPU)
    torch.distributed.destroy_process_group()


def test_nothing_shared_learns_from_what_it_must_not_see(case, one_rank):
    """No stage learns a question of an evaluated user; their histories teach only what says so (`users: all`)."""
    context, found = RunContext(case.config, CPU), dict[str, set[int]]()
    asked = {index for index, user in enumerate(context.prepared.users()) if user.key in {*case.others, case.user.key}}
    names = [name for lane in needs_of(case.config).lanes for name in lane.stages("encoder")]
    for name in names:
        kind = name.partition("/")[0].partition("@")[0]
        if kind not in ("population", "group", "pplug", "plora", "router", "start") and "-joint" not in name:
            continue
        stage = make_stage(name, context, one_rank)
        tokens, indices = replace(context, lane=split_lane(name)[1]).tokens, stage.indices()
        examples = tokens.examples(np.concatenate([indices.block(n).indices for n in range(len(indices.counts))]))
        assert examples, name
        assert not any(e.kind == QUERY and e.user in asked for e in examples), name
        found[name] = {e.user for e in examples} & asked
    kinds = {split_lane(name)[0].partition("/")[0] for name in found}
    assert kinds == {"population", "group", "pplug", "plora", "router", "start", "store"}
    taught = {name for name, users in found.items() if users}
    assert taught == {"plora", "group/proper-released", "store/proper-joint"}, "histories of evaluated users"


def test_lanes_have_stages_of_their_own(case):
    context = RunContext(case.config, CPU)
    plain, rag = (replace(context, lane=lane).tokens for lane in ("", METHODS["RAG"].lane))
    assert rag.marker["num_tokens"] > plain.marker["num_tokens"]
    for name in ("population", "store/OPPU", "group/proper", "start/proper", "router/proper"):
        assert context.folder.stage(in_lane(name, METHODS["RAG"].lane)).inputs() is not None
