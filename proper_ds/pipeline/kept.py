"""What a run with `user.only_changed` keeps: shared stages that are complete, whatever data they were made from.

`stages.py` asks it for each stage. Data may change from night to night, settings may not: a kept result of other
settings would pass for what the configuration says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proper_ds.errors import ConfigError, Problem, UserError
from proper_ds.run_folder import RunFolder
from proper_ds.training.set_plan import ASKED, NUM_ANCHORS, OF_NEEDED, ROUTER_USERS

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

KEPT_STEPS = ("base", "population", "group", "start", "router", "prior")
IDLE = ("num_tokens_per_unit", "num_slots", "num_tokens_per_batch")
"""Settings that say how the work is cut, not what is learned: they may change from night to night."""
_KEYS = {
    "seed": "seed",
    "dtype": "base.dtype",
    "stored_as": "store.dtype",
    "optimizer": "distributed.deepspeed",
    "train_split": "data.train_split",
    "suffix": "base.prompt_suffix",
    "max_length": "base.max_length",
    "prompt_suffix": "base.prompt_suffix",
    "splits": "evaluation.split",
    ROUTER_USERS: "router.users, router.max_users (with a LoRA-aware router in evaluation.methods)",
    NUM_ANCHORS: "merge.num_anchors",
}

_MEND = "Put it back, or train everything anew without user.only_changed."

Marker = dict[str, Any]


class Kept:
    """The kept stages of one run; nothing is kept before the population stage is complete.

    Attributes:
        data_changed: whether the data is another than the population stage learned from; set with the data.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises UserError where the run's results do not say what they were made from."""
        self._folder = RunFolder(config.output_path)
        self._population = self._folder.stage("population").inputs() if config.user.only_changed else None
        self._problems: dict[str, Problem] = {}
        self.data_changed = False
        if self._population is not None and "order" not in self._population.get("made_from", {}):
            raise UserError(
                f"user.only_changed: {self._folder.root} was made by an earlier version of proper_ds, which did not"
                " write down what an update needs; run once in another output_dir"
            )

    def __bool__(self) -> bool:
        return self._population is not None

    @property
    def made_from(self) -> dict[str, Any]:
        """What the population stage was made from."""
        assert self._population is not None
        found: dict[str, Any] = self._population["made_from"]
        return found

    def marker(self, name: str, settings: dict[str, Any], made_from: dict[str, Any]) -> Marker | None:
        """The marker of a complete result that is to be kept, or None where the stage is to be made.

        Args:
            settings: the stage's settings now.
            made_from: fingerprints of the stages before it now; a result made on another population or group level
                is not kept.
        """
        found = self._folder.stage(name).inputs() if self else None
        if found is None or not _same_line(found["made_from"], made_from):
            return None
        self.compare(name, found["settings"], settings)
        return found

    def begun(self, name: str, settings: dict[str, Any], made_from: dict[str, Any]) -> Marker | None:
        """What a set of adapters on the same population and group level was last begun for, or None."""
        found = self._folder.stage(name).begun() if self else None
        if found is None or not _same_line(found["made_from"], made_from):
            return None
        self.compare(name, found["settings"], settings)
        return found

    def compare(self, name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Note every setting that is not what it was when a result was made."""
        kind = "joint" if name.endswith("-joint") else name.partition("/")[0]
        section = {"base": "base.create", "store": "user"}.get(kind, kind)
        before, after = _flat(then), _flat(now)
        idle = {*IDLE, ASKED}  # whoever lacks an adapter that is needed now gets one
        if name == "base" and "train_split" not in before:
            idle.add("train_split")  # an earlier version, which read everybody's texts
        if NUM_ANCHORS not in after:
            idle.add(NUM_ANCHORS)  # `merged` is evaluated no more, which an update does not bear
        if before.get("users") != after.get("users"):
            idle.update(OF_NEEDED)  # what follows from `users` is not to be told besides
        for setting in sorted({*before, *after} - idle):
            was, given = before.get(setting), after.get(setting)
            if was != given:
                key = _KEYS.get(setting, f"{section}.{setting}")
                wrong = f"{given!r}, but {name} was made with {was!r}, which user.only_changed keeps"
                self._problems.setdefault(key, Problem(key, wrong, _MEND))

    def check_base(self, fingerprint: str) -> None:
        """Note a base that is not the one the population stage was trained on."""
        if self and self.made_from["base"] != fingerprint:
            wrong = "another base than the kept population stage was trained on"
            self._problems.setdefault("base.model", Problem("base.model", wrong, _MEND))

    def settle(self) -> None:
        """Raise ConfigError with everything that was noted."""
        if self._problems:
            raise ConfigError("user.only_changed", list(self._problems.values()))


def _same_line(then: dict[str, Any], now: dict[str, Any]) -> bool:
    shared = [name for name in now if name == "population" or name.startswith("group/")]
    return all(then.get(name) == now[name] for name in shared)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
