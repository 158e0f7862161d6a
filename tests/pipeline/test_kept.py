"""Which results a run with `user.only_changed` keeps, which it brings up to date, and what it refuses."""

from __future__ import annotations

import json

import pytest
import yaml
from rich.console import Console

from proper_ds.config import load_config
from proper_ds.errors import ConfigError, UserError
from proper_ds.evaluation.config import DEFAULT_METHODS
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.roster import Roster, known_before
from proper_ds.pipeline.run import Run
from proper_ds.pipeline.stages import StageList
from proper_ds.run_folder import RunFolder
from tests.end_to_end.runs import CONFIG

UPDATE = "user.only_changed=true"
ANSWERED = [f"predictions/{name}" for name in DEFAULT_METHODS]
SHARED = ["base", "population", "group/proper", "group/proper-released", "router/proper", "router/proper-released"]
STORES = ["store/OPPU", "store/proper", "store/proper-released"]


class Night:
    """A run whose stages are marked done without doing anything."""

    def __init__(self, root, lamp_folder):
        self.yaml, self.folder, self.lamp_folder = root / "run.yaml", RunFolder(root / "run"), lamp_folder
        self.bring("old news")
        data = str(root / "lamp")
        self.yaml.write_text(yaml.safe_dump(CONFIG | {"output_dir": str(root / "run"), "data": {"path": [data]}}))

    def bring(self, *texts):
        profile = [{"id": text, "text": text, "title": "t", "category": "sports"} for text in texts]
        question = {"id": "1", "input": "news", "user_id": "u", "profile": profile}
        self.lamp_folder([question], [{"id": "1", "output": "sports"}])

    def stages(self, *overrides):
        return {stage.name: stage for stage in StageList(load_config(self.yaml, overrides))}

    def begin(self, stage):
        version = {"version": 1} if stage.step == "user" else {}
        self.folder.stage(stage.name).begin(stage.fingerprint, stage.about | version, stage.is_update)

    def finish(self, *overrides, names=None):
        for stage in self.stages(*overrides).values():
            place = self.folder.stage(stage.name)
            if (names is None or stage.name in names) and not place.is_done(stage.fingerprint):
                self.begin(stage)
                place.commit(stage.fingerprint, stage.settings, 0.0, stage.made_from)

    def pending(self, *overrides):
        return [
            s.name for s in self.stages(*overrides).values() if not self.folder.stage(s.name).is_done(s.fingerprint)
        ]


@pytest.fixture
def night(tmp_path, lamp_folder):
    return Night(tmp_path, lamp_folder)


def test_the_first_night_is_a_run_like_any_other(night):
    assert [s.fingerprint for s in night.stages(UPDATE).values()] == [s.fingerprint for s in night.stages().values()]


def test_new_data_leaves_shared_stages_alone_and_updates_stores(night):
    night.finish()
    night.bring("old news", "new news")
    found = night.stages(UPDATE)
    assert [name for name, stage in found.items() if stage.kept_since] == SHARED
    assert [name for name, stage in found.items() if stage.is_update] == STORES
    assert night.pending(UPDATE) == ["prepared", "tokens", "features", *STORES, *ANSWERED, "report"]
    night.finish(UPDATE)
    assert night.pending(UPDATE) == []
    assert night.pending() == list(night.stages()), "a run without it starts over"


def test_users_who_were_needed_for_merged_adapters_may_be_needed_no_more(night):
    needed = ("user.users=needed", "router.max_users=2")
    with_merged = f"evaluation.methods={[*DEFAULT_METHODS, 'merged']}"
    night.finish(*needed, with_merged)
    night.bring("old news", "new news")
    assert night.stages(UPDATE, *needed)["store/OPPU"].is_update, "an update cannot evaluate `merged`"


def test_what_follows_from_another_setting_is_not_told_besides(night):
    night.finish("user.users=needed")
    with pytest.raises(ConfigError) as error:
        night.stages(UPDATE)
    assert [problem.key for problem in error.value.problems] == ["user.users"]


def test_the_same_data_again_has_nothing_to_do(night):
    night.finish()
    assert night.pending(UPDATE) == []
    assert not any(stage.kept_since for stage in night.stages(UPDATE).values())


def test_old_data_back_again_is_another_night(night):
    night.finish()
    first = {stage.name: stage.fingerprint for stage in night.stages().values()}
    night.bring("old news", "new news")
    night.finish(UPDATE)
    night.bring("old news")
    assert set(STORES) < set(night.pending(UPDATE))
    assert all(night.stages(UPDATE)[name].fingerprint != first[name] for name in (*STORES, "predictions/OPPU"))


def test_a_night_begun_is_gone_on_with(night):
    night.finish()
    night.bring("old news", "new news")
    begun = night.stages(UPDATE)
    for name in ("prepared", "tokens", "features", "store/OPPU"):
        night.begin(begun[name])
    again = night.stages(UPDATE)
    assert [again[name].fingerprint for name in begun] == [stage.fingerprint for stage in begun.values()]


def test_what_was_never_finished_is_made_from_tonights_data(night):
    night.finish(names=["prepared", "base", "tokens", "population", "features"])
    night.bring("old news", "new news")
    pending = night.pending(UPDATE)
    assert "population" not in pending
    assert {"group/proper", "store/OPPU", "router/proper"} <= set(pending)


def test_a_finished_prior_is_kept_and_one_that_was_begun_starts_over_on_other_data(night):
    methods = f"evaluation.methods={[*DEFAULT_METHODS, 'group+prior']}"
    others = [name for name in night.stages(methods) if not name.startswith(("prior", "predictions"))]
    night.finish(methods, names=others)
    begun = night.stages(methods)["prior/proper"]
    night.begin(begun)
    night.bring("old news", "new news")
    fresh = night.stages(UPDATE, methods)["prior/proper"]
    assert fresh.fingerprint != begun.fingerprint, "its answers were of other questions"
    night.finish(UPDATE, methods)
    night.bring("old news", "new news", "newest news")
    assert night.stages(UPDATE, methods)["prior/proper"].kept_since


def test_a_base_that_an_earlier_version_made_of_everybodys_texts_is_kept(night):
    night.finish()
    marker = night.folder.stage("base").path / "done.json"
    found = json.loads(marker.read_text())
    del found["settings"]["train_split"]
    marker.write_text(json.dumps(found))
    night.bring("old news", "new news")
    assert night.stages(UPDATE)["base"].kept_since


def test_who_was_only_merged_from_may_be_asked_later(night):
    needed = ("user.users=needed", "router.max_users=2")
    night.finish(*needed, "evaluation.methods=[merged,proper]")
    assert night.stages(*needed, "evaluation.methods=[merged,proper]")["store/OPPU"].settings["asked"] is False
    night.bring("old news", "new news")
    assert night.stages(UPDATE, *needed, "evaluation.methods=[OPPU,proper]")["store/OPPU"].is_update


def test_results_of_another_population_are_not_kept(night):
    night.finish()
    night.bring("old news", "new news")
    night.finish(names=["prepared", "base", "tokens", "population"])  # a run without it, cut short
    found = night.stages(UPDATE)
    assert not any(found[name].kept_since or found[name].is_update for name in (*SHARED[2:], *STORES))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("user.lora.r=2", r"user.lora.r: 2, but store/OPPU was made with 4"),
        ("user.learning_rate=1e-5", r"user.learning_rate: 1e-05, but store/OPPU was made with 0.02"),
        ("population.max_steps=3", r"population.max_steps: 3, but population was made with 200"),
        ("seed=5", r"seed: 5, but"),
        ("base.max_length=90", r"base.max_length: 90, but tokens was made with 120"),
        ("base.create.hidden_size=32", r"base.create.hidden_size: 32, but base was made with 64"),
    ],
)
def test_changed_settings_are_refused_by_name(night, override, said):
    night.finish()
    with pytest.raises(ConfigError, match=said):
        night.stages(UPDATE, override)


@pytest.mark.parametrize("override", ["user.num_slots=3", "fleet.num_tokens_per_unit=9000", "distributed.num_ranks=1"])
def test_how_the_work_is_cut_may_change(night, override):
    night.finish()
    assert not set(night.pending(UPDATE, override)) & set(SHARED)


def test_it_needs_adapters_and_data_of_its_own(night):
    with pytest.raises(ConfigError, match=r"no method of evaluation\.methods has user adapters"):
        load_config(night.yaml, [UPDATE, "evaluation.methods=[base]"])
    with pytest.raises(ConfigError, match=r"cannot work on data\.prepared"):
        load_config(night.yaml, [UPDATE, "data.path=[]", "data.prepared=x"])


def test_runs_that_do_not_say_what_they_were_made_from_are_refused(night):
    night.finish()
    marker = night.folder.stage("population").path / "done.json"
    found = json.loads(marker.read_text())
    marker.write_text(json.dumps(found | {"made_from": {}}))
    with pytest.raises(UserError, match="an earlier version of proper_ds"):
        night.stages(UPDATE)


def test_the_roster_must_be_that_of_the_kept_stages(night):
    night.finish()
    order = night.stages()["prepared"].fingerprint
    night.bring("old news", "new news")
    stage = night.stages(UPDATE)["prepared"]
    with pytest.raises(UserError, match="their order of users is lost"):
        known_before(night.folder, stage)
    Roster("another", ["u"], {}).write(night.folder.roster)
    with pytest.raises(UserError, match="their order of users is lost"):
        known_before(night.folder, stage)
    Roster(order, ["u"], {"LaMP_2": "words"}).write(night.folder.roster)
    assert known_before(night.folder, stage).users == ["u"]


def test_a_run_waits_for_a_forgetting_that_was_cut_short(night):
    (night.folder.root / "forgotten").mkdir(parents=True)
    (night.folder.root / "forgotten/pending.json").write_text("{}")
    with pytest.raises(UserError, match="forgetting users was cut short"):
        Run(load_config(night.yaml), ProgressView(Console(quiet=True))).run()
    assert not (night.folder.root / "config.yaml").exists()
