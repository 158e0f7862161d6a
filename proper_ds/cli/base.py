"""`proper-ds base create`: a small base for machines that cannot reach a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proper_ds.errors import ConfigError
from proper_ds.observe.progress import ProgressView
from proper_ds.section import problems_of

app = typer.Typer(no_args_is_help=True, help="The frozen base model.")


@app.callback()
def _group() -> None:
    """The frozen base model."""


@app.command()
def create(
    prepared: Annotated[Path, typer.Option(help="A folder written by `proper-ds data prepare`.")],
    out: Annotated[Path, typer.Option(help="Where to write the model, in Hugging Face form.")],
    train_split: Annotated[str, typer.Option(help="The split of the people to learn from.")] = "train",
    seed: Annotated[int, typer.Option()] = 41,
    vocab_size: Annotated[int, typer.Option()] = 2048,
    hidden_size: Annotated[int, typer.Option()] = 128,
    intermediate_size: Annotated[int, typer.Option()] = 384,
    num_hidden_layers: Annotated[int, typer.Option()] = 3,
    num_attention_heads: Annotated[int, typer.Option()] = 4,
    max_position_embeddings: Annotated[int, typer.Option()] = 512,
    max_steps: Annotated[int, typer.Option()] = 300,
    learning_rate: Annotated[float, typer.Option()] = 3e-3,
) -> None:
    """Train a small tokenizer and a small Llama on the histories of prepared data's training users."""
    from pydantic import ValidationError

    from proper_ds.data.prepared import PreparedData
    from proper_ds.model.config import BaseConfig, CreateBase
    from proper_ds.training.create_base import create_base

    try:
        settings = CreateBase(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_position_embeddings,
            max_steps=max_steps,
            learning_rate=learning_rate,
        )
    except ValidationError as error:
        raise ConfigError("options", [problem for _, problem in problems_of(CreateBase, error)]) from None
    view = ProgressView(Console())
    with view.running():
        size = create_base(
            PreparedData(prepared),
            settings,
            out,
            BaseConfig().prompt_suffix,
            train_split,
            seed,
            lambda step, total, loss: view.report("base", step, total, f"loss {loss:.4f}"),
        )
    typer.echo(f"a Llama of {size:,} parameters: {out}")
