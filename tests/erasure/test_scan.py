"""The proof must be able to fail: whatever hides a user in a file, compressed or not, is found."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.erasure.scan import scan
from proper_ds.store.mentions import mention_pattern
from proper_ds.store.store import AdapterStore
from tests.store.stores import put, rows

KEY = "anna-77-long"


def parquet(path, values, kind):
    pq.write_table(pa.table({"user": pa.array(values, kind)}), path, compression="zstd")


def hide_plain(path):
    path.with_suffix(".bin").write_bytes(b"\x00" * 5000 + KEY.encode() + b"\x00")


def hide_log(path):
    path.with_suffix(".log").write_text(f"WARNING user '{KEY}' has no adapter")


def hide_gzip(path):
    path.with_suffix(".json.gz").write_bytes(gzip.compress(json.dumps({"user": KEY}).encode()))


def hide_cells(path):
    parquet(path.with_suffix(".parquet"), ["b", KEY, "c"], pa.string())


def hide_dictionary(path):
    parquet(path.with_suffix(".parquet"), ["b", KEY, "c"], pa.dictionary(pa.int8(), pa.string()))


def hide_nested(path):
    kind = pa.list_(pa.struct([("id", pa.large_string())]))
    parquet(path.with_suffix(".parquet"), [[{"id": "x"}], [{"id": f"{KEY}-q1"}]], kind)


@pytest.mark.parametrize("hide", [hide_plain, hide_log, hide_gzip, hide_cells, hide_dictionary, hide_nested])
def test_a_key_is_found(tmp_path, hide):
    hide(tmp_path / "file")
    result = scan(tmp_path, [KEY], {})
    assert [kind for _, kind in result.found] == ["key"]
    assert scan(tmp_path, ["somebody-else"], {}).found == []
    assert result.num_files == 1


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("in_reason", [False, True])
def test_a_key_is_found_in_the_catalog_of_a_store(tmp_path, compacted, in_reason):
    store, key = AdapterStore(tmp_path), "person-0150"
    people = [f"person-{n:04d}" for n in range(200)]
    if in_reason:
        put(store, "unit-0", {}, {f"failed-{n}": f"no room beside {who!r}" for n, who in enumerate(people)})
    else:
        put(store, "unit-0", dict(zip(people, rows(200), strict=True)))
    if compacted:
        store.compact()
    (path,) = (tmp_path / "catalog").rglob("*.arrows")
    assert key.encode() not in path.read_bytes(), "it is compressed"
    result = scan(tmp_path, [key], {})
    assert (str(path.relative_to(tmp_path)), "key") in result.found
    assert result.num_unpacked_bytes > 1000
    assert result.not_decoded == []
    clean = scan(tmp_path, ["somebody-else"], {"text": [b"nothing like it"]})
    assert (clean.found, clean.not_decoded) == ([], [])


@pytest.mark.parametrize("ending", ["parquet", "json.gz", "arrows"])
def test_what_cannot_be_decompressed_is_not_passed(tmp_path, ending):
    hide_gzip(tmp_path / "file")
    hide_cells(tmp_path / "file")
    with pa.ipc.new_stream(tmp_path / "file.arrows", pa.schema([("user", pa.string())])) as writer:
        writer.write_table(pa.table({"user": ["b"] * 100}))
    path = tmp_path / f"file.{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert scan(tmp_path, ["nobody-here"], {}).not_decoded == [path.name]


def test_traces_are_found_inside_compressed_columns(tmp_path):
    text = "only mine " * 20
    parquet(tmp_path / "a.parquet", ["a", f"before {text} after", "z"], pa.string())
    assert text.encode() not in (tmp_path / "a.parquet").read_bytes()
    assert scan(tmp_path, [], {"text": [text.encode()]}).found == [("a.parquet", "text")]


def test_keys_are_whole_words():
    pattern = mention_pattern(["g0000001"])
    for text in (b"user 'g0000001'", b'"g0000001-q0"', b"g0000001"):
        assert pattern.search(text)
    for text in (b"g00000010", b"xg0000001", b"g0000001_x"):
        assert not pattern.search(text)


def test_short_keys_are_found_only_where_they_are_said_to_be_users(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"score": "5", "rank": 5}))
    pq.write_table(pa.table({"label": ["5", "4"], "user": ["7", "8"]}), tmp_path / "b.parquet")
    assert scan(tmp_path, ["5"], {}).found == []
    assert scan(tmp_path, ["7"], {}).found == [("b.parquet", "key")]
    (tmp_path / "a.json").write_text(json.dumps({"user": "5"}))
    (tmp_path / "c.log").write_text("WARNING user '5' has no adapter")
    assert scan(tmp_path, ["5"], {}).found == [("a.json", "key"), ("c.log", "key")]


@given(st.text(st.characters(codec="utf-8"), min_size=6), st.text(st.characters(codec="utf-8")))
def test_any_long_key_between_quotes_is_found(key, around):
    assert mention_pattern([key]).search(f"{around}'{key}'{around}".encode())
