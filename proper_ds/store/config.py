"""The `store` section of a run: how adapters are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from proper_ds.section import Section


class StoreConfig(Section):
    """Packs of safetensors with a catalog."""

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of stored adapters; bfloat16 halves the storage and rounds the weights, int8 quarters it and rounds more."""
    location: str | None = None
    """Where adapters go instead of the run's folder: a folder, or an fsspec URI such as s3://bucket/adapters."""

    @field_validator("location")
    @classmethod
    def _shared(cls, value: str | None) -> str | None:
        protocol, found, _ = (value or "").partition("://")
        if found and protocol not in ("file", "s3", "s3a", "gs", "gcs"):
            raise ValueError("give a folder, s3:// or gs://: elsewhere two writers could both commit")
        return value
