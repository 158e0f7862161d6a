"""Moves stored rows out of packs that are small, or hold rows no longer wanted, into new packs; for `maintenance`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from proper_ds.store.codec import record_bytes
from proper_ds.store.files import Files
from proper_ds.store.index import SCHEMA, STORED, Index
from proper_ds.store.packs import (
    CHUNK_BYTES,
    FOLDER,
    PackHeader,
    encoded_header,
    name_of_compacted,
    read_header,
    read_records,
)

PACK_BYTES = 512 << 20
"""New packs are closed at this size: few files, and forgetting one user rewrites no more than this."""


@dataclass(frozen=True)
class Rewritten:
    """The kept rows with their new places, and the packs written for them."""

    table: pa.Table
    new_packs: list[str]


def packs_to_merge(files: Files, index: Index) -> set[str]:
    """Packs worth writing anew: under half the size of a full one, or with rows that the catalog does not name.

    A single small one has none to be merged with: new packs are of one dtype each.
    """
    sizes = files.listing(FOLDER)
    num_live = np.bincount(index.numbers("pack")[index.is_status(STORED)], minlength=len(index.packs))
    small, holed = dict[str, set[str]](), dict[str, set[str]]()
    for pack, live in zip(index.packs, num_live.tolist(), strict=True):
        if not live:
            continue
        header = read_header(files, pack)
        if header.num_rows > live:
            holed.setdefault(header.dtype, set()).add(pack)
        elif sizes.get(pack, 0) < PACK_BYTES // 2:
            small.setdefault(header.dtype, set()).add(pack)
    found = set[str]().union(*holed.values())
    for dtype, packs in small.items():
        if len(packs) > 1 or dtype in holed:
            found |= packs
    return found


def rewrite(files: Files, index: Index, keep: np.ndarray, packs: set[str], snapshot: int) -> Rewritten:
    """Copy the kept rows of `packs` into new packs, checksums checked.

    Args:
        keep: by row of the index, whether it stays.
        snapshot: number of the snapshot that the new packs are written for.

    Raises:
        StoreError: where a row does not hold what the catalog says.
    """
    codes, numbers = index.numbers("pack").copy(), index.numbers("row").copy()
    moving = [code for code, pack in enumerate(index.packs) if pack in packs]
    moved = keep & index.is_status(STORED) & np.isin(codes, moving)
    rank = index.numbers("rank")
    rows = np.flatnonzero(moved)
    rows = rows[np.lexsort((numbers[rows], rank[rows], codes[rows]))]
    headers = {code: read_header(files, index.packs[code]) for code in np.unique(codes[rows]).tolist()}
    words, new_packs = list(index.packs), list[str]()
    try:
        for part in _parts(rows, index, headers):
            part = part[np.argsort(rank[part], kind="stable")]
            pack = name_of_compacted(snapshot, len(new_packs))
            new_packs.append(pack)
            _copy(files, index, part, headers, pack)
            codes[part] = len(words)
            for each in np.unique(rank[part]):
                numbers[part[rank[part] == each]] = np.arange(np.count_nonzero(rank[part] == each))
            words.append(pack)
    except Exception:
        files.remove([f"{FOLDER}/{pack}" for pack in new_packs])
        raise
    return Rewritten(_table(index, keep, codes, words, numbers), new_packs)


def _parts(rows: np.ndarray, index: Index, headers: dict[int, PackHeader]) -> Iterator[np.ndarray]:
    """Rows of one type each, as many as fill a pack."""
    codes, rank = index.numbers("pack"), index.numbers("rank")
    for dtype in sorted({header.dtype for header in headers.values()}):
        of_type = np.asarray([headers[code].dtype == dtype for code in codes[rows].tolist()], dtype=bool)
        chosen = rows[of_type]
        layout = index.layout
        assert layout is not None, "rows are stored, so their layout is known"
        size = {each: sum(record_bytes(layout.with_rank(each), dtype)) for each in np.unique(rank[chosen]).tolist()}
        ends = np.cumsum([size[each] for each in rank[chosen].tolist()])
        number_of_pack = (ends - 1) // PACK_BYTES
        yield from np.split(chosen, np.flatnonzero(np.diff(number_of_pack)) + 1)


def _copy(files: Files, index: Index, rows: np.ndarray, headers: dict[int, PackHeader], pack: str) -> None:
    codes, rank = index.numbers("pack"), index.numbers("rank")
    layout, dtype = index.layout, headers[int(codes[rows[0]])].dtype
    assert layout is not None, "rows are stored, so their layout is known"
    ranks, counts = np.unique(rank[rows], return_counts=True)

    def chunks() -> Iterator[Any]:
        yield encoded_header(layout, dtype, dict(zip(ranks.tolist(), counts.tolist(), strict=True)))
        for each in ranks.tolist():
            value_bytes, _ = record_bytes(layout.with_rank(each), dtype)
            of_rank, kept = rows[rank[rows] == each], []
            step = max(1, CHUNK_BYTES // value_bytes)
            for start in range(0, len(of_rank), step):
                wanted = [(headers[int(codes[row])], index.place_at(row)) for row in of_rank[start : start + step]]
                records = read_records(files, wanted)
                kept.append(records[:, value_bytes:].copy())
                yield np.ascontiguousarray(records[:, :value_bytes]).data
            yield np.concatenate(kept).data if kept[0].size else b""

    files.write(f"{FOLDER}/{pack}", chunks())


def _table(index: Index, keep: np.ndarray, codes: np.ndarray, words: list[str], numbers: np.ndarray) -> pa.Table:
    """The kept rows; words that only dropped rows used are gone from it."""
    table = index.table.filter(pa.array(keep))
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    columns["row"] = pa.array(numbers[keep], SCHEMA.field("row").type)
    for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
        if pa.types.is_dictionary(kind):
            held = codes if name == "pack" else index.numbers(name)
            used, inverse = np.unique(held[keep], return_inverse=True)
            known = words if name == "pack" else index.table[name].combine_chunks().dictionary.to_pylist()
            named = pa.array([known[code] for code in used.tolist()], kind.value_type)
            columns[name] = pa.DictionaryArray.from_arrays(pa.array(inverse, kind.index_type), named)
    return pa.table(columns, schema=SCHEMA)
