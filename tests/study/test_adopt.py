"""Which results runs of a study take over from each other, and that nothing unsafe is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import validate
from proper_ds.data.forgotten import Forgotten
from proper_ds.observe.metrics import MetricsFile, read_events
from proper_ds.pipeline.stage import Stage
from proper_ds.pipeline.stages import StageList
from proper_ds.run_folder import RunFolder
from proper_ds.study.adopt import Donor, Wanted, adopt, choose
from tests.study.studies import RUN, write_study


def marker(fingerprint, batch=None):
    return {"fingerprint": fingerprint, "made_from": {} if batch is None else {"train_batch_size": batch}}


def test_only_the_same_result_of_the_same_kind_of_machine_is_chosen(tmp_path):
    wanted = [Wanted("tokens", "t"), Wanted("population", "p", 16), Wanted("store/OPPU", "s")]
    other = Donor(tmp_path / "other", {"tokens": marker("u"), "population": marker("p", 8)})
    bf16 = Donor(tmp_path / "bf16", {"population": marker("p", 16)}, "bfloat16")
    fp32 = Donor(tmp_path / "fp32", {"tokens": marker("t"), "population": marker("p", 16)}, "float32")
    away = Donor(tmp_path / "away", {"store/OPPU": marker("s")}, None, frozenset({"store/OPPU"}))
    found = choose(wanted, [other, bf16, fp32, away], None)
    assert {name: donor.root.name for name, donor in found.items()} == {"tokens": "fp32", "population": "fp32"}
    assert choose(wanted, [bf16], "float32") == {}
    assert choose(wanted, [other], None) == {}


def test_a_result_comes_only_with_what_it_was_made_from(tmp_path):
    """A population that is made anew on another number of ranks, and adapters that a sibling fitted to its own."""
    on_population = frozenset({"population"})
    wanted = [
        Wanted("population", "p", 8),
        Wanted("store/OPPU", "s", None, on_population),
        Wanted("router/proper", "r", 4, on_population | {"store/OPPU"}),
        Wanted("predictions/OPPU", "a", None, on_population | {"store/OPPU"}),
        Wanted("predictions/base", "b"),
    ]
    has = {"store/OPPU": marker("s"), "router/proper": marker("r", 4), "predictions/OPPU": marker("a")}
    has |= {"predictions/base": marker("b")}
    other = Donor(tmp_path / "other", has | {"population": marker("p", 16)})
    same = Donor(tmp_path / "same", has | {"population": marker("p", 8)})
    assert choose(wanted, [other], None) == {"predictions/base": other}
    assert choose(wanted, [same], None) == {stage.name: same for stage in wanted}
    mixed = choose(wanted, [other, same], None)
    assert {name: donor.root.name for name, donor in mixed.items()} == {
        **dict.fromkeys(["population", "store/OPPU", "router/proper", "predictions/OPPU"], "same"),
        "predictions/base": "other",
    }
    # the run has a population: its own, or a copy
    own = {"population": (str(tmp_path / "here"), "")}
    assert choose(wanted[1:], [same], None, own) == {"predictions/base": same}
    own = {"population": (str(tmp_path / "same"), "")}
    assert choose(wanted[1:], [same], None, own).keys() == {stage.name for stage in wanted[1:]}


def test_copies_of_one_result_are_that_result(tmp_path):
    first = Donor(tmp_path / "first", {"population": marker("p") | {"finished": "monday"}})
    copied = marker("p") | {"finished": "monday", "adopted_from": str(first.root)}
    second = Donor(tmp_path / "second", {"population": copied, "store/OPPU": marker("s")})
    later = Donor(tmp_path / "later", {"population": marker("p"), "store/OPPU": marker("s")})
    wanted = [Wanted("population", "p"), Wanted("store/OPPU", "s", None, frozenset({"population"}))]
    assert choose(wanted, [first, later, second], None) == {"population": first, "store/OPPU": second}


names = st.sampled_from("abc")


@given(
    st.dictionaries(names, names),
    st.lists(st.tuples(st.dictionaries(names, names), st.sampled_from([None, "float32", "bfloat16"])), max_size=4),
)
def test_whatever_is_chosen_is_what_was_wanted(wanted, donors):
    stages = [Wanted(name, fingerprint) for name, fingerprint in wanted.items()]
    made = [Donor(f"{n}", {k: marker(v) for k, v in has.items()}, dtype) for n, (has, dtype) in enumerate(donors)]
    found = choose(stages, made, None)
    for name, donor in found.items():
        assert donor.markers[name]["fingerprint"] == wanted[name]
    assert len({donor.dtype for donor in found.values()} - {None}) <= 1


MADE = ["prepared", "base", "tokens", "population", "features"]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """(configuration, its stages, donor): a run that has nothing, and one that is done but for its predictions."""
    write_study(tmp_path)
    monkeypatch.setattr("proper_ds.study.adopt.keep_roster", lambda folder, stage: None)  # nothing is prepared here

    def config(name, **changes):
        raw = RUN | {"output_dir": str(tmp_path / name), "data": {"path": str(tmp_path / "data/films")}}
        return validate(raw | changes, "test")

    stages = StageList(config("new"))
    donor = RunFolder(tmp_path / "old")
    for stage in stages:
        if stage.name in MADE:
            fill(donor, stage)
    (donor.root / "dtype.json").write_text('"float32"')
    return config, stages, donor


def fill(folder: RunFolder, stage: Stage):
    place = folder.stage(stage.name)
    place.begin(stage.fingerprint, stage.about)
    (place.path / "units").mkdir()
    (place.path / "units/a.bin").write_bytes(b"numbers")
    size = {"train_batch_size": 8} if stage.where == "ranks" else {}
    place.commit(stage.fingerprint, stage.settings, 5.0, stage.made_from | size)
    MetricsFile(folder.metrics).log(stage.step, unit="a", part=stage.name)
    MetricsFile(folder.metrics).log(stage.step, event="done", seconds=5.0)


def test_a_result_comes_whole_with_marker_log_and_type(pair):
    config, stages, donor = pair
    new = RunFolder(config("new").output_path)
    assert adopt(config("new"), stages, [donor.root, new.root]) == dict.fromkeys(MADE, donor.root)
    for name in MADE:
        done = json.loads((new.stage(name).path / "done.json").read_text())
        assert done["fingerprint"] == donor.stage(name).inputs()["fingerprint"]
        assert (done["seconds"], done["adopted_from"]) == (5.0, str(donor.root))
        copied = new.stage(name).path / "units/a.bin"
        assert copied.read_bytes() == b"numbers"
        assert copied.stat().st_ino != (donor.stage(name).path / "units/a.bin").stat().st_ino
    assert [event["part"] for event in read_events(new.metrics)[0]] == MADE
    assert json.loads((new.root / "dtype.json").read_text()) == "float32"
    assert adopt(config("new"), stages, [donor.root]) == {}, "there is nothing left to take over"
    assert not list(new.root.glob(".adopted*"))


def test_what_the_run_made_itself_stays_and_other_results_move_aside(pair):
    config, stages, donor = pair
    new = RunFolder(config("new").output_path)
    tokens, features = (next(stage for stage in stages if stage.name == name) for name in ("tokens", "features"))
    new.stage("features").begin(features.fingerprint, features.about)
    (new.stage("features").path / "half.bin").write_bytes(b"half")
    new.stage("tokens").begin("of other settings")
    (new.stage("tokens").path / "old.bin").write_bytes(b"old")
    assert set(adopt(config("new"), stages, [donor.root])) == {*MADE} - {"features"}
    assert (new.stage("features").path / "half.bin").exists()
    assert not (new.stage("tokens").path / "old.bin").exists()
    assert (new.superseded("tokens")[0] / "old.bin").read_bytes() == b"old"
    assert new.stage("tokens").is_done(tokens.fingerprint)


def test_a_copy_cut_short_is_never_taken_for_a_result(pair, monkeypatch):
    config, stages, donor = pair
    new = RunFolder(config("new").output_path)

    def cut(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("proper_ds.study.adopt._copy_events", cut)
        adopt(config("new"), stages, [donor.root])
    assert not any(new.stage(name).inputs() for name in MADE)
    assert set(adopt(config("new"), stages, [donor.root])) == {*MADE}
    assert len(read_events(new.metrics)[0]) == len(MADE)


def test_nothing_is_taken_where_it_would_not_be_safe(pair):
    config, stages, donor = pair
    with donor.locked():
        assert adopt(config("new"), stages, [donor.root]) == {}, "a run that is at work"
    forgotten = Forgotten.read(donor.root)
    forgotten.add(["ann"], donor.root)
    assert adopt(config("new"), stages, [donor.root]) == {}, "somebody was forgotten there"
    (donor.root / "forgotten.json").unlink()
    (config("new").output_path / "forgotten").mkdir(parents=True)
    assert adopt(config("new"), stages, [donor.root]) == {}, "somebody is being forgotten here"


def test_adapters_outside_the_run_are_nobody_elses(pair):
    config, _, donor = pair
    own = config("new", evaluation={"methods": ["base", "OPPU"]}, user={"users": "needed"})
    stages = StageList(own)
    store = next(stage for stage in stages if stage.name == "store/OPPU")
    fill(donor, store)
    pointer = donor.stage(store.name).path / "elsewhere.json"
    pointer.write_text('{"location": "/mnt/adapters/old-OPPU-1"}')
    assert "store/OPPU" not in adopt(own, stages, [donor.root])
    pointer.write_text('{"inside": "adapters-1"}')
    away = own.model_copy(update={"store": own.store.model_copy(update={"location": "/mnt/adapters"})})
    assert "store/OPPU" not in adopt(away, StageList(away), [donor.root])
    assert "store/OPPU" in adopt(own, stages, [donor.root])


def test_a_report_is_a_runs_own(pair):
    """Its files lie beside the stages: a marker alone would make a run without report.json look finished."""
    config, _, donor = pair
    own = config("new", evaluation={"methods": ["base"]}, base=RUN["base"])
    new, stages = RunFolder(own.output_path), StageList(own)
    for stage in stages:
        if stage.name not in MADE:
            fill(donor, stage)
    (donor.root / "report.json").write_text("{}")
    report = stages.stages[-1]
    assert report.is_done(donor)
    assert set(adopt(own, stages, [donor.root])) == {s.name for s in stages} - {"report"}
    assert not report.is_done(new)
    fill(new, report)
    assert not report.is_done(new), "the marker is there, the file is not"
