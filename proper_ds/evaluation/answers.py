"""The answers of each method as committed: Parquet files of a method's units below `predictions/<method>/units`.

Written by `predict_job.py` and, for methods without a language model, by the run itself; read by the report.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.files import atomic_path

UNITS = "units"
"""Of a method's or a prior's folder: the answers, a file a unit."""
SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("user", pa.int32()),
        ("task", pa.string()),
        ("id", pa.string()),
        ("gold", pa.string()),
        ("prediction", pa.string()),
        ("num_history", pa.int32()),
        ("personal", pa.bool_()),
        ("scores", pa.list_(pa.float32())),
        ("gates", pa.list_(pa.float32())),
        ("num_experts", pa.int32()),
    ]
)
"""A question that a method answered; `gold` is null where it is hidden. `scores` are of a closed set of labels,
`gates` those of `num_experts` experts over the prompt, module after module."""


def write_answers(folder: Path, unit: str, table: pa.Table) -> None:
    """Commit a unit's answers to the folder of a method."""
    with atomic_path(_file(folder, unit)) as path:
        pq.write_table(table, path, compression="zstd")


def has_answers(folder: Path, unit: str) -> bool:
    """Whether a unit's answers are committed."""
    return _file(folder, unit).exists()


def read_answers(folder: Path) -> pa.Table:
    """All units' answers of one method as one table, in a fixed order."""
    return pa.concat_tables([pq.read_table(path) for path in answer_files(folder)])


def answer_files(folder: Path) -> list[Path]:
    """The files of one method's answers, in a fixed order."""
    return sorted((folder / UNITS).glob("*.parquet"))


def _file(folder: Path, unit: str) -> Path:
    return folder / UNITS / f"{unit}.parquet"
