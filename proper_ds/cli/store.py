"""`proper-ds store`: what a store holds, one user's adapter out of it, and its upkeep; `forget` is in `forget.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proper_ds.cli.forget import forget
from proper_ds.errors import StoreError

if TYPE_CHECKING:
    from proper_ds.store.store import AdapterStore

MAX_TOLD = 20

app = typer.Typer(no_args_is_help=True, help="The adapter store.")
app.command()(forget)

User = Annotated[str, typer.Argument(help="The user's key, as in the data.")]
Run = Annotated[Path | None, typer.Option(help="The run's folder.")]
Set = Annotated[str, typer.Option(help="Which adapters: OPPU, proper, proper-released or proper-joint, or NAME@LANE.")]
Store = Annotated[str | None, typer.Option(help="A store outside a run: a folder or an fsspec URI.")]


@app.callback()
def _group() -> None:
    """The adapter store."""


def _folder_of(run: Path, name: str) -> Path:
    if not (run / "config.yaml").exists():
        raise StoreError(f"{run} is no run's folder: it has no config.yaml")
    folder = run / "store" / name
    if not folder.exists():
        held = sorted(path.name for path in (run / "store").glob("*")) if (run / "store").exists() else []
        raise StoreError(f"{run} has no set {name!r}; it has {', '.join(held) or 'none'}")
    return folder


def _opened(run: Path | None, name: str, location: str | None) -> AdapterStore:
    from proper_ds.store.elsewhere import open_store
    from proper_ds.store.store import AdapterStore

    if (run is None) == (location is None):
        raise StoreError("give --run with the run's folder, or --store with a folder or URI, and not both")
    if run is not None:
        store = open_store(_folder_of(run, name))
    else:  # also a folder store/<set> of a run
        store = open_store(Path(location)) if location and "://" not in location else AdapterStore(location or "")
    if location is not None and not store.catalog.has_anything():
        raise StoreError(f"{location} holds no store: its catalog/ is empty or missing")
    return store


@contextmanager
def _kept_to_itself(run: Path | None) -> Iterator[None]:
    """Keep runs and forgetting out of a run's folder while the block changes its adapters or what is on record."""
    from proper_ds.erasure.forget import check_nothing_pending
    from proper_ds.run_folder import RunFolder

    if run is None or not (run / "config.yaml").exists():
        yield  # a store of its own, or no run: opening it says so
        return
    with RunFolder(run).locked():
        check_nothing_pending(run)
        yield


@app.command()
def ls(
    run: Run = None,
    set: Set = "OPPU",
    store: Store = None,
    limit: Annotated[int, typer.Option(min=0, help="How many users to list; 0 for all.")] = MAX_TOLD,
    failed: Annotated[bool, typer.Option(help="Those whose training failed, with the reason.")] = False,
) -> None:
    """List users with an adapter, or those without one and why."""
    held = _opened(run, set, store)
    lines = [f"{user}: {why}" for user, why in held.failures().items()] if failed else held.users()
    shown = lines[: limit or None]
    for line in shown:
        typer.echo(line)
    if len(shown) < len(lines):
        typer.echo(f"... {len(lines) - len(shown):,} more (--limit 0 lists all)", err=True)


@app.command()
def show(user: User, run: Run = None, set: Set = "OPPU", store: Store = None) -> None:
    """Tell a user's versions and rollbacks, oldest first, and which version is current."""
    held = _opened(run, set, store)
    current = held.entry(user)
    if current is None:
        raise StoreError(f"store {held.location} has no user {user!r} (cold, or not trained)")
    for entry in held.history(user):
        if entry.status == "rollback":
            typer.echo(f"  rolled back to version {entry.version}")
            continue
        mark = "*" if entry == current else " "
        if entry.status == "failed":
            typer.echo(f"{mark} version {entry.version}: failed: {entry.reason}")
            continue
        digest = f", learned from {entry.digest}" if entry.digest else ""
        typer.echo(
            f"{mark} version {entry.version}: rank {entry.rank}, {entry.num_items} items, {entry.num_steps} steps, loss"
            f" {entry.first_loss:.4f} to {entry.last_loss:.4f}{digest}; {entry.pack} row {entry.row}"
        )


@app.command()
def get(
    user: User,
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    out: Annotated[Path, typer.Option(help="Where to write the PEFT directory.")],
    set: Set = "OPPU",
) -> None:
    """Write a user's own LoRA as a PEFT directory.

    It goes on top of the base with `population/adapter` merged in (of a set NAME@LANE, `population@LANE/adapter`); in
    the sets `proper` and `proper-released` it was fitted with that run's group experts in place, which no PEFT
    directory can hold.
    """
    from proper_ds.erasure.exports import export
    from proper_ds.model.adapter_file import peft_config, save_peft
    from proper_ds.run_folder import base_under

    with _kept_to_itself(run):
        row_P, layout = _opened(run, set, None).get_exact(user)
        base, revision = base_under(run, set)
        modules = sorted({module.name.rsplit(".", 1)[-1] for module in layout.modules})
        config = peft_config(layout, modules, 0.0, base, revision)
        export(run, user, set, out, lambda folder: save_peft(folder, row_P, layout, config))
    typer.echo(f"adapter of user {user!r} ({layout.num_parameters:,} numbers): {out}")


@app.command()
def rollback(
    user: User,
    run: Run = None,
    set: Set = "OPPU",
    store: Store = None,
    version: Annotated[int | None, typer.Option(min=1, help="The one before the current one unless given.")] = None,
) -> None:
    """Make an earlier version of a user's adapter current again; a later version outweighs it."""
    with _kept_to_itself(run):
        entry = _opened(run, set, store).rollback(user, version)
    typer.echo(f"user {user!r}: version {entry.version} is current")


@app.command()
def verify(run: Run = None, set: Set = "OPPU", store: Store = None) -> None:
    """Read every adapter and check its checksum; exit code 2 where one is damaged."""
    report = _opened(run, set, store).verify()
    if report.orphans:
        typer.echo(f"{len(report.orphans):,} packs of units cut short, which nothing reads: {_some(report.orphans)}")
    if report.bad:
        raise StoreError(f"{len(report.bad):,} of {report.num_rows:,} adapters are damaged: {_some(report.bad)}")
    typer.echo(f"{report.num_rows:,} adapters are as they were written")


def _some(lines: tuple[str, ...]) -> str:
    more = f"; and {len(lines) - MAX_TOLD:,} more" if len(lines) > MAX_TOLD else ""
    return "; ".join(lines[:MAX_TOLD]) + more


@app.command()
def compact(run: Run = None, set: Set = "OPPU", store: Store = None) -> None:
    """Merge small packs and the catalog's fragments; every version stays.

    Others may read meanwhile, and put too unless it is a run's: that is compacted while no run is at work.
    """
    with _kept_to_itself(run):
        report = _opened(run, set, store).compact()
    typer.echo(
        f"{report.num_files_before:,} files of {report.num_bytes_before:,} bytes before,"
        f" {report.num_files:,} files of {report.num_bytes:,} bytes now"
    )


@app.command()
def stats(run: Run = None, set: Set = "OPPU", store: Store = None) -> None:
    """Count users, versions, files and bytes."""
    found = _opened(run, set, store).stats()
    typer.echo(f"users: {found.num_users:,} with an adapter, {found.num_failed:,} failed")
    typer.echo(f"adapters of all versions: {found.num_rows:,}; last version {found.last_version}")
    typer.echo(f"packs: {found.num_packs:,} of {found.pack_bytes:,} bytes; {found.num_orphans:,} of units cut short")
    typer.echo(
        f"catalog: {found.num_units:,} units in {found.num_catalog_files:,} files of {found.catalog_bytes:,} bytes,"
        f" {found.index_bytes_per_user:.1f} a user; {found.files_per_1000_users:.2f} files for 1,000 users"
    )
