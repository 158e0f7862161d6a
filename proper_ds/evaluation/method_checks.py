"""Checks of what belongs to PPlug, PLoRA and merged adapters; called by `proper_ds.checks` with all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proper_ds.errors import Problem
from proper_ds.evaluation.methods import needs_of
from proper_ds.model.config import NUM_PERSONAL
from proper_ds.section import is_changed

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def check_rivals(config: RunConfig) -> list[Problem]:
    """Everything wrong with sections `pplug`, `plora` and `merge` that no single value shows."""
    needs, pplug, problems = needs_of(config), config.pplug, []
    owners = [
        ("pplug", pplug, "PPlug", bool(needs.pplugs)),
        ("plora", config.plora, "PLoRA", needs.plora),
        ("merge", config.merge, "merged", needs.merged),
    ]
    for name, section, method, is_needed in owners:
        for key in sorted(type(section).model_fields) if not is_needed else ():
            if is_changed(section, key):
                wrong = f"has no effect without method {method}"
                mend = "Remove it, or add the method to evaluation.methods."
                problems.append(Problem(f"{name}.{key}", wrong, mend))
    for key in ("encoder_revision", "pooling", "query_prefix") if pplug.encoder is None else ():
        if is_changed(pplug, key):
            wrong, mend = "has no effect without pplug.encoder", "Remove it, or name a sentence encoder."
            problems.append(Problem(f"pplug.{key}", wrong, mend))
    create, length = config.base.create, config.base.max_length
    if create is not None and needs.pplugs and length + NUM_PERSONAL > create.max_position_embeddings:
        wrong = f"{length} leaves no room for PPlug's {NUM_PERSONAL} tokens before the input"
        mend = f"Lower it, or raise base.create.max_position_embeddings to {length + NUM_PERSONAL}."
        problems.append(Problem("base.max_length", wrong, mend))
    if config.merge.num_neighbours > config.merge.num_anchors:
        wrong = f"{config.merge.num_neighbours} is more than merge.num_anchors {config.merge.num_anchors}"
        problems.append(Problem("merge.num_neighbours", wrong, "Lower it, or raise num_anchors."))
    return problems
