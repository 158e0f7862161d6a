"""Committing a unit that is given up: its users are served by their group, and the run goes on.

`pipeline/run.py` calls it.
"""

from __future__ import annotations

from proper_ds.fleet.plan import Unit
from proper_ds.model.lora import LoraLayout
from proper_ds.store.elsewhere import open_store
from proper_ds.training.context import RunContext
from proper_ds.training.selection import num_history
from proper_ds.training.set_plan import SetPlan


def give_up_unit(context: RunContext, unit: Unit, plan: SetPlan, reason: str) -> None:
    """Commit the chosen users of a unit as failed, with the reason; in an update, the adapters they had stay current.

    Where a worker that was thought lost has committed the unit after all, that stands and nothing changes.

    Args:
        reason: is stored with each of the users, so it names none, and quotes nothing that may.
    """
    config = context.config
    # somebody chosen may have been forgotten since
    has_history = num_history(context.tokens) > 0
    users = [user for user in range(unit.first, unit.stop) if plan.chosen[user] and has_history[user]]
    keys = [context.keys[user] for user in users]
    no_layout = LoraLayout((), config.user.lora.r, config.user.lora.lora_alpha)  # of adapters, of which there are none
    store = open_store(context.folder.stage(unit.part).path)
    failures, losses = dict.fromkeys(keys, reason), dict.fromkeys(keys, (0, list[float]()))
    # without digests: the next update tries these users again
    store.put_unit(unit.name, {}, failures, losses, no_layout, config.store.dtype, version=plan.version)
