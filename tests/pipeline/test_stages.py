"""Which stages a changed setting makes anew: those that depend on it and all after them, and no other."""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from rich.console import Console

from proper_ds.config import load_config
from proper_ds.errors import UserError
from proper_ds.evaluation.methods import METHODS, needs_of_methods
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.run import Run
from proper_ds.pipeline.stages import StageList
from proper_ds.run_folder import RunFolder, in_lane
from tests.end_to_end.runs import CONFIG

METHODS_RUN = ("base", "population", "group", "OPPU", "proper", "proper-released")
PREDICTIONS = [f"predictions/{name}" for name in METHODS_RUN]
ALL = [
    "prepared",
    "base",
    "tokens",
    "population",
    "features",
    "group/proper",
    "group/proper-released",
    "store/OPPU",
    "store/proper",
    "store/proper-released",
    "router/proper",
    "router/proper-released",
    *PREDICTIONS,
    "report",
]


@pytest.fixture
def prints(tmp_path, lamp_folder):
    """`prints(*overrides)` -> fingerprints by stage."""
    profile = [{"id": "p1", "text": "old news", "title": "t", "category": "sports"}]
    question = {"id": "1", "input": "news", "user_id": "u", "profile": profile}
    data = lamp_folder([question], [{"id": "1", "output": "sports"}])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"output_dir": str(tmp_path / "run"), "data": {"path": [str(data)]}}))

    def load(*overrides):
        return {stage.name: stage.fingerprint for stage in StageList(load_config(path, overrides))}

    load.data = data
    return load


def changed(prints, *overrides):
    before, after = prints(), prints(*overrides)
    assert list(before) == list(after) == ALL
    return [name for name in ALL if before[name] != after[name]]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("data.train_split=test", "prepared"),
        ("base.create.max_steps=7", "base"),
        ("base.max_length=90", "tokens"),
        ("population.learning_rate=1", "population"),
        ("evaluation.closed_labels=generate", "predictions/base"),
        ("evaluation.confidence=0.5", "report"),
    ],
)
def test_everything_from_the_first_that_depends_on_it(prints, override, first):
    found = changed(prints, override)
    assert found[0] == first
    if first != "report" and not first.startswith("predictions"):
        rest = set(ALL[ALL.index("population") :])
        assert set(found) >= rest - ({"predictions/base"} if first == "population" else set())


def test_user_settings_leave_the_shared_stages_alone(prints):
    own = ("store/", "router/", "predictions/OPPU", "predictions/proper", "report")
    assert changed(prints, "user.learning_rate=1") == [name for name in ALL if name.startswith(own)]


def test_settings_of_one_set_leave_the_others_alone(prints):
    own = ("store/OPPU", "predictions/OPPU", "report")
    given = "adapter_sets={OPPU: {learning_rate: 0.5}}"
    assert changed(prints, given) == [name for name in ALL if name.startswith(own)]
    same = prints("user.learning_rate=0.5")["store/OPPU"]
    assert prints(given)["store/OPPU"] == same, "how it is written down makes no other adapters"


def test_needed_users_are_each_sets_and_lanes_own(prints):
    """Router users only for sets whose router is trained, anchors only where OPPU's adapters are merged."""
    methods = "evaluation.methods=[OPPU,OPPU+RAG,merged,proper,proper-user-gates,proper-released-user-gates]"
    before = prints(methods, "user.users=needed", "merge.num_neighbours=1")
    router = prints(methods, "user.users=needed", "merge.num_neighbours=1", "router.max_users=7")
    stores = {name for name in before if name.startswith("store/")}
    assert stores == {"store/OPPU", "store/OPPU@bm25-4-lamp", "store/proper", "store/proper-released"}
    assert {name for name in stores if before[name] != router[name]} == {"store/proper"}
    merge = prints(methods, "user.users=needed", "merge.num_neighbours=1", "merge.num_anchors=9")
    assert {name for name in stores if before[name] != merge[name]} == {"store/OPPU"}


def test_router_settings_leave_adapters_alone(prints):
    own = ("router/", "predictions/proper", "report")
    assert changed(prints, "router.learning_rate=1") == [name for name in ALL if name.startswith(own)]


@pytest.mark.parametrize(
    "override",
    [
        "fleet.num_actors=2",
        "fleet.max_retries=1",
        "distributed.max_restarts=1",
        "distributed.num_ranks=1",
        "population.save_steps=7",
        "group.save_total_limit=1",
    ],
)
def test_who_does_the_work_changes_nothing(prints, override):
    assert changed(prints, override) == []


def test_how_a_global_batch_is_dealt_to_ranks_changes_nothing(prints):
    given = ("population.train_batch_size=8", "group.train_batch_size=8", "router.train_batch_size=8")
    other = ("distributed.num_ranks=3", "population.per_device_train_batch_size=1")
    assert prints(*given) == prints(*given, *other)
    assert prints(*given)["group/proper"] != prints(*given[:1], "group.train_batch_size=9")["group/proper"]


def test_changed_data_changes_everything(prints):
    before = prints()
    outputs = prints.data / "train_outputs.json"
    found = json.loads(outputs.read_text())
    found["golds"][0]["output"] = "business"
    outputs.write_text(json.dumps(found))
    after = prints()
    assert [name for name in ALL if before[name] != after[name]] == ALL


def test_the_report_is_made_anew_when_what_it_tells_of_the_configuration_is_another(prints):
    choice = "{path: b.yaml, digest: d, overrides: {seed: SEED}, split: dev, method: OPPU, metric: mae, num_trials: 3}"
    seed = CONFIG.get("seed", 41)
    assert changed(prints, f"chosen_by=[{choice.replace('SEED', str(seed))}]") == ["report"]
    assert changed(prints, "evaluation.references=[base]") == ["report"]
    assert changed(prints, "evaluation.num_tokens_per_batch=9000") == []


LEARNED = "user.start=learned"


def test_a_learned_start_is_a_stage_before_the_one_set_that_starts_from_it(prints):
    fresh, learned = prints(), prints(LEARNED)
    place = ALL.index("store/OPPU")
    assert list(learned) == [*ALL[:place], "start/proper", *ALL[place:]]
    behind = ["store/proper", "router/proper", "predictions/proper", "report"]
    assert [name for name in ALL if fresh[name] != learned[name]] == behind


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("start.learning_rate=1e-4", ["start/proper", "store/proper"]),
        ("start.user_learning_rate=1e-4", ["start/proper", "store/proper"]),
        ("user.per_device_train_batch_size=3", ["start/proper", "store/OPPU", "store/proper"]),
        ("user.learning_rate=0.5", ["store/OPPU"]),
        ("user.max_history_items=2", ["store/OPPU", "store/proper"]),
        ("group.learning_rate=0.5", ["group/proper", "start/proper", "store/proper"]),
    ],
)
def test_what_a_learned_start_depends_on(prints, override, first):
    before, after = prints(LEARNED), prints(LEARNED, override)
    watched = ["group/proper", "start/proper", "store/OPPU", "store/proper"]
    assert [name for name in watched if before[name] != after[name]] == first


def test_oppu_may_have_a_learned_start_of_its_own_that_needs_no_groups(prints):
    sets, alone = "start.adapter_sets=[proper,OPPU]", "evaluation.methods=[population,OPPU]"
    one, two = prints(LEARNED), prints(LEARNED, sets)
    changed_too = ["store/OPPU", "predictions/OPPU", "report"]
    assert [name for name in two if one.get(name) != two[name]] == ["start/OPPU", *changed_too]
    assert set(two) - set(one) == {"start/OPPU"}
    bare = prints("user={start: learned}", alone, "start.adapter_sets=[OPPU]")
    assert [name for name in bare if name.startswith(("group", "start", "store"))] == ["start/OPPU", "store/OPPU"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_names_all_that_it_reads(method):
    about = METHODS[method]
    needs = needs_of_methods([about])
    if about.kind == "floor":
        assert needs.floors == (method,) and not needs.lanes
        return
    (lane,) = needs.lanes
    assert set(about.stages) <= {*lane.stages("encoder"), "prepared"}
    assert lane.recipe == about.recipe
    assert needs.population == about.population
    assert (about.adapter_set in needs.adapter_sets) == (about.adapter_set is not None)
    assert set(needs.joints) == ({about.preset} if about.gates == "joint" else set())
    assert about.preset is None or in_lane(about.level_stage, about.lane) in lane.stages("encoder")
    assert set(needs.routers) == (
        {about.preset} if about.user_lora and about.preset and about.gates == "lora" else set()
    )


def test_a_kept_stage_of_another_global_batch_is_told(prints, tmp_path, caplog):
    def say(*overrides):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="proper_ds"):
            Run(load_config(tmp_path / "run.yaml", overrides), ProgressView(Console(quiet=True)))._say_what_is_kept()
        return caplog.text

    one = ("distributed.num_ranks=1", "group.per_device_train_batch_size=6")
    for name, fingerprint in prints(*one).items():
        if name.startswith("group/"):
            RunFolder(tmp_path / "run").stage(name).path.mkdir(parents=True)
            RunFolder(tmp_path / "run").stage(name).commit(fingerprint, {}, 1.0, {"train_batch_size": 6})
    assert not say(*one)
    told = say("distributed.num_ranks=2", *one[1:])
    assert "group/proper: kept, though it had 6 examples" in told
    assert "makes 12; set group.train_batch_size" in told


def test_a_run_begun_in_one_type_does_not_go_on_in_another(prints, tmp_path):
    run = Run(load_config(tmp_path / "run.yaml"), ProgressView(Console(quiet=True)))
    run.folder.root.mkdir(exist_ok=True)
    run._settle_dtype(on_gpu=False)
    run._settle_dtype(on_gpu=False)
    with pytest.raises(UserError, match=r"auto means bfloat16 here, but .* was begun in float32"):
        run._settle_dtype(on_gpu=True)
