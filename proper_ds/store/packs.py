"""Packs: many adapters in one safetensors file, read a row at a time.

For each rank r a tensor `adapters.r<r>` [N, P], one row an adapter, and for int8 `scales.r<r>` beside it; the layout
and the type are in the metadata. Written once, never changed; the catalog says who lies where, with a checksum.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from proper_ds.errors import StoreError
from proper_ds.model.adapter_file import check_row
from proper_ds.model.lora import LoraLayout
from proper_ds.store.codec import encode, num_scales, record_bytes
from proper_ds.store.files import Files, Span

Tensor = torch.Tensor

FOLDER = "packs"
_PUT = re.compile(r"(.+)@(\d+)-[0-9a-f]{8}\.safetensors")
_COMPACTED = re.compile(r"compacted-(\d+)-\d+-[0-9a-f]{8}\.safetensors")
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
_ALIGNMENT_BYTES = 64
CHUNK_BYTES = 16 << 20  # larger ones are mapped anew each time, which costs more than reading them
_ENCODED_BYTES = 4 << 20  # at a time: stays in the processor's cache
_MAX_HEADER_BYTES = 100_000_000  # what safetensors allows


@dataclass(frozen=True)
class Block:
    """The rows of one rank. Starts are bytes from the beginning of the file, sizes bytes of one row."""

    num_rows: int
    values_start: int
    value_bytes: int
    scales_start: int
    scale_bytes: int


@dataclass(frozen=True)
class PackHeader:
    """What a pack says of itself; `layout` is the widest that it was written for."""

    dtype: str
    layout: LoraLayout
    blocks: dict[int, Block]

    @property
    def num_rows(self) -> int:
        """Rows of all ranks."""
        return sum(block.num_rows for block in self.blocks.values())


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stored row lies, and the CRC-32 of its bytes with those of its scales after them."""

    pack: str
    rank: int
    row: int
    checksum: int


def name_of_pack(unit: str, version: int) -> str:
    """A name for a unit's pack, another one at each call."""
    return f"{unit}@{version}-{_token()}.safetensors"


def unit_of_pack(name: str) -> tuple[str, int] | None:
    """(unit, version) that a pack was put for, None for other files."""
    found = _PUT.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def name_of_compacted(snapshot: int, number: int) -> str:
    """A name for a pack that a compaction writes for a snapshot, another one at each call."""
    return f"compacted-{snapshot:08d}-{number:04d}-{_token()}.safetensors"


def number_of_pack(name: str) -> int:
    """The snapshot that a pack of a compaction was written for, 0 for other files."""
    found = _COMPACTED.fullmatch(name)
    return int(found[1]) if found else 0


def _token() -> str:
    return uuid.uuid4().hex[:8]


def encoded_header(layout: LoraLayout, dtype: str, num_by_rank: dict[int, int]) -> bytes:
    """The beginning of a pack's file; the rows follow in the order of `num_by_rank`, each rank's scales after them."""
    tensors: dict[str, Any] = {"__metadata__": {"layout": json.dumps(layout.to_json()), "dtype": dtype}}
    start = 0

    def add(name: str, kind: str, shape: list[int], num_bytes: int) -> None:
        nonlocal start
        tensors[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + num_bytes]}
        start += num_bytes

    for rank, num_rows in num_by_rank.items():
        own = layout.with_rank(rank)
        value_bytes, scale_bytes = record_bytes(own, dtype)
        kind = _SAFETENSORS_DTYPES[dtype]
        add(f"adapters.r{rank}", kind, [num_rows, own.num_parameters], num_rows * value_bytes)
        if scale_bytes:
            add(f"scales.r{rank}", "F32", [num_rows, num_scales(own, dtype)], num_rows * scale_bytes)
    tensors["__metadata__"]["checksum"] = _checksum_of(tensors)
    text = json.dumps(tensors).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def _checksum_of(tensors: dict[str, Any]) -> str:
    """CRC-32 of what a header says, in canonical form, before the checksum is in it."""
    return f"{zlib.crc32(json.dumps(tensors, sort_keys=True).encode()):08x}"


@lru_cache(maxsize=64)
def _layout_of(text: str) -> LoraLayout:
    return LoraLayout.from_json(json.loads(text))


def read_header(files: Files, pack: str) -> PackHeader:
    """A pack's header.

    Raises:
        FileNotFoundError: where there is no such pack.
        StoreError: where it is cut short or no pack.
    """
    name = f"{FOLDER}/{pack}"
    start = np.empty(8, np.uint8)
    files.read_into([Span(name, 0, start)])
    length = int(start.view("<u8")[0])
    try:
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {length} bytes")
        text = np.empty(length, np.uint8)
        files.read_into([Span(name, 8, text)])
        raw = json.loads(text.tobytes())
        if raw["__metadata__"].pop("checksum") != _checksum_of(raw):
            raise ValueError("its header's checksum does not match")
        about = raw.pop("__metadata__")
        return PackHeader(about["dtype"], _layout_of(about["layout"]), _blocks(raw, 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{files.location}/{name}"
        raise StoreError(f"pack {where} cannot be read ({error}); restore the file or train again") from None


def _blocks(raw: dict[str, Any], data_start: int) -> dict[int, Block]:
    def rows_of(name: str) -> tuple[int, int, int]:
        begin, end = raw[name]["data_offsets"]
        num_rows = raw[name]["shape"][0]
        return num_rows, data_start + begin, (end - begin) // num_rows

    blocks = {}
    for name in raw:
        kind, _, rank = name.partition(".r")
        if kind == "adapters":
            num_rows, start, size = rows_of(name)
            scales = f"scales.r{rank}"
            _, scales_start, scale_bytes = rows_of(scales) if scales in raw else (0, 0, 0)
            blocks[int(rank)] = Block(num_rows, start, size, scales_start, scale_bytes)
    return blocks


def write_pack(
    files: Files, pack: str, rows: dict[str, Tensor], layout: LoraLayout, dtype: str
) -> tuple[int, dict[str, Place]]:
    """Write adapters [P of any rank up to `layout.r`] by user; returns the pack's bytes and each user's place.

    Raises:
        AdapterError: for an adapter that is the wrong size, not finite or without effect; nothing is left then.
    """
    by_rank: dict[int, list[str]] = {}
    for user, row_P in rows.items():
        by_rank.setdefault(_rank_of(user, row_P, layout), []).append(user)
    places: dict[str, Place] = {}

    def chunks() -> Iterator[Any]:
        yield encoded_header(layout, dtype, {rank: len(by_rank[rank]) for rank in sorted(by_rank)})
        for rank in sorted(by_rank):
            own, users, kept = layout.with_rank(rank), by_rank[rank], []
            step = max(1, _ENCODED_BYTES // (4 * own.num_parameters))
            for start in range(0, len(users), step):
                part = users[start : start + step]
                rows_NP = _checked({user: rows[user] for user in part}, own)
                values, scales = encode(rows_NP, own, dtype)
                for offset, user in enumerate(part):
                    crc = zlib.crc32(scales[offset].data, zlib.crc32(values[offset].data))
                    places[user] = Place(pack, rank, start + offset, crc)
                kept.append(scales)
                yield values.data
            yield np.concatenate(kept).data if kept[0].size else b""

    return files.write(f"{FOLDER}/{pack}", chunks()), places


def _rank_of(user: str, row_P: Tensor, layout: LoraLayout) -> int:
    try:
        rank = layout.rank_of(row_P.numel())
    except ValueError:
        rank = 0
    if not 0 < rank <= layout.r:
        check_row(row_P, layout, f"adapter of user {user!r}")
    return rank


def _checked(rows: dict[str, Tensor], layout: LoraLayout) -> Tensor:
    """The rows as one block [N, P]; one look at the whole block, and at single rows only where it finds something."""
    rows_NP = torch.stack(list(rows.values())).float()
    effect_N = torch.zeros(len(rows_NP), dtype=torch.bool)
    # numpy's is one thread: torch's wait for each other many times longer where other work shares the cores
    if np.isfinite(rows_NP.numpy()).all():
        for _, _, b_NEr in layout.views(rows_NP):
            effect_N |= b_NEr.flatten(1).any(1)
            if bool(effect_N.all()):
                return rows_NP
    for user, row_P in rows.items():
        check_row(row_P, layout, f"adapter of user {user!r}")
    raise AssertionError("a block of rows was refused, none of its rows was")


def read_records(files: Files, wanted: Sequence[tuple[PackHeader, Place]]) -> np.ndarray:
    """Stored records [N, bytes] of one type and rank from any packs, numbers then scales, in the order given.

    Raises:
        FileNotFoundError: where a pack is missing.
        StoreError: where it does not hold what the catalog says.
    """
    records = read_unchecked(files, wanted)
    for record, (_, place) in zip(records, wanted, strict=True):
        if zlib.crc32(record.data) != place.checksum:
            raise StoreError(
                f"pack {files.location}/{FOLDER}/{place.pack}, rank {place.rank}, row {place.row}: the checksum does"
                " not match; restore the file or train again"
            )
    return records


def read_unchecked(files: Files, wanted: Sequence[tuple[PackHeader, Place]]) -> np.ndarray:
    """What `read_records` reads, damaged or not.

    Raises:
        FileNotFoundError: where a pack is missing.
        StoreError: where it is cut short.
    """
    first, place = wanted[0]
    block = first.blocks[place.rank]
    records = np.empty((len(wanted), block.value_bytes + block.scale_bytes), np.uint8)
    spans = []
    for record, (header, place) in zip(records, wanted, strict=True):
        block, name = header.blocks[place.rank], f"{FOLDER}/{place.pack}"
        spans.append(Span(name, block.values_start + place.row * block.value_bytes, record[: block.value_bytes]))
        if block.scale_bytes:
            spans.append(Span(name, block.scales_start + place.row * block.scale_bytes, record[block.value_bytes :]))
    files.read_into(spans)
    return records
