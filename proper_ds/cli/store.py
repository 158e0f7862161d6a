"""`proper-ds store get`: one user's adapter out of a run's store, as a PEFT directory; `forget` is in `forget.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from proper_ds.cli.forget import forget
from proper_ds.errors import StoreError

app = typer.Typer(no_args_is_help=True, help="The adapter store.")
app.command()(forget)


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
    from proper_ds.erasure.exports import record_export
    from proper_ds.model.adapter_file import peft_config, save_peft
    from proper_ds.store.store import AdapterStore

    if not (run / "config.yaml").exists():
        raise StoreError(f"{run} is no run's folder: it has no config.yaml")
    folder = run / "store" / set
    if not folder.exists():
        held = sorted(path.name for path in (run / "store").glob("*")) if (run / "store").exists() else []
        raise StoreError(f"{run} has no set {set!r}; it has {', '.join(held) or 'none'}")
    store = AdapterStore(folder)
    row_P = store.get(user)
    # what the population adapter was made for, whatever the run's YAML says by now
    made_for = json.loads((run / "population/adapter/adapter_config.json").read_text(encoding="utf-8"))
    base = str(run / "base") if (run / "base").exists() else made_for["base_model_name_or_path"]
    modules = sorted({module.name.rsplit(".", 1)[-1] for module in store.layout.modules})
    about = peft_config(store.layout, modules, 0.0, base, made_for["revision"])
    save_peft(out, row_P, store.layout, about)
    record_export(run, user, set, out)
    typer.echo(f"adapter of user {user!r} ({store.layout.num_parameters:,} numbers): {out}")
