"""The whole group level: experts and routers of all modules, the user vectors, and their file.

Made by the group stage, frozen in the user stage, given LoRA-aware routers by the router stage, read by prediction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from proper_ds.model.experts import ExpertMixture, Experts, fresh_lora_A
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import Preset
from proper_ds.model.routing import ReleasedRouter, ReplacingLoraRouter, ResidualLoraRouter, Router, SummedRouter
from proper_ds.model.user_vectors import UserEncoder, UserTable
from proper_ds.model.weights_file import save_weights

Tensor = torch.Tensor


@dataclass(frozen=True)
class GroupSizes:
    """The numbers that a group level is built from, besides its layout and preset.

    Attributes:
        top_k: experts of a token; None: all of them.
        num_blocks: blocks of experts, one of which each user has; None: no blocks.
        feature_size: of the encoder presets.
        user_vector_size: of preset `proper`.
        num_users: of the table presets.
    """

    num_experts: int
    top_k: int | None = None
    num_blocks: int | None = None
    feature_size: int = 0
    user_vector_size: int = 0
    num_users: int = 0


class GroupLevel(nn.Module):
    """Experts and routers by module, and what makes user vectors.

    Attributes:
        experts, mixtures: by module name, dots replaced (`nn.ModuleDict` allows none).
        encoder, user_table: one of the two, as the preset says; no table while a stage trains it apart.
    """

    def __init__(
        self,
        layout: LoraLayout,
        preset: Preset,
        sizes: GroupSizes,
        seed: int,
        *,
        held: range | None = None,
        with_table: bool = True,
    ) -> None:
        """A fresh level.

        Args:
            held: the experts to be held here; all of them where none are given. Values do not depend on it.
            with_table: False leaves the user table to the caller.
        """
        super().__init__()
        self.layout, self.preset, self.sizes = layout, preset, sizes
        self.num_experts = sizes.num_experts
        self.lora_aware = False
        held = range(sizes.num_experts) if held is None else held
        generator = torch.Generator().manual_seed(seed)
        self.encoder = None
        if preset.user_vector == "encoder":
            size = sizes.user_vector_size
            self.encoder = UserEncoder(sizes.feature_size, size, generator, sizes.num_blocks or 0)
        self.user_table = None
        if preset.user_vector == "table" and with_table:
            self.user_table = UserTable(1 + sizes.num_users, self.table_width)
        self.experts, self.mixtures = nn.ModuleDict(), nn.ModuleDict()
        scale = layout.scaling * (1 / sizes.num_experts if preset.divide_by_experts else 1.0)
        first = 0
        for shape in layout.modules:
            router = self._fresh_router(shape.in_features, first, generator)
            first += shape.in_features
            # every rank draws all, a module at a time, and keeps its own: the values do not depend on who holds what
            lora_A_NrD = fresh_lora_A(sizes.num_experts, layout.r, shape.in_features, generator)
            experts = Experts(lora_A_NrD[held.start : held.stop].clone(), shape.out_features, scale, held.start)
            self.experts[_key(shape.name)] = experts
            self.mixtures[_key(shape.name)] = ExpertMixture(experts, router, sizes.top_k)

    def _fresh_router(self, in_features: int, first: int, generator: torch.Generator) -> Router:
        sizes = self.sizes
        if self.preset.gate == "summed":
            numbers = (in_features, sizes.num_experts, sizes.user_vector_size)
            return SummedRouter(*numbers, generator, sizes.num_blocks, self.preset.token_gate)
        return ReleasedRouter(in_features, sizes.num_experts, first, generator)

    @property
    def table_width(self) -> int:
        """Numbers in a line of the user table: the released one has a vector for each module, side by side."""
        if self.preset.gate == "summed":
            return self.sizes.user_vector_size
        return sum(shape.in_features for shape in self.layout.modules)

    @property
    def device(self) -> torch.device:
        """Where the routers lie."""
        return next(self.mixtures.parameters()).device

    def by_module(self) -> dict[str, ExpertMixture]:
        """The mixtures by their modules' names, to be attached."""
        return {shape.name: self._mixture(shape.name) for shape in self.layout.modules}

    def expert_weights(self) -> list[tuple[Tensor, Tensor]]:
        """(A [N, r, D], B [N, E, r]) of each module, in model order."""
        held = [mixture.experts for mixture in self.by_module().values()]
        return [(experts.lora_A.detach(), experts.lora_B.detach()) for experts in held]

    def _mixture(self, name: str) -> ExpertMixture:
        mixture = self.mixtures[_key(name)]
        assert isinstance(mixture, ExpertMixture)
        return mixture

    def add_lora_routers(self, seed: int) -> list[nn.Parameter]:
        """Exchange the routers for LoRA-aware ones (stage 3.2) and return the parameters that train there."""
        generator = torch.Generator().manual_seed(seed)
        trained = []
        for shape in self.layout.modules:
            mixture = self._mixture(shape.name)
            old = mixture.router
            new: ResidualLoraRouter | ReplacingLoraRouter
            if self.preset.lora_gate == "residual":
                assert isinstance(old, SummedRouter)
                new = ResidualLoraRouter(old, shape.out_features, self.num_experts)
            else:
                new = ReplacingLoraRouter(shape.out_features, self.num_experts, generator)
            new.lora.data = new.lora.data.to(mixture.experts.lora_A)
            mixture.router = new
            trained.append(new.lora)
        self.lora_aware = True
        return trained

    def save(self, path: Path, section: str) -> None:
        """Write all weights and what is needed to rebuild them; see `save_level`."""
        save_level(path, self.state_dict(), self.description(), section)

    def description(self) -> dict[str, Any]:
        """What is needed to rebuild the level, besides its weights."""
        return {
            "layout": self.layout.to_json(),
            "preset": asdict(self.preset),
            "sizes": asdict(self.sizes),
            "lora_aware": self.lora_aware,
        }

    @classmethod
    def load(cls, path: Path, held: range | None = None) -> GroupLevel:
        """The level in a file, frozen; `held` reads the rows of those experts only."""
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["group_level"])
            tensors = {}
            for name in file.keys():  # noqa: SIM118 - no mapping
                cut = held is not None and name.startswith("experts.")
                tensors[name] = file.get_slice(name)[held.start : held.stop] if cut and held else file.get_tensor(name)
        level = cls(
            LoraLayout.from_json(about["layout"]),
            Preset(**about["preset"]),
            GroupSizes(**about["sizes"]),
            seed=0,
            held=held,
        )
        if about["lora_aware"]:
            level.add_lora_routers(seed=0)
        level.load_state_dict(tensors)
        level.requires_grad_(False)
        return level


def save_level(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any], section: str) -> None:
    """Write a group level's file; all or nothing. Raises AdapterError where a weight is not finite.

    Args:
        about: see `GroupLevel.description`.
        section: of the stage that trained it, for the message.
    """
    save_weights(path, tensors, "group_level", about, section)


def _key(name: str) -> str:
    return name.replace(".", "|")
