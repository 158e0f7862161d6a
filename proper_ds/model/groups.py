"""The whole group level: experts and routers of all modules, the user encoder, and their file.

Made by the group stage, frozen in the user stage, given LoRA-aware routers by the router stage, read by prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from proper_ds.errors import AdapterError
from proper_ds.files import atomic_path
from proper_ds.model.experts import ExpertMixture
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS, Preset
from proper_ds.model.routing import ReleasedRouter, ReplacingLoraRouter, ResidualLoraRouter, Router, SummedRouter
from proper_ds.model.user_vectors import UserEncoder

Tensor = torch.Tensor


class GroupLevel(nn.Module):
    """Experts and routers by module, and the user encoder where the preset has one.

    Attributes:
        mixtures: by module name, dots replaced (`nn.ModuleDict` allows none).
    """

    def __init__(
        self,
        layout: LoraLayout,
        preset: Preset,
        num_experts: int,
        seed: int,
        *,
        feature_size: int = 0,
        user_vector_size: int = 0,
        num_users: int = 0,
    ) -> None:
        """A fresh level; `feature_size` and `user_vector_size` for an encoder preset, `num_users` for a table one."""
        super().__init__()
        self.layout, self.preset, self.num_experts = layout, preset, num_experts
        self.sizes = {"feature_size": feature_size, "user_vector_size": user_vector_size, "num_users": num_users}
        self.lora_aware = False
        generator = torch.Generator().manual_seed(seed)
        self.encoder = (
            UserEncoder(feature_size, user_vector_size, generator) if preset.user_vector == "encoder" else None
        )
        self.mixtures = nn.ModuleDict()
        factor = 1 / num_experts if preset.divide_by_experts else 1.0
        for shape in layout.modules:
            router: Router
            if preset.gate == "summed":
                router = SummedRouter(shape.in_features, num_experts, user_vector_size, generator)
            else:
                router = ReleasedRouter(shape.in_features, num_experts, num_users, generator)
            self.mixtures[_key(shape.name)] = ExpertMixture(
                shape.in_features, shape.out_features, num_experts, layout.r, layout.scaling, factor, router, generator
            )

    def by_module(self) -> dict[str, ExpertMixture]:
        """The mixtures by their modules' names, to be attached."""
        return {shape.name: self._mixture(shape.name) for shape in self.layout.modules}

    def expert_weights(self) -> list[tuple[Tensor, Tensor]]:
        """(A [N, r, D], B [N, E, r]) of each module, in model order."""
        return [(mixture.lora_A.detach(), mixture.lora_B.detach()) for mixture in self.by_module().values()]

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
            new.lora.data = new.lora.data.to(mixture.lora_A)
            mixture.router = new
            trained.append(new.lora)
        self.lora_aware = True
        return trained

    def set_unknown_user(self, lines: Tensor) -> None:
        """Give users without a table line of their own the mean of the trained `lines` (table presets only)."""
        for shape in self.layout.modules:
            router = self._mixture(shape.name).router
            if isinstance(router, ReleasedRouter):
                router.set_unknown_user(lines)

    def save(self, path: Path) -> None:
        """Write all weights and what is needed to rebuild them; all or nothing. Raises AdapterError if not finite."""
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        bad = [name for name, value in tensors.items() if not value.isfinite().all()]
        if bad:
            raise AdapterError(f"group level: weights are not finite in {bad[0]}; lower group.learning_rate")
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"group_level": json.dumps(self._description())})

    def _description(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "preset": self.preset.name,
            "num_experts": self.num_experts,
            "sizes": self.sizes,
            "lora_aware": self.lora_aware,
        }

    @classmethod
    def load(cls, path: Path) -> GroupLevel:
        """The level in a file, frozen."""
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["group_level"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        level = cls(
            LoraLayout.from_json(about["layout"]),
            PRESETS[about["preset"]],
            about["num_experts"],
            seed=0,
            **about["sizes"],
        )
        if about["lora_aware"]:
            level.add_lora_routers(seed=0)
        level.load_state_dict(tensors)
        level.requires_grad_(False)
        return level


def _key(name: str) -> str:
    return name.replace(".", "|")
