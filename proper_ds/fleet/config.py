"""The `fleet` section of a run: the Ray actors that work through units of users."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proper_ds.section import Section


class FleetConfig(Section):
    """Actors share nothing but the store, so their number changes no result."""

    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """`auto`: one for each GPU of the cluster, or for each CPU where there is none, also as nodes come and go."""
    num_cpus_per_actor: int = Field(default=1, ge=1)
    num_threads_per_actor: int = Field(default=1, ge=1)
    """Torch threads; results can differ in the last bit between numbers of threads."""
    start_timeout_s: float = Field(default=600, gt=0)
    """How long to wait, with no actor running, for the cluster to have room for one."""
    ping_timeout_s: float = Field(default=30, ge=5)
    """An actor that gives no sign of life for so long is replaced; it gives them while it trains."""
    num_tokens_per_unit: int = Field(default=200_000, ge=1)
    """Size of a work unit (a fixed set of users committed together), in tokens of one epoch."""
    max_retries: int = Field(default=3, ge=0)
    """How often a unit that failed, or was lost with its actor, is tried again: after 1, 2, 4 s and so on, and not on a
    host or GPU where it failed while there are others."""
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the users that may be given up, and served by their groups, because their unit failed more often than
    that; beyond it the run stops. It counts from the start of the command."""
