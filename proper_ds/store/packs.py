"""Packs: many adapters in one safetensors file, one row a user, with a checksum for each row.

Written once by whoever finished a work unit, never changed; the catalog says who lies where.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
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


def read_layout(path: Path) -> LoraLayout:
    """The layout of a pack's adapters."""
    with safe_open(path, "pt") as file:
        return LoraLayout.from_json(json.loads(file.metadata()["layout"]))


def read_rows(path: Path, numbers: Sequence[int], checksums: Sequence[int]) -> list[Tensor]:
    """Adapters at the given rows of a pack, each checked against its checksum.

    Raises:
        StoreError: where the pack is missing, cut short or does not hold what the catalog says.
    """
    try:
        with safe_open(path, "pt") as file:
            held = file.get_slice("adapters")
            rows = [held[number : number + 1][0] for number in numbers]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise StoreError(f"pack {path} cannot be read ({error})") from None
    except Exception as error:  # safetensors raises a class of its own that is not exported everywhere
        if type(error).__name__ != "SafetensorError":
            raise
        raise StoreError(f"pack {path} cannot be read ({error})") from None
    for number, row_P, wanted in zip(numbers, rows, checksums, strict=True):
        if checksum(row_P) != wanted:
            raise StoreError(f"pack {path}, row {number}: the checksum does not match; restore the file or train again")
    return rows
