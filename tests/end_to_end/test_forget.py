"""A user is forgotten: nothing of theirs is left in any file, nobody else's anything changes, and they stay out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from proper_ds.config import load_config
from proper_ds.data.prepared import PreparedData
from proper_ds.data.records import User
from proper_ds.data.tokens import TokenData
from proper_ds.erasure.forget import forget
from proper_ds.errors import StoreError, UserError
from proper_ds.observe.metrics import read_events
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from tests.end_to_end.nights import FOLDERS, lengthen
from tests.end_to_end.runs import proper_ds, write_run
from tests.end_to_end.test_nightly import SETS, UPDATE


@dataclass(frozen=True)
class Gone:
    """A finished run out of which one user was forgotten."""

    yaml: Path
    data: Path
    folder: Path
    before: Path
    user: User
    index: int
    output: str


def somebody(run: Path) -> tuple[int, User]:
    """A user with history and with questions that were answered."""
    for index, user in enumerate(PreparedData(run / "prepared").users()):
        if user.history and any(query.split == "dev" for query in user.queries):
            return index, user
    raise AssertionError("nobody has both")


@pytest.fixture(scope="module")
def gone(finished, tmp_path_factory) -> Gone:
    """The copy also has what a longer life leaves: results moved aside, a killed writer's file, an export."""
    root = tmp_path_factory.mktemp("forget")
    shutil.copytree(finished.folder, root / "run")
    yaml = write_run(root / "run", finished.data)
    index, user = somebody(root / "run")
    old = root / "run/superseded/prepared-20260101-000000-000000000"
    shutil.copytree(root / "run/prepared", old)
    shutil.copytree(root / "run/store/proper", root / "run/superseded/store-proper-20260101-000000-000000000")
    shutil.copytree(root / "run/tokens", root / "run/superseded/tokens-20260101-000000-000000000")
    for place in ("run/prior/proper", "run/superseded/prior-proper-20260101-000000-000000000"):
        (root / place / "units").mkdir(parents=True)
        (root / place / "units/unit-1.parquet").write_bytes(b"answers of training users")
        (root / place / "asked.npy").write_bytes(b"who they are")
    (root / "run/prepared/.staging.sqlite").write_text(user.key)
    with (root / "run/logs/user-actor-0.log").open("a") as log:
        log.write(f"WARNING user {user.key!r} of unit-1 has no adapter: no history\n")
    for name in ("proper", "OPPU"):  # one over the other
        proper_ds("store", "get", user.key, "--run", root / "run", "--set", name, "--out", root / "exported" / user.key)
    proper_ds("store", "get", user.key, "--run", root / "run", "--out", root / "moved" / user.key)
    shutil.rmtree(root / "moved")
    output = proper_ds("store", "forget", user.key, "--run", root / "run", "--yes")
    return Gone(yaml, finished.data, root / "run", finished.folder, user, index, output)


def contents(path: Path) -> bytes:
    """A file's bytes, and those of a table's cells."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        data += json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False, default=str).encode()
    return data


def test_no_file_holds_anything_of_the_user(gone):
    index, user, before = gone.index, gone.user, gone.before
    others = contents(next((gone.folder / "prepared").glob("users-*.parquet"))).decode("utf-8", "replace")
    texts = [item.text for item in user.history] + [query.input for query in user.queries]
    own = [text.encode() for text in texts if text not in others]
    assert len(own) > 5
    features = FeatureData(before / "features").items(index).numpy()
    rows = [open_store(before / "store" / name).get(user.key).numpy() for name in SETS]
    own += [row[len(row) // 2 :][:20].tobytes() for row in rows] + [features[0, :20].tobytes()]
    key = re.compile(rb"(?<![0-9a-zA-Z])" + user.key.encode() + rb"(?![0-9a-zA-Z])")
    for run, expected in ((before, True), (gone.folder, False)):
        files = [path for path in run.rglob("*") if path.is_file()]
        found = [contents(path) for path in files]
        assert any(key.search(data) for data in found) == expected
        for trace in own:
            assert any(trace in data for data in found) == expected
    tokens = TokenData(gone.folder / "tokens")
    assert not any(example.ids.any() for example in tokens.examples_of(*tokens.range_of(index)))


def test_what_was_exported_and_left_lying_is_gone(gone):
    assert [*(gone.folder.parent / "exported").iterdir()] == []
    assert not list((gone.folder / "superseded").glob("tokens-*"))
    assert not list((gone.folder / "superseded").glob("prior-*"))
    assert not [*(gone.folder / "prior/proper").iterdir()], "of a prior that was never fitted"
    assert not (gone.folder / "prepared/.staging.sqlite").exists()
    for name in ("prepared-20260101-000000-000000000", "store-proper-20260101-000000-000000000"):
        assert (gone.folder / "superseded" / name).exists(), "what is known by key stays, without the user"


def test_nobody_else_is_touched(gone):
    then, now = PreparedData(gone.before / "prepared"), PreparedData(gone.folder / "prepared")
    for index, (old, new) in enumerate(zip(then.users(), now.users(), strict=True)):
        if index != gone.index:
            assert old == new
        else:
            assert not new.history
            assert not new.queries
    for name in SETS:
        old, new = (open_store(run / "store" / name) for run in (gone.before, gone.folder))
        users = [user for user in old.users() if user != gone.user.key]
        assert sorted(new.users()) == sorted(users)
        assert old.get_many(users).equal(new.get_many(users))
        assert old.units() == new.units()
    old, new = (TokenData(run / "tokens") for run in (gone.before, gone.folder))
    others = old.column("user") != gone.index
    for name in ("user", "kind", "split", "position", "num_prompt"):
        assert np.array_equal(old.column(name)[others], new.column(name)[others])
    assert np.array_equal(old.column("num_tokens"), new.column("num_tokens")), "work units must not move"
    for a, b in zip(old.examples(np.flatnonzero(others)), new.examples(np.flatnonzero(others)), strict=True):
        assert np.array_equal(a.ids, b.ids)
    for path in (gone.before / "predictions/proper/lamp").glob("*.json"):
        asked = {query.id for query in gone.user.queries}
        golds = json.loads(path.read_text())["golds"]
        left = json.loads((gone.folder / "predictions/proper/lamp" / path.name).read_text())["golds"]
        assert left == [gold for gold in golds if gold["id"] not in asked]
        assert len(left) < len(golds)


def test_the_receipt_says_what_went_what_stays_and_names_nobody(gone):
    (path,) = (gone.folder / "forgotten").glob("receipt-*.json")
    text = path.read_text()
    assert gone.user.key not in text.replace(str(gone.folder), "")
    receipt = json.loads(text)
    assert receipt["proof"]["found"] == []
    assert receipt["proof"]["num_files_read"] > 100
    assert all(receipt["proof"]["num_traces_sought"][kind] for kind in ("text", "tokens", "features", "adapter"))
    adapters = receipt["removed"]["adapters"]
    assert adapters["num_rows"] == len(SETS) + 1, "and one of those moved aside"
    assert adapters["num_bytes"] > 0
    assert receipt["removed"]["exported adapters"]["num_rows"] == 1
    assert receipt["not_reached"] == ["1: not there any more; if it was moved or copied, delete it there"]
    assert f"not reached: {gone.folder.parent}/moved/{gone.user.key}: not there any more" in gone.output
    assert receipt["proof"]["not_decoded"] == []
    assert receipt["proof"]["num_traces"]["adapter"] >= receipt["proof"]["num_traces_sought"]["adapter"]
    assert "Ray's own logs" in receipt["out_of_reach"]
    assert receipt["remains"]["group/proper-released"]["num_items"] == len(gone.user.history)
    assert any(name in line for line in receipt["sources"] for name in FOLDERS)
    assert "nothing of the users was found" in gone.output
    assert "learned from" in gone.output


def test_a_later_run_does_nothing_again_and_does_not_bring_the_user_back(gone):
    before, _ = read_events(gone.folder / "metrics.jsonl")
    assert "evaluate: done already" in proper_ds("run", gone.yaml)
    after, _ = read_events(gone.folder / "metrics.jsonl")
    assert after == before


def test_an_update_from_data_that_still_has_the_user_leaves_them_out(gone, tmp_path):
    shutil.copytree(gone.folder, tmp_path / "run")
    shutil.copytree(gone.data, tmp_path / "data")
    yaml = write_run(tmp_path / "run", tmp_path / "data")
    lengthen(tmp_path / "data", [gone.user.key, PreparedData(gone.folder / "prepared").keys()[gone.index + 1]])
    told = proper_ds("run", yaml, UPDATE, "--steps", "prepare,tokens")
    assert "1 forgotten users stand in the data still; left out" in told
    then, now = (PreparedData(run / "prepared").keys() for run in (gone.folder, tmp_path / "run"))
    assert then == now, "everybody has the place they had"
    assert gone.user.key not in now


def test_unknown_users_are_refused_with_a_suggestion(gone):
    wrong = proper_ds("store", "forget", "g000000", "--run", gone.folder, "--yes", expect=2)
    assert "no user 'g000000'" in wrong
    assert "did you mean 'g00000" in wrong


def test_it_is_refused_while_a_run_is_at_work(gone):
    with RunFolder(gone.folder).locked(), pytest.raises(UserError, match="another run is at work there"):
        forget(load_config(gone.folder / "config.yaml"), gone.folder, [gone.user.key])


class Crash(BaseException):
    """Stands for a kill."""


def test_cut_short_anywhere_and_repeated_it_completes(finished, tmp_path, monkeypatch):
    run = finished.folder
    _, user = somebody(run)
    other = next(key for key in open_store(run / "store/OPPU").users() if key != user.key)
    config = load_config(finished.yaml)
    replace, unlink = Path.replace, Path.unlink
    calls = {"left": 10**9, "made": 0}

    def counted(call):
        def step(self, *args, **options):
            calls["made"] += 1
            if calls["made"] > calls["left"]:
                raise Crash
            return call(self, *args, **options)

        return step

    monkeypatch.setattr(Path, "replace", counted(replace))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    shutil.copytree(run, tmp_path / "undisturbed")
    forget(config, tmp_path / "undisturbed", [user.key])
    total = calls["made"]
    assert total > 40
    undisturbed = PreparedData(tmp_path / "undisturbed/prepared")
    for left in (1, total // 5, total // 2, 3 * total // 4, total - 6, total - 2):
        cut = tmp_path / f"cut-{left}"
        shutil.copytree(run, cut)
        calls.update(left=left, made=0)
        with pytest.raises(Crash):
            forget(config, cut, [user.key])
        calls.update(left=10**9, made=0)
        if (cut / "forgotten/pending.json").exists():
            with pytest.raises(UserError, match="1 of them are not among those given now"):
                forget(config, cut, [other])
        receipt, _ = forget(config, cut, [user.key])
        assert open_store(cut / "store/OPPU").has(other)
        assert receipt.is_proved
        assert receipt.remains["population"]["made"]
        assert [*PreparedData(cut / "prepared").users()] == [*undisturbed.users()]
        assert not open_store(cut / "store/OPPU").has(user.key)
        shutil.rmtree(cut)


def test_somebody_of_whom_nothing_was_ever_there_is_not_forgotten(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    with pytest.raises(StoreError, match="nobody was forgotten"):
        forget(load_config(finished.yaml), run, [somebody(run)[1].key, "stranger"])
    assert not (run / "forgotten.json").exists()


def test_a_user_stage_in_the_middle_goes_on_without_the_user(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    yaml = write_run(run, finished.data)
    index, user = somebody(run)
    fragments = sorted((run / "store/OPPU").rglob("catalog/fragments/unit-*"))
    bounds = [[int(n) for n in re.findall(r"\d{10}", path.name)] for path in fragments]
    theirs = next(n for n, (first, stop) in enumerate(bounds) if first <= index < stop)
    for n in (theirs, theirs + 1, len(fragments) - 1):
        fragments[n].unlink()
    (run / "store/OPPU/done.json").unlink()
    forget(load_config(yaml), run, [user.key])
    told = proper_ds("run", yaml, "--steps", "user")
    assert f"{len(fragments) - 3} of {len(fragments)} units are committed already" in told
    whole, resumed = (open_store(folder / "store/OPPU") for folder in (finished.folder, run))
    assert sorted(resumed.users()) == sorted(set(whole.users()) - {user.key})
    assert not resumed.failures()
    keys = PreparedData(run / "prepared").keys()
    first, stop = bounds[theirs]
    others = [key for key in resumed.users() if key not in keys[first:stop]]  # batches of that unit are other ones now
    assert whole.get_many(others).equal(resumed.get_many(others))


def test_prepared_data_of_the_callers_own_is_left_alone_and_read_without_the_user(finished, tmp_path):
    run, given = tmp_path / "run", tmp_path / "given"
    shutil.copytree(finished.folder, run)
    (run / "prepared").rename(given)
    index, user = next(
        (n, user) for n, user in enumerate(PreparedData(given).users()) if user.history and len(user.queries) > 1
    )
    config = load_config(finished.yaml, [f"data.prepared={given}", "data.path=[]", f"output_dir={run}"])
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    receipt, _ = forget(config, run, [user.key])
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    assert receipt.sources == [f"{given}: prepared data of your own, not touched; the run leaves the users out"]
    assert receipt.is_proved
    context = RunContext(config, torch.device("cpu"))
    assert user.key not in context.keys
    assert not any(example.ids.any() for example in context.tokens.examples_of(*context.tokens.range_of(index)))
    assert not open_store(run / "store/proper").has(user.key)
