"""What forgetting meets in the rows of others: reasons that name who is forgotten, and records that are damaged.

`maintenance.forget` calls it before it has the catalog written anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pyarrow as pa

from proper_ds.model.lora import LoraLayout
from proper_ds.store.codec import record_bytes
from proper_ds.store.files import Files
from proper_ds.store.index import SCHEMA, STORED, Index
from proper_ds.store.mentions import mention_pattern
from proper_ds.store.packs import CHUNK_BYTES, Place, read_header, read_unchecked

REMOVED = "(reason removed)"


class AsFound(Index):
    """An index by which damaged records are read as they are.

    Its table keeps the checksums on record: whatever is copied by it stays detectable.
    """

    def __init__(self, table: pa.Table, layouts: dict[str, LoraLayout], found: dict[int, int]) -> None:
        """`found` are the checksums of damaged records by row."""
        super().__init__(table, layouts)
        self._found = found

    def place_at(self, row: int) -> Place:
        """Where a row's adapter lies, with the checksum of what lies there."""
        place = super().place_at(row)
        return replace(place, checksum=self._found.get(int(row), place.checksum))


def without_mentions(index: Index, users: Collection[str]) -> tuple[pa.Table, int]:
    """The index's table with every reason blanked that names one of the users, and how many different ones did."""
    pattern = mention_pattern(users)
    column = index.table["reason"].combine_chunks()
    reasons = column.dictionary.to_pylist()
    kept = [REMOVED if pattern.search(reason.encode("utf-8", "surrogatepass")) else reason for reason in reasons]
    num_blanked = sum(new is not old for new, old in zip(kept, reasons, strict=True))
    words = {word: code for code, word in enumerate(dict.fromkeys(kept))}
    codes = np.asarray([words[word] for word in kept], np.int32)[column.indices.to_numpy()]
    fresh = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array([*words], pa.string()))
    return index.table.set_column(SCHEMA.names.index("reason"), SCHEMA.field("reason"), fresh), num_blanked


def damaged(files: Files, index: Index, keep: np.ndarray, packs: Collection[str]) -> dict[int, int]:
    """Checksums found, by row, of the kept records in `packs` whose bytes are not those on record.

    Raises:
        StoreError: where a pack's header is damaged, or the pack is cut short.
    """
    codes, rank, number = (index.numbers(name) for name in ("pack", "rank", "row"))
    found: dict[int, int] = {}
    for code in [code for code, pack in enumerate(index.packs) if pack in packs]:
        rows = np.flatnonzero(keep & index.is_status(STORED) & (codes == code))
        if not len(rows):
            continue
        header = read_header(files, index.packs[code])
        for each in np.unique(rank[rows]).tolist():
            of_rank = rows[rank[rows] == each]
            of_rank = of_rank[np.argsort(number[of_rank])].tolist()
            step = max(1, CHUNK_BYTES // sum(record_bytes(header.layout.with_rank(each), header.dtype)))
            for start in range(0, len(of_rank), step):
                part = of_rank[start : start + step]
                places = [index.place_at(row) for row in part]
                records = read_unchecked(files, [(header, place) for place in places])
                for row, place, record in zip(part, places, records, strict=True):
                    if (checksum := zlib.crc32(record.data)) != place.checksum:
                        found[row] = checksum
    return found
