"""The `distributed` section of a run: ranks and the DeepSpeed file of the population, group and router stages."""

from __future__ import annotations

from pydantic import Field

from proper_ds.section import Section


class DistributedConfig(Section):
    """Ranks are started by Ray Train, one GPU each where there are GPUs, else on CPU over gloo."""

    num_ranks: int = Field(default=1, ge=1)
    deepspeed: str = "ds_configs/zero2.json"
    """A DeepSpeed JSON file; values that say "auto" come from the stage's section of this run."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Ranks over which the group stage spreads its experts; the rest of the ranks hold copies of them."""
    num_cpus_per_rank: int = Field(default=1, ge=1)
    num_threads_per_rank: int = Field(default=1, ge=1)
    """Torch threads; results can differ in the last bit between numbers of threads."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a stage restarts from its last checkpoint after losing a rank."""
