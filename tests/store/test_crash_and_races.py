"""Crashes between any two writes, writers that race, and what is left of a forgotten user: nothing."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import StoreError
from proper_ds.store import files as layer
from proper_ds.store import maintenance, rewrite
from proper_ds.store.packs import read_header
from proper_ds.store.store import AdapterStore
from tests.store.stores import LAYOUT, put, rows


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.fixture
def kill_after(monkeypatch):
    """`kill_after(n)`: the process dies at the n-th change of the disk from now on, or half-way through it."""
    state = {"left": None, "half": False}
    real = {name: getattr(layer.LocalFiles, name) for name in ("write", "create", "remove")}

    def step():
        if state["left"] is not None:
            state["left"] -= 1
            return state["left"] < 0
        return False

    def write(self, name, chunks):
        if step():
            if state["half"]:
                whole = b"".join(bytes(chunk) for chunk in chunks)
                real["write"](self, name, [whole[: len(whole) // 2]])
            raise Killed
        return real["write"](self, name, chunks)

    def create(self, name, data):
        if step():
            if state["half"]:
                real["write"](self, f"{name.rpartition('/')[0]}/.half.tmp", [data[: len(data) // 2]])
            raise Killed
        return real["create"](self, name, data)

    def remove(self, names):
        for name in names:
            if step():
                raise Killed
            real["remove"](self, [name])

    for name, function in (("write", write), ("create", create), ("remove", remove)):
        monkeypatch.setattr(layer.LocalFiles, name, function)

    def arm(steps, half=False):
        state.update(left=steps, half=half)

    return arm


def filled(folder):
    """A compacted snapshot, fragments on top of it in two versions, a rollback, and a pack of a unit cut short."""
    store = AdapterStore(folder)
    found = rows(12)
    for unit in range(3):
        put(store, f"unit-{unit}", {f"person-{n}": found[n] for n in range(unit, 6, 3)})
    store.compact()
    put(store, "unit-0", {f"person-{n}": found[6 + n] for n in (0, 3)}, version=2)
    put(store, "unit-9", {"person-w": found[11]}, {"person-bad": "the loss of person-bad is nan"})
    store.rollback("person-3")
    (folder / "packs" / "unit-5@1-00000000.safetensors").write_bytes(b"cut short")
    return AdapterStore(folder)


def reading(folder, without=()):
    store = AdapterStore(folder)
    assert store.verify().bad == ()
    users = [user for user in store.users() if user not in without]
    units = {version: store.units(version) for version in (1, 2)}
    return {user: (store.get(user).tolist(), store.history(user)[-1].status) for user in users}, units


def deaths(kill_after, tmp_path, what):
    """Does `what(store)` to full stores, with a death at its 1st, 2nd, ... change, until it lives: (folder, lived)."""
    for steps in range(100):
        for half in (False, True):
            folder = tmp_path / f"{steps}-{half}"
            store = filled(folder)
            kill_after(steps, half)
            try:
                what(store)
                lived = True
            except Killed:
                lived = False
            finally:
                kill_after(None)
            yield folder, lived
        if lived:
            assert steps >= 2, "it changed the disk in several steps"
            return
    raise AssertionError("it never came through")


def test_a_death_anywhere_in_put_leaves_the_unit_done_or_not_done(tmp_path, kill_after):
    before = reading(filled(tmp_path / "before").location)
    adapters = {"a": rows(1, 5)[0], "b": rows(1, 6)[0]}
    for folder, lived in deaths(kill_after, tmp_path, lambda store: put(store, "unit-7", adapters)):
        if not lived:
            assert reading(folder) == before
            assert put(AdapterStore(folder), "unit-7", adapters) > 0, "a resumed run puts it again"
        assert torch.equal(AdapterStore(folder).get("b"), adapters["b"])


def test_a_death_anywhere_in_compact_leaves_a_store_that_reads_the_same(tmp_path, kill_after):
    before = reading(filled(tmp_path / "before").location)
    for folder, _ in deaths(kill_after, tmp_path, lambda store: store.compact()):
        assert reading(folder) == before
        AdapterStore(folder).compact()
        assert reading(folder) == before
        whole, cut_short = sorted(path.name for path in (folder / "packs").iterdir())
        assert whole.startswith("compacted-")
        assert cut_short.startswith("unit-5@1"), "it may be that of a unit being put"
        assert len(list((folder / "catalog").rglob("*.arrows"))) == 1


def test_a_death_anywhere_in_forget_takes_the_user_or_does_not(tmp_path, kill_after):
    before = reading(filled(tmp_path / "before").location)
    gone = ["person-3", "person-1", "person-bad"]
    without = ({user: read for user, read in before[0].items() if user not in gone}, before[1])
    for folder, lived in deaths(kill_after, tmp_path, lambda store: store.forget(gone)):
        now = reading(folder)
        assert now == without if lived else now in (before, without)
        AdapterStore(folder).forget(gone)
        assert reading(folder) == without
        assert_nothing_is_left(folder, gone, rows(12))


def assert_nothing_is_left(folder, users, held):
    """No file holds the users' keys or rows; of the catalog, which is compressed, every buffer is looked at."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".arrows", ".safetensors"}, "nothing half-written is left"
    assert not [path for path in paths if "unit-5@1" in path.name], "a unit cut short may hold them"
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        if path.suffix == ".arrows":
            for column in pa.ipc.open_stream(path.read_bytes()).read_all().columns:
                for chunk in column.chunks:
                    arrays = [chunk.indices, chunk.dictionary] if pa.types.is_dictionary(chunk.type) else [chunk]
                    contents += [buffer.to_pybytes() for array in arrays for buffer in array.buffers() if buffer]
    sought = [user.encode() for user in users] + [held[number][:4].numpy().tobytes() for number in (1, 3, 9)]
    for data in contents:
        assert not [what for what in sought if what in data]
    assert any(b"person-4" in data for data in contents), "others are found this way"
    assert any(held[4][:4].numpy().tobytes() in data for data in contents)


def test_two_writers_of_one_unit_cannot_both_win(tmp_path):
    for round_number in range(10):
        folder = tmp_path / str(round_number)
        found, sizes, barrier = rows(8), {}, threading.Barrier(8)

        def write(number, folder=folder, found=found, sizes=sizes, barrier=barrier):
            store = AdapterStore(folder)
            barrier.wait(10)
            sizes[number] = put(store, "unit-0", {"u": found[number], "v": -found[number]})

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        (winner,) = [number for number, size in sizes.items() if size]
        store = AdapterStore(folder)
        assert torch.equal(store.get_many(["u", "v"]), torch.stack([found[winner], -found[winner]]))
        assert store.verify().orphans == (), "losers leave no pack behind"


def test_a_link_whose_answer_was_lost_is_a_commit(tmp_path, monkeypatch):
    """NFS repeats a request that was not answered, and then finds the name taken, by itself."""
    real = layer.os.link

    def linked_twice(source, target):
        real(source, target)
        real(source, target)

    monkeypatch.setattr(layer.os, "link", linked_twice)
    assert put(AdapterStore(tmp_path), "unit-0", {"u": rows(1)[0]}) > 0
    assert torch.equal(AdapterStore(tmp_path).get("u"), rows(1)[0])


def test_a_late_writer_does_not_undo_a_compaction(tmp_path):
    """A worker thought dead puts its unit after another has, and after that was compacted and its fragment deleted."""
    found = rows(2)
    put(AdapterStore(tmp_path), "unit-0", {"u": found[0]})
    late = AdapterStore(tmp_path)
    AdapterStore(tmp_path).compact()
    assert put(late, "unit-0", {"u": found[1]}) == 0
    assert torch.equal(AdapterStore(tmp_path).get("u"), found[0])
    AdapterStore(tmp_path).compact()
    assert len(list((tmp_path / "packs").iterdir())) == 1
    assert torch.equal(AdapterStore(tmp_path).get("u"), found[0])


def test_a_slow_compaction_loses_against_a_fast_one(tmp_path, monkeypatch):
    """The fast ones go two snapshots further and delete the number that the slow one was about to take."""
    store, found = filled(tmp_path), rows(2, 3)
    before = reading(tmp_path)

    def in_between(*arguments):
        monkeypatch.setattr("proper_ds.store.maintenance.rewrite", rewrite.rewrite)
        AdapterStore(tmp_path).compact()
        put(AdapterStore(tmp_path), "unit-7", {"a": found[0]})
        AdapterStore(tmp_path).compact()
        put(AdapterStore(tmp_path), "unit-8", {"b": found[1]})
        return rewrite.rewrite(*arguments)

    # what the slow one reads, it read before: packs must still be there for it to get as far as its snapshot
    monkeypatch.setattr(layer.LocalFiles, "remove", kept_packs(layer.LocalFiles.remove))
    monkeypatch.setattr("proper_ds.store.maintenance.rewrite", in_between)
    with pytest.raises(StoreError, match="another compact or forget was faster"):
        store.compact()
    users, _ = reading(tmp_path)
    assert {user: read for user, read in users.items() if user not in "ab"} == before[0]
    assert torch.equal(AdapterStore(tmp_path).get_many(["a", "b"]), found)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("packs_to_merge", AdapterStore.compact),
        ("rewrite", AdapterStore.compact),
        ("rewrite", lambda store: store.forget(["person-4"])),
    ],
)
def test_a_slow_one_whose_packs_are_gone_says_that_another_was_faster(tmp_path, monkeypatch, where, what):
    store = filled(tmp_path)
    real = getattr(rewrite, where)

    def in_between(*arguments):
        monkeypatch.setattr(f"proper_ds.store.maintenance.{where}", real)
        AdapterStore(tmp_path).compact()
        return real(*arguments)

    monkeypatch.setattr(f"proper_ds.store.maintenance.{where}", in_between)
    before = reading(tmp_path)
    with pytest.raises(StoreError, match="another compact or forget was faster"):
        what(store)
    assert reading(tmp_path) == before
    what(store)


def test_a_pack_that_is_lost_is_named(tmp_path):
    store = filled(tmp_path)
    next((tmp_path / "packs").glob("compacted-*")).unlink()
    with pytest.raises(StoreError, match=r"pack .*compacted-.* is missing; restore the file"):
        store.compact()


def test_verify_during_a_compaction_reports_no_damage_and_overlooks_none(tmp_path, monkeypatch):
    store = filled(tmp_path)
    put(AdapterStore(tmp_path), "unit-8", {"broken": rows(1, 8)[0]})
    real = maintenance._damaged

    def compacted_before(*arguments):
        monkeypatch.setattr(maintenance, "_damaged", real)
        AdapterStore(tmp_path).compact()
        (pack,) = (tmp_path / "packs").glob("compacted-*")
        place = AdapterStore(tmp_path).entry("broken")
        start = read_header(store.files, pack.name).blocks[place.rank]
        data = bytearray(pack.read_bytes())
        data[start.values_start + place.row * start.value_bytes] ^= 1
        pack.write_bytes(data)
        return real(*arguments)

    monkeypatch.setattr(maintenance, "_damaged", compacted_before)
    report = store.verify()
    assert [line.partition(":")[0] for line in report.bad] == ["user 'broken'"]
    assert report.num_rows == 10


def kept_packs(remove):
    return lambda self, names: remove(self, [name for name in names if not name.startswith("packs/")])


def test_a_reader_that_was_open_before_a_compaction_reads_on(tmp_path):
    store = filled(tmp_path)
    reader = AdapterStore(tmp_path)
    held = {user: reader.get(user) for user in ("person-0", "person-3")}
    reader.files.forget_handles()
    store.compact()
    for user, row_P in held.items():
        assert torch.equal(reader.get(user), row_P)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=20, unique=True))
def test_any_key_is_found_and_no_other(tmp_path_factory, users):
    folder = tmp_path_factory.mktemp("store")
    found = rows(len(users))
    put(AdapterStore(folder), "unit-0", dict(zip(users, found, strict=True)))
    store = AdapterStore(folder)
    assert torch.equal(store.get_many(users), found)
    for user in users:
        assert store.has(user + "x") == (user + "x" in users)


def test_places_where_two_writers_could_both_win_are_refused():
    with pytest.raises(StoreError, match="two writers could both commit to"):
        AdapterStore("http://localhost:1/store")
    with pytest.raises(StoreError, match="could both commit to nonsense://"):
        AdapterStore("nonsense://store")


def test_new_packs_are_closed_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "PACK_BYTES", 20 * 4 * LAYOUT.num_parameters)
    found = rows(60)
    for unit in range(12):
        put(AdapterStore(tmp_path), f"unit-{unit}", {f"u{n}": found[n] for n in range(5 * unit, 5 * unit + 5)})
    store = AdapterStore(tmp_path)
    store.compact()
    assert len(list((tmp_path / "packs").iterdir())) == 3
    assert torch.equal(AdapterStore(tmp_path).get_many([f"u{n}" for n in range(60)]), found)
    report = store.compact()
    assert report.num_files == report.num_files_before == 4, "there is nothing left to merge"


def test_packs_of_two_types_are_merged_once(tmp_path):
    found = rows(6)
    for unit, dtype in enumerate(["float32", "bfloat16", "float32", "bfloat16", "int8"]):
        put(AdapterStore(tmp_path), f"unit-{unit}", {f"u{unit}": found[unit]}, dtype=dtype)
    store = AdapterStore(tmp_path)
    store.compact()
    packs = sorted((tmp_path / "packs").iterdir())
    assert len(packs) == 3
    store.compact()
    assert sorted((tmp_path / "packs").iterdir()) == packs, "there is nothing left to merge"
    put(AdapterStore(tmp_path), "unit-6", {"u6": found[5]})
    store.compact()
    left = sorted((tmp_path / "packs").iterdir())
    assert (len(left), len({*left} & {*packs})) == (3, 2), "only packs of its type are written anew"


def test_stats_count_what_is_there(tmp_path):
    found = filled(tmp_path).stats()
    assert (found.num_users, found.num_failed, found.num_rows) == (7, 1, 9)
    assert (found.num_units, found.last_version) == (5, 2)
    assert (found.num_packs, found.num_orphans, found.num_catalog_files) == (4, 1, 4)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found.pack_bytes + found.catalog_bytes == sum(path.stat().st_size for path in files)
    assert found.files_per_1000_users == pytest.approx(1000 * len(files) / 7)
