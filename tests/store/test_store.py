"""The store: what is put comes back bit for bit, commits are all or nothing, damage is noticed."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from proper_ds.errors import AdapterError, StoreError
from proper_ds.files import atomic_path
from proper_ds.model.lora import LoraLayout
from proper_ds.store.store import AdapterStore
from tests.store.stores import LAYOUT, put, rows


def only_pack(folder):
    (pack,) = (folder / "packs").iterdir()
    return pack


def test_adapters_come_back_bit_for_bit(tmp_path):
    found = rows(5)
    put(AdapterStore(tmp_path), "unit-0", {f"u{n}": found[n] for n in range(3)}, {"bad": "loss is nan"})
    put(AdapterStore(tmp_path), "unit-1", {f"u{n}": found[n] for n in (3, 4)})
    store = AdapterStore(tmp_path)
    assert torch.equal(store.get_many(["u4", "u0", "u3"]), found[[4, 0, 3]])
    assert store.users() == ["u0", "u1", "u2", "u3", "u4"]
    assert store.failures() == {"bad": "loss is nan"}
    assert store.layout == LAYOUT
    assert store.entry("u1").num_items == 3
    assert (store.entry("u1").first_loss, store.entry("u1").last_loss) == (2.0, 1.0)


def test_bfloat16_halves_the_bytes_and_rounds(tmp_path):
    found = rows(40)
    adapters = {f"u{n}": row for n, row in enumerate(found)}
    whole = put(AdapterStore(tmp_path / "a"), "unit-0", adapters)
    half = put(AdapterStore(tmp_path / "b"), "unit-0", adapters, dtype="bfloat16")
    assert half < 0.6 * whole
    assert torch.equal(AdapterStore(tmp_path / "b").get("u7"), found[7].bfloat16().float())


def test_absent_and_failed_users_say_so(tmp_path):
    put(AdapterStore(tmp_path), "unit-0", {"u": rows(1)[0]}, {"bad": "loss is nan"})
    store = AdapterStore(tmp_path)
    with pytest.raises(StoreError, match="no user 'nobody'"):
        store.get("nobody")
    with pytest.raises(StoreError, match=r"training failed \(loss is nan\)"):
        store.get("bad")
    with pytest.raises(StoreError, match="holds no adapter"):
        AdapterStore(tmp_path / "empty").layout  # noqa: B018


def test_useless_adapters_are_refused_before_anything_is_written(tmp_path):
    store = AdapterStore(tmp_path)
    with pytest.raises(AdapterError, match="no effect"):
        put(store, "unit-0", {"u": rows(1)[0] * 0})
    with pytest.raises(AdapterError, match="has 43 numbers where its layout needs 44"):
        put(store, "unit-0", {"u": rows(1)[0][:-1]})
    with pytest.raises(AdapterError, match="has 66 numbers"):
        put(store, "unit-0", {"u": rows(1, layout=LAYOUT.with_rank(3))[0]})
    with pytest.raises(AdapterError, match="'v': has weights that are not finite"):
        put(store, "unit-0", {"u": rows(1)[0], "v": rows(1)[0] * float("nan")})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_changed_byte_is_noticed(tmp_path):
    store = AdapterStore(tmp_path)
    put(store, "unit-0", {"u": rows(1)[0], "v": rows(1, 1)[0]})
    pack = only_pack(tmp_path)
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    assert torch.equal(AdapterStore(tmp_path).get("u"), rows(1)[0])
    with pytest.raises(StoreError, match="checksum"):
        AdapterStore(tmp_path).get("v")
    assert [line.partition(":")[0] for line in AdapterStore(tmp_path).verify().bad] == ["user 'v'"]
    pack.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="cut short"):
        AdapterStore(tmp_path).get("u")
    pack.write_bytes(b"not a pack" * 10)
    with pytest.raises(StoreError, match="cannot be read"):
        AdapterStore(tmp_path).get("u")
    pack.unlink()
    with pytest.raises(StoreError, match="is missing"):
        AdapterStore(tmp_path).get("u")
    assert len(AdapterStore(tmp_path).verify().bad) == 2


@pytest.mark.parametrize("compacted", [False, True])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_of_any_file_is_noticed(tmp_path_factory, compacted, data):
    """Every reading either gives what was put or is refused; only a byte between a pack's tensors can go unseen."""
    folder = tmp_path_factory.mktemp("store")
    store = AdapterStore(folder)
    put(store, "unit-0", {"u": rows(1)[0], "v": rows(1, 1)[0]}, {"bad": "loss is nan"}, dtype="int8")
    if compacted:
        store.compact()
    whole = AdapterStore(folder).get_many(["u", "v"])
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = AdapterStore(folder).get_many(["u", "v"])
    except StoreError:
        return
    assert torch.equal(found, whole)


def test_a_unit_is_committed_by_its_fragment_alone(tmp_path):
    """A pack without a fragment is a unit that was not finished: nobody sees it, and it is written again."""
    store = AdapterStore(tmp_path)
    put(store, "unit-0", {"u": rows(1)[0]})
    (tmp_path / "catalog" / "fragments" / "unit-0@1.arrows").unlink()
    assert AdapterStore(tmp_path).users() == []
    assert AdapterStore(tmp_path).catalog.units() == set()
    assert AdapterStore(tmp_path).verify().orphans == (only_pack(tmp_path).name,)
    put(AdapterStore(tmp_path), "unit-0", {"u": rows(1, 2)[0]})
    assert torch.equal(AdapterStore(tmp_path).get("u"), rows(1, 2)[0])


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x") as path:
        path.write_text("half")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.integers(1, 4))
def test_any_order_of_any_users(tmp_path_factory, order, per_unit):
    folder = tmp_path_factory.mktemp("store")
    found = rows(10)
    for start in range(0, 10, per_unit):
        users = range(start, min(10, start + per_unit))
        put(AdapterStore(folder), f"unit-{start}", {f"u{n}": found[n] for n in users})
    assert torch.equal(AdapterStore(folder).get_many([f"u{n}" for n in order]), found[order])


def test_packs_and_the_catalog_are_plain_files_of_their_formats(tmp_path):
    found = rows(3)
    put(AdapterStore(tmp_path), "unit-0", {f"u{n}": row for n, row in enumerate(found)})
    with safe_open(only_pack(tmp_path), "pt") as file:
        assert torch.equal(file.get_tensor("adapters.r2"), found)
    with pa.OSFile(str(tmp_path / "catalog/fragments/unit-0@1.arrows")) as file:
        assert pa.ipc.open_stream(file).read_all()["user"].to_pylist() == ["u0", "u1", "u2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_adapters_of_several_ranks_lie_in_one_store(tmp_path, dtype):
    wide = LAYOUT.with_rank(4)
    adapters = {f"u{rank}{n}": rows(2, rank, LAYOUT.with_rank(rank))[n] for rank in (2, 4, 1) for n in range(2)}
    put(AdapterStore(tmp_path), "unit-0", adapters, dtype=dtype, layout=wide)
    for compacted in (False, True):
        store = AdapterStore(tmp_path)
        assert store.layout == wide
        bound = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127}[dtype]
        for user, row_P in adapters.items():
            found_P, own = store.get_exact(user)
            assert own == LAYOUT.with_rank(int(user[1]))
            assert (found_P - row_P).abs().max() <= bound * row_P.abs().max()
            assert torch.equal(store.get(user), wide.widened(found_P, own.r))
        users = list(adapters)[::-1]
        assert torch.equal(store.get_many(users), torch.stack([store.get(user) for user in users]))
        if not compacted:
            put(store, "unit-1", {"w": rows(1, 9, wide)[0]}, dtype=dtype, layout=wide)
            store.compact()
            assert len(list((tmp_path / "packs").iterdir())) == 1


def test_int8_errs_by_half_a_step_of_its_own_rank_row(tmp_path):
    row_P = rows(1)[0]
    row_P[: 2 * 6] *= 1000  # the first A: its scales must not coarsen the other matrices
    put(AdapterStore(tmp_path), "unit-0", {"u": row_P}, dtype="int8")
    found = AdapterStore(tmp_path).get("u")
    for (_, a, b), (_, found_a, found_b) in zip(LAYOUT.views(row_P[None]), LAYOUT.views(found[None]), strict=True):
        assert ((a - found_a).abs() <= a.abs().amax(2, keepdim=True) / 127 * 0.5001).all()
        assert ((b - found_b).abs() <= b.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_adapters_of_another_model_are_refused(tmp_path):
    put(AdapterStore(tmp_path), "unit-0", {"u": rows(1)[0]})
    other = LoraLayout(LAYOUT.modules, 2, 8.0)
    put(AdapterStore(tmp_path), "unit-1", {"v": rows(1)[0]}, layout=other)
    with pytest.raises(StoreError, match="different modules or lora_alpha"):
        AdapterStore(tmp_path).get("u")
