"""What the store's tests share: a small layout, rows of it, and putting them."""

from __future__ import annotations

import torch

from proper_ds.model.lora import LoraLayout, ModuleShape

LAYOUT = LoraLayout((ModuleShape("a.b", 6, 4), ModuleShape("a.c", 4, 8)), 2, 4.0)


def rows(count, seed=0, layout=LAYOUT):
    return torch.randn(count, layout.num_parameters, generator=torch.Generator().manual_seed(seed))


def put(store, unit, adapters, failures=None, dtype="float32", layout=LAYOUT, **options):
    losses = {user: (3, [2.0, 1.0]) for user in (*adapters, *(failures or {}))}
    return store.put_unit(unit, adapters, failures or {}, losses, layout, dtype, **options)
