"""Adapters of several users as one, without training: after MTA (arXiv 2511.20072) and Per-Pcs (arXiv 2406.10471).

Shapes: N anchors, F feature size, k neighbours, P numbers of an adapter.
"""

from __future__ import annotations

import torch
from torch import nn

from proper_ds.model.lora import LoraLayout

Tensor = torch.Tensor


def merged_layout(layout: LoraLayout, num_neighbours: int) -> LoraLayout:
    """The layout that holds a merge of so many adapters: their ranks side by side."""
    return layout.with_rank(layout.r * num_neighbours)


def merged_row(rows_kP: Tensor, weight_k: Tensor, layout: LoraLayout, wide: LoraLayout) -> Tensor:
    """`sum_i w_i B_i A_i` of adapters in `layout`, exactly, as one adapter in the wider layout.

    A's are laid one below the other and B's side by side, which carry the weights and the ratio of the scalings.
    """
    merged_P = rows_kP.new_zeros(wide.num_parameters)
    ratio = wide.r / layout.r  # both have the same lora_alpha
    parts = layout.views(rows_kP)
    for (_, a, b), (_, wide_a, wide_b) in zip(parts, wide.views(merged_P.unsqueeze(0)), strict=True):
        used = len(rows_kP) * layout.r
        wide_a[0, :used] = a.flatten(0, 1)
        wide_b[0, :, :used] = (b * (weight_k * ratio).view(-1, 1, 1)).transpose(0, 1).flatten(1)
    return merged_P


def nearest(own_F: Tensor, anchors_NF: Tensor, num_neighbours: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(positions [k] of the most similar anchors by cosine, their weights [k]: softmax of cosine / temperature)."""
    cosine_N = nn.functional.cosine_similarity(own_F.unsqueeze(0), anchors_NF)
    best = cosine_N.topk(min(num_neighbours, len(anchors_NF)))
    return best.indices, (best.values / temperature).softmax(-1)
