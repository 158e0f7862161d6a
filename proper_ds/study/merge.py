"""Changes to a run's configuration: sections merge, everything else is replaced.

`plan.py` and `trials.py` use it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from proper_ds.config import RunConfig
from proper_ds.section import section_at


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One raw configuration of several, a later one before an earlier one; keys may be dotted."""
    found: dict[str, Any] = {}
    for layer in layers:
        _merge(found, layer, ())
    return found


def _merge(into: dict[str, Any], changes: Mapping[str, Any], at: tuple[str, ...]) -> None:
    for dotted, value in changes.items():
        keys = str(dotted).split(".") if isinstance(dotted, str) else [dotted]
        inner: dict[str, Any] = into
        for key in keys[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        here, path = keys[-1], (*at, *map(str, keys))
        if isinstance(value, Mapping) and isinstance(inner.get(here), dict) and _is_section(path):
            _merge(inner[here], value, path)
        elif isinstance(value, Mapping) and _is_section(path):
            inner[here] = {}
            _merge(inner[here], value, path)
        else:
            inner[here] = copy.deepcopy(value)


def _is_section(path: tuple[str, ...]) -> bool:
    return section_at(RunConfig, path) is not None


def dotted_keys(changes: Mapping[str, Any], at: str = "") -> list[str]:
    """Every key that changes set, dotted down to what is no section."""
    found = []
    for key, value in changes.items():
        dotted = f"{at}.{key}" if at else str(key)
        inner = isinstance(value, Mapping) and _is_section(tuple(dotted.split(".")))
        found += dotted_keys(value, dotted) if inner else [dotted]
    return found


def without_model(raw: dict[str, Any]) -> dict[str, Any]:
    """The `base` section without what says which base it is, so that another can be given."""
    base = raw.get("base")
    if isinstance(base, dict):
        base = {key: value for key, value in base.items() if key not in ("model", "revision", "create")}
    return raw | {"base": base or {}}
