"""A merge of adapters is the weighted sum of their products, exactly; similar users weigh more."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.model.lora import LoraLayout, ModuleShape, SlotBuffers
from proper_ds.model.merge import merged_layout, merged_row, nearest

LAYOUT = LoraLayout((ModuleShape("a", 6, 5), ModuleShape("b", 5, 4)), 2, 4.0)


@given(num=st.integers(1, 4), room=st.integers(0, 2), seed=st.integers(0, 99))
def test_the_merge_is_the_weighted_sum(num, room, seed):
    generator = torch.Generator().manual_seed(seed)
    rows_kP = torch.randn(num, LAYOUT.num_parameters, generator=generator)
    weight_k = torch.rand(num, generator=generator).softmax(0)
    wide = merged_layout(LAYOUT, num + room)
    slots = SlotBuffers(wide, 2, torch.float32, "cpu", trainable=False)
    slots.weights_SP[1] = merged_row(rows_kP, weight_k, LAYOUT, wide)
    for (name, module), shape in zip(slots.modules().items(), LAYOUT.modules, strict=True):
        x_RTD = torch.randn(1, 3, shape.in_features, generator=generator)
        wanted = sum(
            w * LAYOUT.scaling * x_RTD @ a[0].T @ b[0].T
            for w, row_P in zip(weight_k, rows_kP, strict=True)
            for other, a, b in LAYOUT.views(row_P.unsqueeze(0))
            if other == name
        )
        torch.testing.assert_close(module(x_RTD, torch.tensor([1])), wanted, rtol=1e-4, atol=1e-5)


def test_the_most_similar_weigh_most():
    anchors_NF = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [2.0, 1.0]])
    positions_k, weight_k = nearest(torch.tensor([5.0, 0.1]), anchors_NF, 2, temperature=0.1)
    assert positions_k.tolist() == [0, 3]
    assert weight_k[0] > weight_k[1]
    assert float(weight_k.sum()) == 1
    positions_k, _ = nearest(torch.tensor([5.0, 0.1]), anchors_NF, 9, temperature=0.1)
    assert sorted(positions_k.tolist()) == [0, 1, 2, 3], "there may be fewer anchors than asked for"
