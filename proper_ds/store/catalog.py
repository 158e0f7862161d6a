"""The catalog: one Parquet fragment per committed work unit, saying which user's adapter lies where.

A unit is done when its fragment exists; the fragment is the last write. Columns leave room for versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.files import atomic_path

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("version", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("pack", pa.string()),
        ("row", pa.int32()),
        ("checksum", pa.int64()),
        ("num_items", pa.int32()),
        ("num_steps", pa.int32()),
        ("first_loss", pa.float64()),
        ("last_loss", pa.float64()),
    ]
)
STORED, FAILED = "stored", "failed"


@dataclass(frozen=True, slots=True)
class Entry:
    """One user in the catalog.

    Attributes:
        status: `stored`, or `failed` with its reason: then there is no adapter and the group answers.
        pack, row, checksum: where the adapter lies; empty, -1 and 0 where it failed.
    """

    user: str
    version: int
    status: str
    reason: str
    pack: str
    row: int
    checksum: int
    num_items: int
    num_steps: int
    first_loss: float
    last_loss: float


class Catalog:
    """The fragments in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def units(self) -> set[str]:
        """Names of the committed units."""
        return {path.stem for path in self.folder.glob("*.parquet")}

    def commit(self, unit: str, entries: list[Entry]) -> None:
        """Write a unit's fragment, all or nothing. Writing a unit again replaces it as a whole."""
        table = pa.Table.from_pylist([asdict(entry) for entry in entries], schema=SCHEMA)
        with atomic_path(self.folder / f"{unit}.parquet") as path:
            pq.write_table(table, path, compression="zstd")

    def entries(self) -> Iterator[Entry]:
        """Every entry of every fragment, by unit name and row."""
        for unit in sorted(self.units()):
            for row in pq.read_table(self.folder / f"{unit}.parquet").to_pylist():
                yield Entry(**row)
