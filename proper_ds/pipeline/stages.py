"""The stages of a run as data: what each is made from, as a fingerprint, and which stages stand before it.

A stage whose folder holds a result with the same fingerprint is skipped; see `run.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from proper_ds.data.manifest import Manifest
from proper_ds.data.prepare import describe_sources
from proper_ds.data.sources import find_sources
from proper_ds.distributed.ds_config import read_ds_file
from proper_ds.evaluation.methods import METHODS, needs_of
from proper_ds.files import digest_of
from proper_ds.model.base import base_fingerprint
from proper_ds.model.presets import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

    from proper_ds.config import RunConfig

Where = Literal["driver", "ranks", "fleet"]
STEPS = ("prepare", "base", "tokens", "population", "features", "group", "user", "router", "evaluate", "report")
"""What people call the stages; some stand for several folders."""

_ENCODER_ONLY = {
    "users",
    "constraint_weight",
    "balance_weight",
    "user_vector_size",
    "history_dropout",
    "generic_user_probability",
}


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    Attributes:
        name: its folder below the run.
        step: what people call it (see STEPS).
        where: who runs it.
        settings: everything it depends on besides the stages before it.
        fingerprint: of the settings and of the stages before it.
    """

    name: str
    step: str
    where: Where
    settings: dict[str, Any]
    fingerprint: str


def _dump(section: Any) -> dict[str, Any]:
    found: dict[str, Any] = section.model_dump(mode="json")
    return found


class StageList:
    """The stages that a configuration's methods need, in order; built once a run."""

    def __init__(self, config: RunConfig) -> None:
        """Reads the input files' digests. Raises UserError where data or base cannot be found."""
        self._config = config
        self._prints: dict[str, str] = {}
        self.stages: list[Stage] = []
        needs = needs_of(config.evaluation.methods)
        self._inputs()
        if needs.population:
            self._add("population", "population", "ranks", self._rank_settings("population"), ["tokens"])
        if any(PRESETS[preset].user_vector == "encoder" for preset in needs.presets):
            dtype = {"dtype": config.base.dtype, "num_tokens_per_unit": config.fleet.num_tokens_per_unit}
            self._add("features", "features", "fleet", dtype, ["population"])
        for preset in needs.presets:
            self._add_group(preset)
        for adapter_set in needs.adapter_sets:
            self._add_store(adapter_set)
        for preset in needs.routers:
            before = [f"group/{preset}", f"store/{preset}"]
            self._add(f"router/{preset}", "router", "ranks", self._rank_settings("router"), before)
        self._add_evaluation()

    def __iter__(self) -> Any:
        return iter(self.stages)

    def of(self, *steps: str) -> list[Stage]:
        """The stages that belong to the given steps, in order."""
        return [stage for stage in self.stages if stage.step in steps]

    def _add(self, name: str, step: str, where: Where, settings: dict[str, Any], before: list[str]) -> None:
        fingerprint = digest_of(name, settings, [self._prints[other] for other in before])
        self._prints[name] = fingerprint
        self.stages.append(Stage(name, step, where, settings, fingerprint))

    def _inputs(self) -> None:
        config, data = self._config, self._config.data
        if data.prepared is not None:
            self._prints["prepared"] = digest_of(_manifest_digest(config))
        else:
            settings = _dump(data) | {"sources": describe_sources(find_sources(data))}
            self._add("prepared", "prepare", "driver", settings, [])
        if config.base.create is not None:
            self._add(
                "base",
                "base",
                "driver",
                _dump(config.base.create) | {"seed": config.seed, "suffix": config.base.prompt_suffix},
                ["prepared"],
            )
        else:
            assert config.base.model is not None
            self._prints["base"] = base_fingerprint(config.base.model, config.base.revision)
        settings = {
            "max_length": config.base.max_length,
            "prompt_suffix": config.base.prompt_suffix,
            "train_split": data.train_split,
            "max_new_tokens": config.evaluation.max_new_tokens,
        }
        self._add("tokens", "tokens", "driver", settings, ["prepared", "base"])

    def _rank_settings(self, section: str) -> dict[str, Any]:
        config = self._config
        found = _dump(getattr(config, section))
        for without_effect in ("logging_steps", "save_steps"):
            found.pop(without_effect)
        return found | {
            "seed": config.seed,
            "dtype": config.base.dtype,
            "num_ranks": config.distributed.num_ranks,
            "optimizer": read_ds_file(config.distributed.deepspeed).get("optimizer"),
            "train_split": config.data.train_split,
        }

    def _add_group(self, preset: str) -> None:
        settings = self._rank_settings("group")
        before = ["population"]
        if PRESETS[preset].user_vector == "encoder":
            before.append("features")
        else:
            settings = {key: value for key, value in settings.items() if key not in _ENCODER_ONLY}
        self._add(f"group/{preset}", "group", "ranks", settings, before)

    def _add_store(self, adapter_set: str) -> None:
        config = self._config
        settings = _dump(config.user) | {
            "seed": config.seed,
            "dtype": config.base.dtype,
            "stored_as": config.store.dtype,
            "num_tokens_per_unit": config.fleet.num_tokens_per_unit,
        }
        if config.user.users == "needed":
            router = config.router
            settings |= {
                "router_users": [router.users, router.max_users],
                "splits": [config.data.train_split, config.evaluation.split],
            }
        before = ["population"] if adapter_set == "OPPU" else ["population", f"group/{adapter_set}"]
        self._add(f"store/{adapter_set}", "user", "fleet", settings, before)

    def _add_evaluation(self) -> None:
        config, evaluation = self._config, self._config.evaluation
        names = ("methods", "split", "closed_labels", "ordinal", "max_new_tokens")
        settings = {name: _dump(evaluation)[name] for name in names}
        settings |= {"dtype": config.base.dtype, "num_tokens_per_unit": config.fleet.num_tokens_per_unit}
        before = ["tokens"]
        for name in evaluation.methods:
            method = METHODS[name]
            before += ["population"] if method.population else []
            before += [f"group/{method.preset}"] if method.preset else []
            before += [f"store/{method.adapter_set}"] if method.adapter_set else []
            before += [f"router/{method.preset}"] if method.user_lora and method.gates == "lora" else []
        before = list(dict.fromkeys(before))
        self._add("predictions", "evaluate", "fleet", settings, before)
        bootstrap = {name: _dump(evaluation)[name] for name in ("num_bootstrap_samples", "confidence")}
        self._add("report", "report", "driver", bootstrap, ["predictions"])


def _manifest_digest(config: RunConfig) -> Any:
    from pathlib import Path

    assert config.data.prepared is not None
    manifest = Manifest.read(Path(config.data.prepared))
    return [[shard.digest for shard in manifest.shards], [asdict(task) for task in manifest.tasks.values()]]


def prepared_path(config: RunConfig) -> Path:
    """Where the run's prepared data is."""
    from pathlib import Path

    return Path(config.data.prepared) if config.data.prepared else config.output_path / "prepared"
