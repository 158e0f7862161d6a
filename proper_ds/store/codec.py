"""How an adapter's numbers become the bytes of a stored row: as they are, rounded to bfloat16, or int8 with scales.

Packs encode and decode through it. Shapes: N adapters, P numbers each, r rank, D in- and E out-features, Q scales.
int8 keeps one float32 scale for each rank of each module's A (a row) and of its B (a column): 2 r scales a module.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from proper_ds.model.lora import LoraLayout

Tensor = torch.Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_MAX_INT8 = 127


def num_scales(layout: LoraLayout, dtype: str) -> int:
    """Scales of one adapter: 0 unless it is stored as int8."""
    return 2 * layout.r * len(layout.modules) if dtype == "int8" else 0


def record_bytes(layout: LoraLayout, dtype: str) -> tuple[int, int]:
    """(bytes of the numbers, bytes of the scales) of one adapter."""
    return layout.num_parameters * DTYPES[dtype].itemsize, 4 * num_scales(layout, dtype)


def encode(rows_NP: Tensor, layout: LoraLayout, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [N, *] of the numbers and bytes [N, *] of their scales, which is empty unless `dtype` is int8."""
    if dtype == "int8":
        return _encode_int8(rows_NP, layout)
    stored = rows_NP.to(DTYPES[dtype]).contiguous()
    return stored.view(torch.uint8).numpy(), np.empty((len(rows_NP), 0), np.uint8)


def decode(records: np.ndarray, layout: LoraLayout, dtype: str) -> Tensor:
    """Adapters [N, P] in fp32 from records [N, bytes of the numbers + bytes of the scales] of `layout`'s own rank."""
    num_value_bytes, num_scale_bytes = record_bytes(layout, dtype)
    values_NB = torch.from_numpy(records[:, :num_value_bytes])
    if dtype != "int8":
        return values_NB.view(DTYPES[dtype]).float()
    rows_NP = values_NB.view(torch.int8).float()
    scales_NQ = torch.from_numpy(records[:, num_value_bytes:].copy()).view(torch.float32)
    assert scales_NQ.shape[1] * 4 == num_scale_bytes
    for matrix_NXr, scale_Nr in _scaled(rows_NP, scales_NQ, layout):
        matrix_NXr.mul_(scale_Nr.unsqueeze(1))
    return rows_NP


def _encode_int8(rows_NP: Tensor, layout: LoraLayout) -> tuple[np.ndarray, np.ndarray]:
    rows_NP = rows_NP.to(torch.float32, copy=True)
    scales_NQ = torch.empty(len(rows_NP), num_scales(layout, "int8"))
    for matrix_NXr, scale_Nr in _scaled(rows_NP, scales_NQ, layout):
        scale_Nr.copy_(matrix_NXr.abs().amax(1) / _MAX_INT8)
        # a row of zeros has scale 0 and stays zero
        matrix_NXr.div_(scale_Nr.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_()
    quantised = rows_NP.clamp_(-_MAX_INT8, _MAX_INT8).to(torch.int8)
    return quantised.view(torch.uint8).numpy(), scales_NQ.view(torch.uint8).numpy()


def _scaled(rows_NP: Tensor, scales_NQ: Tensor, layout: LoraLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (matrix [N, D or E, r], its scales [N, r]) of every A and B."""
    start = 0
    for _, a_NrD, b_NEr in layout.views(rows_NP):
        for matrix_NXr in (a_NrD.transpose(1, 2), b_NEr):
            yield matrix_NXr, scales_NQ[:, start : start + layout.r]
            start += layout.r
