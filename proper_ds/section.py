"""The base class of all configuration sections, and how their errors become problems with a mend.

Used by every `*/config.py` and by `proper_ds.config`; nothing else.
"""

from __future__ import annotations

import difflib
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from proper_ds.errors import Problem


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def is_changed(section: Section, name: str) -> bool:
    """Whether a value is not the default.

    Unlike `model_fields_set`, this is the same when a written configuration, which has all keys, is loaded again.
    """
    return bool(getattr(section, name) != type(section).model_fields[name].get_default())


def section_at(model: type[BaseModel], keys: tuple[str, ...]) -> type[BaseModel] | None:
    """The section class that sits at the dotted path `keys` below `model`, or None."""
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            return None
        found = _section_in(field.annotation)
        if found is None:
            return None
        model = found
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is Union or get_args(annotation):
        for part in get_args(annotation):
            found = _section_in(part)
            if found is not None:
                return found
    return None


def _unknown_key(model: type[BaseModel], loc: tuple[str, ...], given: Any) -> Problem:
    owner = section_at(model, loc[:-1])
    legal = sorted(owner.model_fields) if owner is not None else []
    near = difflib.get_close_matches(loc[-1], legal, n=1)
    mend = f"Did you mean `{near[0]}`?" if near else "Remove it."
    return Problem(".".join(loc), f"unknown key (given {given!r})", f"{mend} Legal keys here: {', '.join(legal)}.")


def problems_of(model: type[BaseModel], error: ValidationError) -> list[tuple[tuple[str, ...], Problem]]:
    """Each pydantic error as (location, problem), the location without pydantic's union tags."""
    found: dict[tuple[str, ...], Problem] = {}
    for item in error.errors():
        loc = _real_location(model, tuple(str(part) for part in item["loc"]))
        kind, given = item["type"], item["input"]
        if kind == "extra_forbidden":
            found[loc] = _unknown_key(model, loc, given)
        elif kind == "missing":
            found[loc] = Problem(".".join(loc), "not set", f"Give it in the YAML or as `{'.'.join(loc)}=VALUE`.")
        else:
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            if kind == "model_type":
                message = "Give a section of keys"
            wrong = f"{given!r} is not legal"
            if loc in found:  # a choice of types complains once for each of them, a list once for each element
                before = found[loc]
                message = (
                    before.mend.rstrip(".") if message in before.mend else f"{before.mend.rstrip('.')}; or: {message}"
                )
                wrong = before.wrong if repr(given) in before.wrong else f"{given!r}, {before.wrong}"
            found[loc] = Problem(".".join(loc), wrong, f"{message}.")
    return list(found.items())


def _real_location(model: type[BaseModel], loc: tuple[str, ...]) -> tuple[str, ...]:
    """Cut a location at the first field that is not a section: pydantic appends union members and indices."""
    current: type[BaseModel] | None = model
    kept: list[str] = []
    for part in loc:
        if current is None:
            break
        kept.append(part)
        field = current.model_fields.get(part)
        current = _section_in(field.annotation) if field is not None else None
    return tuple(kept)
