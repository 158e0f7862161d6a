"""Packs: many adapters in one safetensors file, one row a user, with a checksum for each row.

Written once by whoever finished a work unit, never changed; the catalog says who lies where.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from proper_ds.errors import StoreError
from proper_ds.files import atomic_path
from proper_ds.model.lora import LoraLayout

Tensor = torch.Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def checksum(row_P: Tensor) -> int:
    """CRC-32 of a stored row's bytes."""
    return zlib.crc32(row_P.contiguous().view(torch.uint8).numpy().tobytes())


def write_pack(path: Path, rows_NP: Tensor, layout: LoraLayout) -> list[int]:
    """Write adapters [N, P] as one file, all or nothing; returns their checksums."""
    with atomic_path(path) as temporary:
        save_file({"adapters": rows_NP.contiguous()}, temporary, metadata={"layout": json.dumps(layout.to_json())})
    return [checksum(row_P) for row_P in rows_NP]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The pack's safetensors file; whatever is wrong with it becomes a StoreError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, IndexError) as error:
        raise StoreError(f"pack {path} cannot be read ({error}); restore the file or train again") from None


def read_layout(path: Path) -> LoraLayout:
    """The layout of a pack's adapters. Raises StoreError as `read_rows` does."""
    with _opened(path) as file:
        return LoraLayout.from_json(json.loads(file.metadata()["layout"]))


def read_rows(path: Path, numbers: Sequence[int], checksums: Sequence[int]) -> list[Tensor]:
    """Adapters at the given rows of a pack, each checked against its checksum.

    Raises:
        StoreError: where the pack is missing, cut short or does not hold what the catalog says.
    """
    with _opened(path) as file:
        held = file.get_slice("adapters")
        rows = [held[number : number + 1][0] for number in numbers]
    for number, row_P, wanted in zip(numbers, rows, checksums, strict=True):
        if checksum(row_P) != wanted:
            raise StoreError(f"pack {path}, row {number}: the checksum does not match; restore the file or train again")
    return rows
