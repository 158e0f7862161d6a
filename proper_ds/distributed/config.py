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
    min_ranks: int = Field(default=1, ge=1)
    """After a loss, and at the start of a stage in a cluster of others, go on with as many ranks as there is room for,
    if that are so many; with fewer, wait. `num_ranks` waits for replacements always."""
    max_restarts: int = Field(default=3, ge=0)
    """How often in a row a stage restarts after losing a rank without having written a new checkpoint."""
    start_timeout_s: float = Field(default=600, gt=0)
    """How long to wait for room for `min_ranks`."""
    collective_timeout_s: float = Field(default=600, ge=30)
    """Ranks that wait for each other for longer end and restart: what it costs when two ranks cannot reach each other
    although the driver reaches both. (It notices by itself, in seconds, when a rank or host is gone.) The others wait
    also while the first rank writes a stage's result."""
