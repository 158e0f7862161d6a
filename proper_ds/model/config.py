"""The `base` section of a run and the `lora` sections of its stages (names as in Hugging Face and PEFT)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from proper_ds.section import Section

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


NUM_PERSONAL = 2
"""Tokens that PPlug puts before the input."""


class LoraSettings(Section):
    """One LoRA: `W x + lora_alpha / r * B A x` on every module whose name ends in a target (LoRA, Hu et al. 2021)."""

    r: int = Field(default=4, ge=1)
    lora_alpha: float = Field(default=8.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] = FEED_FORWARD
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Only these decoder layers, counted from 0 (PEFT's `layers_to_transform`)."""

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give at least one module name, each once, such as [q_proj, v_proj]")
        return value

    @field_validator("layers")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError("give at least one layer, each once, such as [4, 5], or leave it out")
        return value

    @property
    def scaling(self) -> float:
        """The factor `lora_alpha / r` before `B A x`."""
        return self.lora_alpha / self.r


class CreateBase(Section):
    """A small Llama and its tokenizer, trained from scratch on the prepared text, for offline machines."""

    vocab_size: int = Field(default=2048, ge=300)
    hidden_size: int = Field(default=128, ge=16)
    intermediate_size: int = Field(default=384, ge=16)
    num_hidden_layers: int = Field(default=3, ge=1)
    num_attention_heads: int = Field(default=4, ge=1)
    max_position_embeddings: int = Field(default=512, ge=32)
    max_steps: int = Field(default=300, ge=1)
    num_tokens_per_step: int = Field(default=4096, ge=64)
    learning_rate: float = Field(default=3e-3, gt=0)


class BaseConfig(Section):
    """The frozen base model."""

    model: str | None = None
    """A Hugging Face name or a local folder; leave empty when `create` is given."""
    revision: str | None = None
    create: CreateBase | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on GPUs, float32 on CPUs."""
    max_length: int = Field(default=512, ge=16)
    """Prompt plus answer, in tokens. Inputs are cut to fit, answers never."""
    prompt_suffix: str = "\n### Output:"
    """Stands between every input and its answer."""
