"""What every stage finds on its machine: configuration, folders, data and the base; built anew in each process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import nn

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.prepared import PreparedData
from proper_ds.data.tokens import TokenData
from proper_ds.model.adapter_file import load_peft
from proper_ds.model.base import (
    check_head,
    find_targets,
    hidden_size,
    load_base,
    load_tokenizer,
    merge_lora,
    merging,
    open_base,
)
from proper_ds.model.base_files import BaseFiles, empty_base
from proper_ds.model.config import BaseConfig
from proper_ds.run_folder import RunFolder, StageFolder, in_lane

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def base_dtype(base: BaseConfig, on_gpu: bool) -> torch.dtype:
    """The base's type: as configured; `auto` is bfloat16 on GPUs and float32 on CPUs."""
    if base.dtype == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    return DTYPES[base.dtype]


@dataclass
class RunContext:
    """One run, in one of its lanes, as seen from one process.

    Attributes:
        lane: which prompts are trained on and asked; "" for the plain ones.
    """

    config: RunConfig
    device: torch.device
    lane: str = ""

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage of this lane."""
        return self.folder.stage(in_lane(name, self.lane))

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.config.output_path)

    @property
    def prepared_path(self) -> Path:
        """The prepared data: given, or the run's own."""
        given = self.config.data.prepared
        return Path(given) if given else self.folder.stage("prepared").path

    @property
    def base_name(self) -> str:
        """The base: given, or the run's own."""
        return self.config.base.model or str(self.folder.stage("base").path)

    @property
    def dtype(self) -> torch.dtype:
        """The base's type on this process's device."""
        return base_dtype(self.config.base, self.device.type == "cuda")

    @cached_property
    def prepared(self) -> PreparedData:
        """The prepared users."""
        # the run's own data holds no forgotten users; of given data the run may only leave them out
        forgotten = Forgotten.read(self.folder.root) if self.config.data.prepared else None
        return PreparedData(self.prepared_path, forgotten)

    @cached_property
    def keys(self) -> list[str]:
        """User keys by index."""
        return self.prepared.keys()

    @cached_property
    def key_column(self) -> pa.LargeStringArray:
        """User keys by index, for stages that ask for few of them."""
        return self.prepared.key_column()

    @cached_property
    def tokens(self) -> TokenData:
        """The tokenised examples."""
        return TokenData(self.stage("tokens").path)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(self.base_name, self.config.base.revision)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the base's states."""
        return hidden_size(self.base_name, self.config.base.revision)

    def load_lm(self, with_population: bool, zero3: dict[str, Any] | None = None) -> Any:
        """The frozen base on this device, with the population LoRA merged in where asked for.

        Args:
            zero3: a resolved DeepSpeed configuration of ZeRO stage 3: each rank then reads its own shards only.
        """
        if zero3 is not None:
            return self._load_sharded(with_population, zero3)
        lm = load_base(self.base_name, self.config.base.revision, self.dtype, self.device)
        if with_population:
            self.population_switch(lm).set(True)
        return lm

    def _load_sharded(self, with_population: bool, zero3: dict[str, Any]) -> Any:
        from proper_ds.distributed.sharded_base import gathering, shard  # actors never need DeepSpeed

        name, revision = self.base_name, self.config.base.revision
        lm = open_base(name, "model", lambda: empty_base(name, revision, self.dtype))
        with open_base(name, "model", lambda: BaseFiles(name, revision, self.dtype)) as files:
            files.check(lm)
            files.fill_buffers(lm)
            read = merging(files.read, *self._population()) if with_population else files.read
            shard(lm, read, zero3, self.device)
        lm.to(self.device)
        with gathering(lm):
            check_head(lm)
        return lm

    def _population(self) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
        """(A and B by module, scaling) of the run's population LoRA."""
        row_P, layout = load_peft(self.stage("population").path / "adapter")
        return {name: (a[0], b[0]) for name, a, b in layout.views(row_P.unsqueeze(0))}, layout.scaling

    def population_switch(self, lm: Any) -> PopulationSwitch:
        """What merges the run's population LoRA into a base loaded without it; make it before wrapping modules."""
        loras, scaling = self._population()
        targets = find_targets(lm, sorted({name.rsplit(".", 1)[-1] for name in loras}))
        return PopulationSwitch({name: targets[name] for name in loras}, loras, scaling)


class Populations:
    """One base under the population LoRAs of several lanes, one of them at a time; made before modules are wrapped."""

    def __init__(self, lm: Any, contexts: Sequence[RunContext], *, and_without: bool) -> None:
        """`and_without`: the plain base is wanted, too; else, with one lane, its weights are not kept."""
        self._switches = {context.lane: context.population_switch(lm) for context in contexts}
        self._now: str | None = None
        self._is_fixed = len(contexts) == 1 and not and_without
        if self._is_fixed:
            self._now = contexts[0].lane
            self._switches[self._now].set(True)
            self._switches.clear()

    def set(self, lane: str | None) -> None:
        """Merge a lane's LoRA, or none."""
        if lane == self._now:
            return
        assert not self._is_fixed, "the other weights were not kept"
        if self._now is not None:
            self._switches[self._now].set(False)
        if lane is not None:
            self._switches[lane].set(True)
        self._now = lane


class PopulationSwitch:
    """Merges a LoRA into linear modules, and puts the original weights back bit for bit."""

    def __init__(
        self, targets: dict[str, nn.Linear], loras: dict[str, tuple[torch.Tensor, torch.Tensor]], scaling: float
    ) -> None:
        self._targets, self._loras, self._scaling = targets, loras, scaling
        self._original: dict[str, torch.Tensor] = {}

    def set(self, merged: bool) -> None:
        """Merge, or undo it; nothing happens where that is the state already."""
        if merged == bool(self._original):
            return
        for name, linear in self._targets.items():
            if merged:
                self._original[name] = linear.weight.data
                linear.weight.data = linear.weight.data.clone()
                merge_lora(linear, *self._loras[name], self._scaling)
            else:
                linear.weight.data = self._original[name]
        if not merged:
            self._original = {}
