"""What of a run's configuration its numbers depend on, as digests: reports, `report verify` and the ledgers use them.

The digests are of the configuration as `config.yaml` has it, so that they can be made again from that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proper_ds.files import digest_of
from proper_ds.training.config import learned_by

RANK_SECTIONS = ("population", "group", "start", "router", "joint", "pplug", "plora")
AROUND = ("output_dir", "fleet", "distributed", "chosen_by")
"""Where and by whom the work is done. What DeepSpeed's file says of the optimizer is in the stages' fingerprints."""
IDLE = {
    "user": ("only_changed",),
    "store": ("location",),
    "evaluation": ("num_tokens_per_batch",),
}
UNREAD = {
    "user": ("num_slots", "num_tokens_per_batch", "cache_bytes"),
    "evaluation": ("num_bootstrap_samples", "confidence", "references"),
}
"""Settings that change neither an adapter nor an answer: how work is cut, and how answers are summed up."""


def configuration_digest(raw: Mapping[str, Any]) -> str:
    """Of everything that a report's numbers depend on.

    Args:
        raw: a run's configuration as JSON values, all keys given, as in `config.yaml`.
    """
    return digest_of(_without(_numbers_of(raw), IDLE))


def configuration_hash(raw: Mapping[str, Any]) -> str:
    """Of everything that can change an answer, but the seed: several seeds of one configuration are one choice."""
    found = _without(_without(_numbers_of(raw), IDLE), UNREAD)
    return digest_of({name: value for name, value in found.items() if name != "seed"})


def _numbers_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in raw.items() if name not in AROUND}
    return found | {name: learned_by(found[name]) for name in RANK_SECTIONS if name in found}


def _without(raw: Mapping[str, Any], idle: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return {
        name: {key: part for key, part in value.items() if key not in idle[name]} if name in idle else value
        for name, value in raw.items()
    }
