"""A learned start of users' LoRAs: where all users begin, how fast each part of the adapter moves, how far to trust.

Learned over the training users by `training/start.py`; the user stage starts sets of preset `proper` from it.
Shapes: P numbers in one adapter, M parts: A and B of each module, in the layout's order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from proper_ds.errors import AdapterError
from proper_ds.files import atomic_path
from proper_ds.model.lora import LoraLayout

Tensor = torch.Tensor


@dataclass(frozen=True)
class UserStart:
    """Where every user's adapter starts.

    Attributes:
        row_P: the adapter that everybody starts from, in `layout`.
        factor_P: multiplies the user stage's learning rate, for each number of the adapter.
        prior_items: a user with n items keeps `n / (n + prior_items)` of what was learned from them.
    """

    layout: LoraLayout
    row_P: Tensor
    factor_P: Tensor
    prior_items: float

    def share(self, num_items: int) -> float:
        """How much a user with so many items keeps of what was learned from them."""
        return num_items / (num_items + self.prior_items)

    def shrunk(self, row_P: Tensor, num_items: int) -> Tensor:
        """A user's trained adapter drawn back towards the start by how little there was to learn from."""
        return self.row_P + (row_P - self.row_P) * self.share(num_items)
