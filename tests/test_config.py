"""Configuration: every mistake is reported, all at once, with the key and the mend; every shipped file is legal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from proper_ds.config import RunConfig, load_config, parse_yaml
from proper_ds.distributed.ds_config import read_ds_file, resolve_ds
from proper_ds.errors import ConfigError
from proper_ds.section import Section
from proper_ds.training.config import GroupConfig
from tests.conftest import REPO

GOOD = {"output_dir": "runs/x", "data": {"path": "data/x"}, "base": {"model": "org/base"}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("PROPER_DS_ROOT", str(REPO))

    def do(raw=GOOD, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
        return load_config(path, overrides)

    return do


def problems(load, *overrides, raw=GOOD):
    with pytest.raises(ConfigError) as caught:
        load(raw, *overrides)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_the_smallest_run_is_legal(load):
    config = load()
    assert config.data.path == [str(REPO / "data/x")]
    assert config.output_dir == str(REPO / "runs/x")
    assert config.base.model == "org/base", "a hub name is no path"


BAD = [
    ("population.learning_rte=1e-3", "population.learning_rte", "unknown key.*Did you mean `learning_rate`"),
    ("populaton.learning_rate=1", "populaton", "Did you mean `population`"),
    ("seed=minus", "seed", "'minus' is not legal.*integer"),
    ("seed=-1", "seed", "greater than or equal to 0"),
    ("population.learning_rate=0", "population.learning_rate", "greater than 0"),
    ("population.train_on=[]", "population.train_on", "give `history`, `queries` or both"),
    ("population.train_on=[histories]", "population.train_on", "'history'"),
    ("user.lora.target_modules=[]", "user.lora.target_modules", "at least one module name"),
    ("user.lora.lora_dropout=1", "user.lora.lora_dropout", "less than 1"),
    ("user.lora.rank=4", "user.lora.rank", "unknown key.*Legal keys here: .*lora_alpha"),
    ("user.users=some", "user.users", "'all' or 'needed'"),
    ("group.num_experts=1", "group.num_experts", "greater than or equal to 2"),
    ("evaluation.methods=[proper,magic]", "evaluation.methods", "magic"),
    ("evaluation.max_floor_examples=9", "evaluation.max_floor_examples", "no effect without such methods"),
    ("recipes={RAG: {prompt: {num_retrieved: 0}}}", "recipes.RAG.prompt.num_retrieved", "greater than or equal to 1"),
    ("recipes={RAG: {prompt: {top: 3}}}", "recipes.RAG.prompt.top", "unknown key.*num_retrieved"),
    ("recipes={mine: {like: RAK}}", "recipes.mine.like", "Did you mean `RAG`"),
    ("recipes={mine: {like: PLoRA}}", "recipes.mine", "nothing to change"),
    ("recipes={mine: {like: RAG}}", "recipes.mine", "not evaluated"),
    ("recipes={PAG: {prompt: {num_retrieved: 3}}}", "recipes.PAG.prompt.num_retrieved", "no effect without"),
    ("recipes={a/b: {like: RAG}}", "recipes.a/b", "cannot name a method"),
    ("evaluation.methods=[proper,proper]", "evaluation.methods", "each once"),
    ("fleet.num_actors=many", "fleet.num_actors", "auto"),
    ("store.dtype=int4", "store.dtype", "'float32', 'bfloat16' or 'int8'"),
    ("data.path=null", "data.path", "not set.*data.path=FOLDER"),
    (
        "evaluation.methods=[base,popluation,oppu]",
        "evaluation.methods",
        "no method 'popluation', 'oppu'.*`population` for.*`OPPU` for",
    ),
    ("population=3", "population", "Give a section of keys"),
    ("data.path=[]", "data.path", "not set.*data.path=FOLDER"),
    ("data.prepared=x", "data.prepared", "Keep one of the two"),
    ("base.model=null", "base.model", "not set.*base.create"),
    ("base.create={}", "base.model", "together with base.create"),
    ("user.num_tokens_per_batch=100", "user.num_tokens_per_batch", "cannot hold one example"),
    ("user.lora.target_modules=[q_proj]", "user.lora.target_modules", "lacks down_proj, gate_proj, up_proj"),
    ("evaluation.split=train", "evaluation.split", "also data.train_split"),
    ("prior.max_users=5", "prior.max_users", "no effect without a method with a label prior"),
    ("distributed.deepspeed=none.json", "distributed.deepspeed", "No such file.*ds_configs/zero2.json"),
    ("distributed.min_ranks=2", "distributed.min_ranks", "more than distributed.num_ranks 1"),
    ("output_dir=", "output_dir", "not legal"),
    ("seed", "seed", "is no override"),
    ("seed.deeper=1", "seed", "not legal"),
    ("data.path=[", "data.path", "is not YAML"),
]


@pytest.mark.parametrize(("override", "key", "message"), BAD, ids=[b[0] for b in BAD])
def test_each_mistake_names_its_key_and_its_mend(load, override, key, message):
    import re

    found = problems(load, override)
    assert key in found, found
    assert re.search(message, found[key]), found[key]


def test_label_priors_need_likelihoods_and_other_questions_than_those_that_are_scored(load):
    with_prior = "evaluation.methods=[population,group+prior]"
    found = problems(load, with_prior, "evaluation.closed_labels=generate")
    assert "no likelihoods" in found["evaluation.closed_labels"]
    histories = [f"{name}.train_on=[history]" for name in ("population", "group")]
    found = problems(load, with_prior, "evaluation.split=train", *histories)
    assert "leave out methods that end in +prior" in found["evaluation.split"]


def test_options_without_effect_are_mistakes(load):
    found = problems(load, "user.lr_scheduler_type=constant", "user.warmup_ratio=0.1")
    assert "no effect" in found["user.warmup_ratio"]
    raw = GOOD | {"data": {"prepared": "p", "task": "LaMP_3"}}
    assert "no effect on prepared data" in problems(load, raw=raw)["data.task"]
    found = problems(load, "evaluation.closed_labels=generate", "evaluation.ordinal=median")
    assert "no effect on generated answers" in found["evaluation.ordinal"]
    found = problems(load, "evaluation.methods=[base, OPPU]", "evaluation.references=[OPPU, proper]")
    assert "'proper' is not in evaluation.methods" in found["evaluation.references"]
    assert "no effect without method proper-joint" in problems(load, "joint.max_users=5")["joint.max_users"]
    with_joint = "evaluation.methods=[proper,proper-joint]"
    assert load(GOOD, "joint.max_users=5", with_joint).joint.max_users == 5


def test_sections_of_methods_that_are_not_asked_for_have_no_effect(load):
    found = problems(
        load, "pplug.temperature=0.2", "pplug.pooling=cls", "plora.user_vector_size=8", "merge.num_anchors=2"
    )
    assert "no effect without method PPlug" in found["pplug.temperature"]
    assert "no effect without pplug.encoder" in found["pplug.pooling"]
    assert "no effect without method PLoRA" in found["plora.user_vector_size"]
    assert "more than merge.num_anchors 2" in found["merge.num_neighbours"]


def test_a_learned_start_refuses_what_cannot_go_with_it(load):
    assert "start.learning_rate" in problems(load, "start.learning_rate=0.1")
    learned = "user.start=learned"
    with_oppu = "evaluation.methods=[base,OPPU]"
    assert "adapters of proper" in problems(load, learned, with_oppu)["user.start"]
    assert load(GOOD, learned, with_oppu, "start.adapter_sets=[OPPU]").learned_sets == ["OPPU"]
    both = "start.adapter_sets=[proper,OPPU]"
    assert "adapters of proper" in problems(load, learned, with_oppu, both)["start.adapter_sets"]
    assert "each once" in problems(load, learned, "start.adapter_sets=[]")["start.adapter_sets"]
    assert "no effect" in problems(load, both)["start.adapter_sets"]
    assert load(GOOD, learned, both, "user.min_steps=9"), "proper-released trains by user.min_steps"
    both = problems(load, learned, "user.rank_by_history={1: 4}", "user.early_stopping_patience=1", "user.min_steps=9")
    assert set(both) == {"user.rank_by_history", "user.early_stopping_patience"}, "OPPU trains by user.min_steps"
    only = problems(load, learned, "evaluation.methods=[proper]", "user.min_steps=9")
    assert "start.user_min_steps" in only["user.min_steps"]
    assert "ZeRO" in problems(load, learned, "distributed.deepspeed=ds_configs/zero3.json")["user.start"]
    assert "questions alone" in problems(load, learned, "start.train_on=[history]")["start.train_on"]
    config = load(GOOD, learned, "start.user_min_steps=7")
    assert config.start.for_users(config.user).min_steps == 7
    assert config.start.for_users(config.user).lora == config.user.lora


def test_the_deepspeed_file_is_looked_at_for_every_stage_on_ranks(load):
    missing = "distributed.deepspeed=none.json"
    assert "No such file" in problems(load, missing, "evaluation.methods=[base,PPlug]")["distributed.deepspeed"]
    assert load(GOOD, missing, "evaluation.methods=[base,base+RAG]"), "nothing is trained on ranks"


def test_stages_that_no_method_needs_contradict_nothing(load, tmp_path):
    same_split = [f"{section}.train_on=[history]" for section in ("population", "group", "router")]
    assert load(GOOD, "evaluation.split=train", *same_split)
    found = problems(load, "evaluation.split=train", *same_split, "evaluation.methods=[proper,proper-joint]")
    assert found["evaluation.split"].endswith("`train_on: [history]` in joint.")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5}))
    agreeing = [
        f"{section}.{key}"
        for section in ("population", "group", "router")
        for key in ("per_device_train_batch_size=4", "max_grad_norm=0.5")
    ]
    assert load(GOOD, f"distributed.deepspeed={path}", *agreeing)
    found = problems(load, f"distributed.deepspeed={path}", *agreeing, "evaluation.methods=[proper,proper-joint]")
    assert "section `joint` makes it 1.0" in found["distributed.deepspeed:gradient_clipping"]


def test_a_global_batch_is_said_once_and_gives_every_rank_an_example(load):
    found = problems(load, "group.train_batch_size=12", "group.gradient_accumulation_steps=2")
    assert "no effect with group.train_batch_size" in found["group.gradient_accumulation_steps"]
    found = problems(load, "router.train_batch_size=2", "distributed.num_ranks=3")
    assert "without an example" in found["router.train_batch_size"]
    assert load(GOOD, "group.train_batch_size=12", "distributed.num_ranks=5").group.num_micro_batches(5) == 1


def test_packing_needs_something_to_pack(load):
    found = problems(load, "group.packing=true", "group.per_device_train_batch_size=1")
    assert "no effect" in found["group.packing"]


def test_all_mistakes_come_at_once(load):
    found = problems(
        load, "sede=1", "population.learning_rate=-1", "user.num_tokens_per_batch=20", "evaluation.split=train"
    )
    assert set(found) == {"sede", "population.learning_rate", "user.num_tokens_per_batch", "evaluation.split"}


def test_overrides_beat_the_file_and_keep_its_other_keys(load):
    raw = GOOD | {"user": {"learning_rate": 1e-3, "num_slots": 8}}
    config = load(raw, "user.learning_rate=5e-4", "evaluation.methods=[base, OPPU]", "data.max_users_per_split=3")
    assert (config.user.learning_rate, config.user.num_slots) == (5e-4, 8)
    assert config.evaluation.methods == ["base", "OPPU"]
    assert config.data.max_users_per_split == 3


@pytest.mark.parametrize(
    ("text", "message"), [("output_dir: a\noutput_dir: b", "given twice"), ("a: [", "expected"), ("- 1", "no mapping")]
)
def test_broken_yaml(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_an_override_of_one_place_of_an_anchor_leaves_the_others(load):
    text = yaml.safe_dump(GOOD) + "population: &shared {max_steps: 5}\ngroup: *shared\n"
    config = load(text, "population.max_steps=7")
    assert (config.population.max_steps, config.group.max_steps) == (7, 5)


def test_learning_rates_may_be_written_as_people_write_them():
    assert parse_yaml("a: 1e-3\nb: 3.0e-4\nc: 12\nd: 1.5") == {"a": 1e-3, "b": 3e-4, "c": 12, "d": 1.5}


def test_a_written_configuration_loads_again(load, tmp_path):
    config = load(GOOD, "base.model=null", "base.create={}")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(path) == config


def test_every_shipped_run_is_legal(monkeypatch):
    monkeypatch.setenv("PROPER_DS_ROOT", str(REPO))
    files = sorted((REPO / "cluster" / "runs").rglob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        raw = parse_yaml(path.read_text())
        given = [] if raw.get("data", {}).get("path") else ["data.path=somewhere"]
        given += [] if raw.get("base", {}).get("create") else ["base.model=org/base"]
        load_config(path, given)


def test_every_shipped_deepspeed_file_resolves():
    files = sorted((REPO / "ds_configs").rglob("*.json"))
    assert len(files) >= 4
    for path in files:
        resolved, found = resolve_ds(read_ds_file(str(path)), "group", GroupConfig(), 4, bf16=True, hidden_size=100)
        assert not found, (path, found)
        assert resolved["zero_optimization"]["reduce_bucket_size"] == 10_000
        assert "auto" not in json.dumps(resolved)
        assert resolved["train_batch_size"] == 32


def test_contradictions_with_the_deepspeed_file_are_mistakes(load, tmp_path):
    raw = {"gradient_clipping": 0.3, "scheduler": {}, "optimizer": {"type": "Lion", "params": {"lr": "auto"}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw))
    found = problems(load, f"distributed.deepspeed={path}")
    assert "section `population` makes it 1.0" in found["distributed.deepspeed:gradient_clipping"]
    assert "lr_scheduler_type" in found["distributed.deepspeed:scheduler"]
    assert "'Lion' is not supported" in found["distributed.deepspeed:optimizer.type"]


def _sections(model: type[BaseModel]):
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _sections(part)


def test_all_sections_refuse_unknown_keys_and_are_frozen():
    found = set(_sections(RunConfig))
    assert len(found) >= 12
    assert all(issubclass(section, Section) for section in found)
    assert all(s.model_config["extra"] == "forbid" and s.model_config["frozen"] for s in found)


def test_constraints_name_one_version_each_and_agree_with_pyproject():
    lines = (REPO / "cluster" / "constraints.txt").read_text().splitlines()
    pins = [line.split("==")[0].lower() for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(set(pins))
    assert "torch==2.13.0" in lines
    assert Path(REPO / "LICENSE").read_text().lstrip().startswith("Apache License")


@pytest.mark.parametrize("number", ["0", "-2", "many"])
def test_a_fleet_needs_actors(load, number):
    assert set(problems(load, f"fleet.num_actors={number}")) == {"fleet.num_actors"}


def test_routers_do_not_read_everybodys_adapter_unless_told_to(load):
    assert load().router.max_users == 10_000
    assert load(GOOD, "router.max_users=null").router.max_users is None


def test_released_groups_need_every_users_history(load):
    assert "history" in problems(load, "group.train_on=[queries]")["group.train_on"]
    assert load(GOOD, "group.train_on=[queries]", "evaluation.methods=[base, proper]")


def test_deepspeed_files_of_an_upload_are_found_where_the_job_runs(load, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("PROPER_DS_ROOT", str(tmp_path))
    assert load().distributed.deepspeed == str(REPO / "ds_configs/zero2.json")


def test_experts_and_blocks_must_fit_the_ranks(load):
    found = problems(load, "distributed.num_ranks=3", "distributed.expert_parallel_size=2", "group.num_experts=8")
    assert "does not divide distributed.num_ranks 3" in found["distributed.expert_parallel_size"]
    found = problems(load, "distributed.num_ranks=2", "distributed.expert_parallel_size=2", "group.num_experts=5")
    assert "does not divide group.num_experts 5" in found["distributed.expert_parallel_size"]
    assert "leaves none out" in problems(load, "group.top_k=5")["group.top_k"]
    found = problems(load, "group.num_blocks=2", "group.top_k=1", "group.user_vector=table", "group.num_experts=6")
    assert "group.num_blocks" in found
    assert "does not divide" in problems(load, "group.num_blocks=3")["group.num_blocks"]
    found = problems(load, "evaluation.methods=[proper-released]", "group.top_k=2")
    assert "no effect on proper-released" in found["group.top_k"]
    found = problems(load, "group.user_vector=table", "group.history_dropout=0.5")
    assert "no effect" in found["group.history_dropout"]
    good = (
        "distributed.num_ranks=4",
        "distributed.expert_parallel_size=2",
        "group.num_experts=8",
        "group.num_blocks=4",
    )
    assert load(GOOD, *good, "group.num_blocks=4").group.num_blocks == 4


@pytest.mark.parametrize("override", ["group.users=all", "group.history_dropout=0.5", "group.top_k=2"])
def test_what_released_groups_do_not_know_is_refused(load, override):
    name = override.split("=")[0]
    assert "no effect on proper-released" in problems(load, "evaluation.methods=[proper-released]", override)[name]


@pytest.mark.parametrize(
    "overrides", [("evaluation.methods=[proper-released]",), ("group.user_vector=table", "group.train_on=[history]")]
)
def test_a_written_configuration_with_every_key_loads_again(load, overrides):
    whole = load(GOOD, *overrides).model_dump(mode="json")
    assert load(whole) == load(GOOD, *overrides)


OWN = "adapter_sets={OPPU: {learning_rate: 1.0e-3, num_train_epochs: 2, min_steps: 6}}"


def test_a_set_of_adapters_has_settings_of_its_own(load):
    config = load(GOOD, OWN, "user.weight_decay=0.5", "user.learning_rate=0.1")
    own, other = config.user_for("OPPU"), config.user_for("proper")
    assert (own.learning_rate, own.num_train_epochs, own.min_steps, own.weight_decay) == (1e-3, 2, 6, 0.5)
    assert other == config.user
    assert load(config.model_dump(mode="json")) == config
    learned = load(GOOD, "user.start=learned", "start.user_min_steps=9", "adapter_sets={proper: {weight_decay: 0.25}}")
    proper = learned.user_for("proper")
    assert (proper.min_steps, proper.weight_decay) == (9, 0.25), "the start's settings, over those of the set"
    assert learned.user_for("OPPU") == learned.user


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ("{opu: {min_steps: 3}}", "opu", "no such set.*OPPU, proper, proper-released"),
        ("{proper-released: {min_steps: 3}}", "proper-released", "no method of evaluation.methods needs the set"),
        ("{OPPU: {}}", "OPPU", "changes nothing"),
        ("{OPPU: {lora: {r: 2}}}", "OPPU.lora", "the same for all sets"),
        ("{OPPU: {max_history_items: 2}}", "OPPU.max_history_items", "the same for all sets"),
        ("{OPPU: {users: needed}}", "OPPU.users", "the same for all sets"),
        ("{OPPU: {min_step: 2}}", "OPPU.min_step", "unknown key.*`min_steps`"),
        ("{OPPU: {learning_rate: -1}}", "OPPU.learning_rate", "greater than 0"),
        ("{OPPU: {early_stopping_patience: 3}}", "OPPU.early_stopping_patience", "can stop nobody"),
        ("{OPPU: {lr_scheduler_type: constant, warmup_steps: 2}}", "OPPU.warmup_steps", "no effect"),
    ],
)
def test_settings_of_sets_that_mean_nothing_are_refused(load, given, key, message):
    import re

    found = problems(load, f"adapter_sets={given}", "evaluation.methods=[OPPU, proper]", "group.top_k=99")
    assert sorted(found) == [f"adapter_sets.{key}", "group.top_k"], "with all other mistakes at once"
    assert re.search(message, found[f"adapter_sets.{key}"])


def test_a_learned_start_leaves_its_set_no_such_settings(load):
    given = "adapter_sets={proper: {learning_rate: 0.1}, OPPU: {learning_rate: 0.1}}"
    found = problems(load, given, "user.start=learned", "evaluation.methods=[OPPU, proper]")
    assert list(found) == ["adapter_sets.proper.learning_rate"]


def test_a_folder_of_an_encoder_is_found_from_anywhere_and_a_name_is_left_alone(load):
    methods = "evaluation.methods=[PPlug]"
    assert load(GOOD, methods, "pplug.encoder=./bge").pplug.encoder == str(REPO / "bge")
    assert load(GOOD, methods, "pplug.encoder=org/bge").pplug.encoder == "org/bge"
