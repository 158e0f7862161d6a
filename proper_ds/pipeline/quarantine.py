"""Committing a unit that is given up: its users are served by their group, and the run goes on.

`pipeline/run.py` calls it.
"""

from __future__ import annotations

import numpy as np

from proper_ds.fleet.plan import Unit
from proper_ds.model.lora import LoraLayout
from proper_ds.store.store import AdapterStore
from proper_ds.training.context import RunContext


def give_up_unit(context: RunContext, unit: Unit, mask: np.ndarray, reason: str) -> None:
    """Commit the masked users of a unit as failed, with the reason.

    Where a worker that was thought lost has committed the unit after all, that stands and nothing changes.
    """
    config = context.config
    keys = [context.keys[user] for user in range(unit.first, unit.stop) if mask[user]]
    no_layout = LoraLayout((), config.user.lora.r, config.user.lora.lora_alpha)  # of adapters, of which there are none
    store = AdapterStore(context.folder.stage(f"store/{unit.part}").path)
    store.put_unit(
        unit.name, {}, dict.fromkeys(keys, reason), dict.fromkeys(keys, (0, [])), no_layout, config.store.dtype
    )
