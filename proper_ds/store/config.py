"""The `store` section of a run: how adapters are kept."""

from __future__ import annotations

from typing import Literal

from proper_ds.section import Section


class StoreConfig(Section):
    """Packs of safetensors with a catalog."""

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of stored adapters; bfloat16 halves the storage and rounds the weights, int8 quarters it and rounds more."""
