"""Rows of many Arrow files as one table that is never loaded: files are mapped when they are read, a few at a time.

Read by `tokens.py`. All files but the last hold equally many rows, so that a row's file needs no index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from proper_ds.errors import DataError

NUM_OPEN_FILES = 64
"""Files kept mapped; each costs the headers of its record batches, some hundred kilobytes, and none of its rows."""


class _File:
    """One mapped file: its record batches and the row at which each begins."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            self.batches = list(stream)
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])


class MappedRows:
    """The rows of Arrow stream files, one file after the other."""

    def __init__(self, paths: Sequence[Path], num_rows: int) -> None:
        """`num_rows`: of all files together."""
        self._paths, self.num_rows = list(paths), num_rows
        self._file = lru_cache(maxsize=NUM_OPEN_FILES)(self._open)
        self._rows_per_file = max(1, num_rows)
        if len(self._paths) > 1:
            self._rows_per_file = _File(self._paths[0]).num_rows

    def _open(self, number: int) -> _File:
        found, wanted = _File(self._paths[number]), self._rows_per_file
        if number == len(self._paths) - 1:
            wanted = self.num_rows - wanted * number
        if found.num_rows != wanted:
            raise DataError(
                f"{self._paths[number]} holds {found.num_rows} rows where {wanted} were written; remove the folder"
                f" {self._paths[number].parent} and run again"
            )
        return found

    def ranges(self, start: int, stop: int) -> Iterator[tuple[pa.RecordBatch, int]]:
        """The record batches, cut to the rows `start` up to `stop`, each with its first row's number."""
        while start < stop:
            number, row = divmod(start, self._rows_per_file)
            file = self._file(number)
            at = int(np.searchsorted(file.starts, row, side="right")) - 1
            batch, first = file.batches[at], row - int(file.starts[at])
            count = min(stop - start, batch.num_rows - first)
            yield batch.slice(first, count), start
            start += count

    def places(self, rows: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """(record batch, rows within it, positions in `rows`) for any rows in any order."""
        order = np.argsort(rows, kind="stable")
        done = 0
        while done < len(order):
            number, row = divmod(int(rows[order[done]]), self._rows_per_file)
            file = self._file(number)
            at = int(np.searchsorted(file.starts, row, side="right")) - 1
            first = number * self._rows_per_file + int(file.starts[at])
            until = int(np.searchsorted(rows, first + file.batches[at].num_rows, sorter=order))
            yield file.batches[at], rows[order[done:until]] - first, order[done:until]
            done = until

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """A column's values in the rows `start` up to `stop`; a view of the file where one record batch holds them."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch, _ in self.ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
