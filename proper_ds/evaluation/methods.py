"""The compared methods as data: which stages stand behind each row of the report.

Every method answers through the same prompt builder and predictor; only these switches differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Gates = Literal["user", "lora", "joint"]


@dataclass(frozen=True)
class Method:
    """One row of the report.

    Attributes:
        population: the population LoRA is merged into the base.
        preset: the group experts of this preset are on, or None.
        user_lora: each user's own LoRA is on.
        gates: which router mixes the experts: user-aware (stage 2), LoRA-aware (stage 3.2), or one that was trained
            together with users' adapters.
        says: one line for the report.
    """

    name: str
    population: bool = False
    preset: str | None = None
    user_lora: bool = False
    gates: Gates = "user"
    says: str = ""

    @property
    def adapter_set(self) -> str | None:
        """The name of the set of user adapters behind this method, trained user by user (stage 3.1), or None."""
        if not self.user_lora:
            return None
        return self.preset or "OPPU"

    @property
    def joint_set(self) -> str | None:
        """The set of adapters that were trained on together with the router, if they were; others keep 3.1's."""
        return f"{self.preset}-joint" if self.gates == "joint" else None

    @property
    def own_set(self) -> str | None:
        """The set of adapters that answers, or None."""
        return self.joint_set or self.adapter_set

    @property
    def level_folder(self) -> str:
        """The folder, below the run's, of the group level that answers; only for methods with a preset."""
        assert self.preset is not None, f"{self.name} has no groups"
        if self.joint_set is not None:
            return f"store/{self.joint_set}"
        return f"{'router' if self.user_lora and self.gates == 'lora' else 'group'}/{self.preset}"


METHODS = {
    method.name: method
    for method in (
        Method("base", says="the frozen base, no adapter"),
        Method("population", population=True, says="one LoRA over everybody's data (stage 1)"),
        Method("group", True, "proper", says="experts with user-aware gates (stage 2, preset proper)"),
        Method("group-released", True, "proper-released", says="the same with the released mathematics"),
        Method("OPPU", True, None, True, says="one LoRA per user on the population model, without groups"),
        Method("proper", True, "proper", True, "lora", "one LoRA per user on the groups, LoRA-aware gates"),
        Method(
            "proper-released",
            True,
            "proper-released",
            True,
            "lora",
            "the same with the released mathematics",
        ),
        Method("proper-joint", True, "proper", True, "joint", "proper with stages 3.1 and 3.2 trained on together"),
        Method("proper-user-gates", True, "proper", True, "user", "proper before stage 3.2: user-aware gates"),
        Method(
            "proper-released-user-gates",
            True,
            "proper-released",
            True,
            "user",
            "proper-released before stage 3.2: user-aware gates",
        ),
    )
}


@dataclass(frozen=True)
class Needs:
    """What a list of methods needs trained, in order."""

    population: bool
    presets: tuple[str, ...]
    """Group stages."""
    adapter_sets: tuple[str, ...]
    """User stages: `OPPU` or a preset."""
    routers: tuple[str, ...]
    """LoRA-aware routers, by preset."""
    joints: tuple[str, ...]
    """LoRA-aware routers that are trained together with users' adapters, by preset."""

    @property
    def stages(self) -> list[str]:
        """Folders of all stages that a run of these methods has, in order; some may have been done elsewhere."""
        found = ["prepared", "base", "tokens", "population", "features"]
        found += [f"group/{name}" for name in self.presets] + [f"store/{name}" for name in self.adapter_sets]
        found += [f"router/{name}" for name in self.routers] + [f"store/{name}-joint" for name in self.joints]
        return [*found, "predictions"]


def needs_of(names: Sequence[str]) -> Needs:
    """The stages behind the methods called `names`, each once, in the order of the methods."""
    methods = [METHODS[name] for name in names]

    def once(values: list[str | None]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value for value in values if value is not None))

    return Needs(
        population=any(method.population for method in methods),
        presets=once([method.preset for method in methods]),
        adapter_sets=once([method.adapter_set for method in methods]),
        routers=once([m.preset for m in methods if m.user_lora and m.gates == "lora"]),
        joints=once([m.preset for m in methods if m.gates == "joint"]),
    )
