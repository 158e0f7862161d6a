"""`proper-ds store get`: one user's adapter out of a run's store, as a PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper_ds.config import RunConfig, read_yaml, validate
from proper_ds.errors import StoreError

app = typer.Typer(no_args_is_help=True, help="The adapter store.")


@app.callback()
def _group() -> None:
    """The adapter store."""


@app.command()
def get(
    user: Annotated[str, typer.Argument(help="The user's key, as in the data.")],
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    out: Annotated[Path, typer.Option(help="Where to write the PEFT directory.")],
    set: Annotated[str, typer.Option(help="Which adapters: OPPU, proper or proper-released.")] = "OPPU",
) -> None:
    """Write a user's own LoRA as a PEFT directory.

    It goes on top of the base with `population/adapter` merged in; in the sets `proper` and `proper-released` it was
    fitted with that run's group experts in place, which no PEFT directory can hold.
    """
    from proper_ds.model.adapter_file import peft_config, save_peft
    from proper_ds.store.store import AdapterStore

    config = run_config(run)
    folder = run / "store" / set
    if not folder.exists():
        held = sorted(path.name for path in (run / "store").glob("*")) if (run / "store").exists() else []
        raise StoreError(f"{run} has no set {set!r}; it has {', '.join(held) or 'none'}")
    store = AdapterStore(folder)
    row_P = store.get(user)
    lora = config.user.lora
    base = config.base.model or str(run / "base")
    about = peft_config(store.layout, lora.target_modules, lora.lora_dropout, base, config.base.revision)
    save_peft(out, row_P, store.layout, about)
    typer.echo(f"adapter of user {user!r} ({store.layout.num_parameters:,} numbers): {out}")


def run_config(run: Path) -> RunConfig:
    """The resolved configuration that a run wrote down."""
    path = run / "config.yaml"
    if not path.exists():
        raise StoreError(f"{run} is no run's folder: it has no config.yaml")
    return validate(read_yaml(path), str(path))
