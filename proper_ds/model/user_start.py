"""A learned start of users' LoRAs: where all users begin, how fast each part moves, how far a little evidence counts.

Learned over the training users by `training/start.py`; the user stage starts preset `proper`'s set from it.
Shapes: P numbers in one adapter; M parts: A and B of each module, in the layout's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from proper_ds.model.lora import LoraLayout
from proper_ds.model.weights_file import read_about, save_weights

Tensor = torch.Tensor

KIND = "user_start"
START = "start.safetensors"
"""The file, in the folder of stage `start/<preset>`."""


def part_sizes(layout: LoraLayout) -> list[int]:
    """Numbers in each of an adapter's M parts."""
    return [layout.r * width for m in layout.modules for width in (m.in_features, m.out_features)]


@dataclass(frozen=True)
class UserStart:
    """Where every user's adapter starts, and how it moves from there.

    Attributes:
        row_P: the adapter that everybody starts from, in `layout`.
        factor_M: multiplies the learning rate, for each part of the adapter.
        prior_items: a user with n items keeps `n / (n + prior_items)` of what was learned from them.
    """

    layout: LoraLayout
    row_P: Tensor
    factor_M: Tensor
    prior_items: float

    @property
    def factor_P(self) -> Tensor:
        """`factor_M` for each number of the adapter."""
        sizes = torch.tensor(part_sizes(self.layout), device=self.factor_M.device)
        return self.factor_M.repeat_interleave(sizes)

    def share(self, num_items: int) -> float:
        """How much a user with so many items keeps of what was learned from them."""
        return num_items / (num_items + self.prior_items)

    def shrunk(self, row_P: Tensor, num_items: int) -> Tensor:
        """A user's trained adapter drawn back towards the start by how little there was to learn from."""
        start_P = self.row_P.to(row_P)
        return start_P + (row_P - start_P) * self.share(num_items)

    def save(self, path: Path, section: str) -> None:
        """Write the file, all or nothing. Raises AdapterError where a number is not finite."""
        tensors = {"row": self.row_P, "factor": self.factor_M, "prior_items": torch.tensor([self.prior_items])}
        save_weights(path, tensors, KIND, {"layout": self.layout.to_json()}, section)

    @classmethod
    def load(cls, path: Path) -> UserStart:
        """The start in a file."""
        layout, tensors = LoraLayout.from_json(read_about(path, KIND)["layout"]), load_file(path)
        return cls(layout, tensors["row"], tensors["factor"], float(tensors["prior_items"]))
