"""`proper-ds data`: prepare, generate and fetch data, and cut it by another protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proper_ds.data.config import DataConfig
from proper_ds.data.generate import generate as generate_population
from proper_ds.data.manifest import MANIFEST
from proper_ds.data.prepare import prepare as prepare_data
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import ConfigError, DataError
from proper_ds.observe.progress import ProgressView
from proper_ds.section import problems_of

app = typer.Typer(no_args_is_help=True, help="Bring people's data in, or generate some.")


@app.command()
def prepare(
    path: Annotated[list[str], typer.Argument(help="Folders or files in LaMP's format, JSONL or Parquet.")],
    out: Annotated[Path, typer.Option(help="Where to write the shards.")],
    format: Annotated[str, typer.Option(help="auto, lamp, jsonl, parquet, or a benchmark's.")] = "auto",
    task: Annotated[str | None, typer.Option(help="LaMP_1 .. LaMP_7 or generic, where the data does not say.")] = None,
    train_split: Annotated[str, typer.Option(help="The split that stages learn from.")] = "train",
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Read only this split; give it once for each.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Set bad records aside instead of refusing.")] = False,
    skip_leaks: Annotated[bool, typer.Option("--skip-leaks", help="Set leaking questions aside, too.")] = False,
    near_duplicates: Annotated[
        str, typer.Option(help="Questions with a near copy in the user's history: refuse, set_aside or allow.")
    ] = "set_aside",
    tune_share: Annotated[float, typer.Option(help="Share of the training users that become split `tune`.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace prepared data that is there.")] = False,
    max_users_per_split: Annotated[int | None, typer.Option(help="Only the first so many users.")] = None,
    max_history_items: Annotated[int | None, typer.Option(help="Only each user's newest so many.")] = None,
) -> None:
    """Check people's data and write one row a user into Parquet shards, the manifest last.

    Benchmarks' own files are known as oppu, longlamp, peft-u and personal-llm.
    """
    from pydantic import ValidationError

    if (out / MANIFEST).exists() and not overwrite:
        raise DataError(f"--out {out} holds prepared data already; give another folder, or --overwrite")
    try:
        config = DataConfig.model_validate(
            {
                "path": path,
                "format": format,
                "task": task,
                "train_split": train_split,
                "splits": splits,
                "bad_records": "set_aside" if skip_bad else "refuse",
                "leaks": "set_aside" if skip_leaks else "refuse",
                "near_duplicates": near_duplicates,
                "tune_share": tune_share,
                "max_users_per_split": max_users_per_split,
                "max_history_items": max_history_items,
            }
        )
    except ValidationError as error:
        raise ConfigError("options", [problem for _, problem in problems_of(DataConfig, error)]) from None
    view = ProgressView(Console())
    with view.running():
        manifest = prepare_data(config, out, view.report)
    typer.echo(f"{manifest.num_users} users ({manifest.num_cold_users} without history)")
    typer.echo(f"{manifest.num_history_items} history items in {len(manifest.shards)} shards: {out}")
    for split, counts in manifest.splits.items():
        typer.echo(f"split {split}: {counts['num_queries']} questions of {counts['num_users']} users")
    for name, about in manifest.tasks.items():
        labels = f"{len(about.labels)} labels" if about.labels else "open answers"
        told = [about.lamp_id, labels, *about.metrics, *(["GENERATED data"] if about.generated else [])]
        typer.echo(f"task {name}: {', '.join(told)}")
    for kind, count in manifest.set_aside.items():
        if count:
            typer.echo(f"{count} set aside ({kind}), listed in {out / 'problems.jsonl'}")


@app.command()
def generate(
    users: Annotated[int, typer.Option(help="How many people.")],
    out: Annotated[Path, typer.Option(help="Where to write; one folder a task.")],
    groups: Annotated[int, typer.Option(help="How many latent groups of taste.")] = 4,
    seed: Annotated[int, typer.Option(help="Same seed, same people.")] = 1,
) -> None:
    """Generate a population with known groups, in LaMP's format: a tag task and a rating task."""
    view = ProgressView(Console())
    with view.running():
        for done, total in generate_population(users, groups, seed, out):
            if done % 100 == 0 or done == total:
                view.report("generated users", done, total)
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    typer.echo(f"generated {users} users in {groups} groups: {', '.join(str(out / name) for name in folders)}")


@app.command("oppu-split")
def oppu_split(
    prepared: Annotated[Path, typer.Argument(help="A folder written by `proper-ds data prepare`.")],
    out: Annotated[Path, typer.Option(help="Where to write the new prepared folder.")],
    top: Annotated[int, typer.Option(min=1, help="How many of the most active users to hold out.")] = 100,
) -> None:
    """OPPU's protocol: the most active users are the `test` users, all others teach the shared stages (`train`)."""
    from proper_ds.data.protocols import hold_out_most_active

    manifest, shortest = hold_out_most_active(PreparedData(prepared), out, top)
    typer.echo(f"held out: {top} users with {shortest} or more history items: {out}")
    for split, counts in manifest.splits.items():
        typer.echo(f"split {split}: {counts['num_queries']} questions of {counts['num_users']} users")


@app.command("oppu-profiles")
def oppu_profiles(
    path: Annotated[Path, typer.Argument(help="A folder of OPPU's files, with profile_user_100.json.")],
    out: Annotated[Path, typer.Option(help="Where to write JSON lines of `user` and `profile`.")],
) -> None:
    """OPPU's profile texts as a file that a prompt recipe can read."""
    from proper_ds.data.oppu import split_profiles

    typer.echo(f"{split_profiles(path, out)} profiles: {out}")


fetch_app = typer.Typer(no_args_is_help=True, help="Download published data.")
app.add_typer(fetch_app, name="fetch")


@fetch_app.callback()
def _fetch_group() -> None:
    """Download published data."""


@fetch_app.command("lamp")
def fetch_lamp(
    task: Annotated[str, typer.Option(help="1, 2 (movies), 2N (news, the old LaMP-2), 3, 4, 5 or 7.")],
    split: Annotated[str, typer.Option(help="`user`: other people in each split; `time`: the same people, later.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; LaMP_TASK_SPLIT by default.")] = None,
    mirror: Annotated[str | None, typer.Option(help="An address to use; also as PROPER_DS_LAMP_MIRROR.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="Wait so long for the server's next bytes.")] = 60.0,
) -> None:
    """Download a LaMP task from its official place or a mirror. Broken off, the same command goes on."""
    from proper_ds.data import lamp_files
    from proper_ds.data.fetch import Fetcher

    if split not in ("user", "time"):
        raise DataError(f"--split {split!r} is not legal; give user or time")
    folder = out or Path(f"LaMP_{task.removeprefix('LaMP_')}_{split}")
    view = ProgressView(Console())
    with view.running():
        brought = lamp_files.fetch_lamp(
            task,
            "time" if split == "time" else "user",
            lamp_files.mirror(mirror),
            folder,
            lambda url, path: Fetcher(url, path, timeout_s, progress=view.report),
        )
    typer.echo(f"{len(brought)} files fetched, the others were there and are whole: {folder}")
