"""`proper-ds bench`: one command for each benchmark; the work is in `proper_ds/bench/`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, help="Benchmarks, each against its rivals in the same run.")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
NumActors = Annotated[int | None, typer.Option(min=1, help="Actors; by default as many as fit.")]
Where = Annotated[
    Path | None, typer.Option(help="Where to write, by default the temporary folder; on a cluster, shared.")
]


@app.callback()
def _group() -> None:
    """Benchmarks, each against its rivals in the same run."""


@app.command("control-plane")
def control_plane(
    users: Annotated[int, typer.Option(min=1000, help="Made-up users.")] = 1_000_000,
    num_actors: NumActors = None,
    folder: Where = None,
    json_file: Json = None,
) -> None:
    """Plan, dispatch, commit and catalog with a kernel that does no training; stopped half-way and resumed."""
    from proper_ds.bench.control_plane import bench

    with tempfile.TemporaryDirectory(prefix="control-plane-", dir=folder) as empty:
        bench(users, num_actors or "auto", Path(empty), json_file)


@app.command()
def scaling(
    what: Annotated[
        Literal["actors", "flat", "commits"],
        typer.Option(help="More actors; ten times the users; commits against none."),
    ] = "actors",
    num_actors: Annotated[int | None, typer.Option(min=1, help="For `actors`: the most; by default all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each variant runs, all in turn.")] = 5,
    json_file: Json = None,
) -> None:
    """What the fleet adds to training: more actors, more users, durable commits."""
    from proper_ds.bench import scaling as work

    if num_actors is not None and what != "actors":
        raise typer.BadParameter(f"has no effect with --what {what}; leave it out", param_hint="--num-actors")
    if what == "actors":
        work.bench_actors(repeats, num_actors or "auto", json_file)
    elif what == "flat":
        work.bench_flat(repeats, json_file)
    else:
        work.bench_commits(repeats, json_file)


@app.command()
def data(
    what: Annotated[
        Literal["order", "packing"],
        typer.Option(help="What a rank holds of the order of examples; rows of several examples against padding."),
    ] = "order",
    examples: Annotated[int, typer.Option(min=100_000, help="For `order`: made-up examples.")] = 4_000_000,
    preset: Annotated[str, typer.Option(help="For `packing`: small, medium or large.")] = "small",
    batch_size: Annotated[int, typer.Option(min=2, help="For `packing`: examples of a micro-batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="For `packing`: how often each variant runs, in turn.")] = 3,
    json_file: Json = None,
) -> None:
    """How ranks see the data."""
    if what == "order":
        from proper_ds.bench.data_order import bench_order

        bench_order(examples, json_file)
    else:
        from proper_ds.bench.packing import bench_packing

        bench_packing(preset, batch_size, repeats, json_file)


@app.command()
def store(
    users: Annotated[int, typer.Option(min=256, help="Adapters to store.")] = 10_000,
    adapter_bytes: Annotated[int, typer.Option(min=10_000, help="Size of one, about.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    scratch: Annotated[Path | None, typer.Option(help="A folder on the disk to measure.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the figures.")] = None,
) -> None:
    """The adapter store beside one PEFT directory per user."""
    from proper_ds.bench.store import run

    run(users, adapter_bytes, repeats, scratch, json)


@app.command()
def users(
    preset: Annotated[str, typer.Option(help="small, medium, large, or 1b (needs a GPU).")] = "small",
    batch_size: Annotated[int, typer.Option(min=1, help="Items of one user in one of its steps.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="How often each variant runs, in turn.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Where to write what is printed.")] = None,
) -> None:
    """Users per second of our engine, a PEFT loop, transformers.Trainer per user, and one shared LoRA."""
    from proper_ds.bench.users import bench_users

    bench_users(preset, batch_size, repeats, json)


@app.command()
def group(
    parity: Annotated[bool, typer.Option("--parity", help="Losses on several ranks beside one process.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Memory of each rank under ZeRO 3.")] = False,
    preset: Annotated[str, typer.Option(help="Size of the base: small, medium, large, or 1b (needs a GPU).")] = "small",
    experts: Annotated[list[int] | None, typer.Option(min=2, help="Numbers of experts; give it several times.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="Ranks to measure on; give it several times.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each rival runs, in turn.")] = 5,
    json_file: Json = None,
) -> None:
    """The group stage: its speed, equal losses on any ranks (`--parity`), memory of each rank (`--memory`)."""
    from proper_ds.bench.group_memory import bench_memory
    from proper_ds.bench.group_speed import bench_group
    from proper_ds.bench.parity import bench_parity

    if parity and memory:
        raise typer.BadParameter("give one of --parity and --memory")
    if parity:
        bench_parity(json_file)
    elif memory:
        bench_memory(preset, json_file)
    else:
        bench_group(preset, experts or [5, 64], max(experts or [4096]), repeats, ranks or [1, 2], json_file)


@app.command()
def report(
    methods: Annotated[int, typer.Option(min=3, help="Made-up methods.")] = 25,
    questions: Annotated[int, typer.Option(min=100, help="Questions that each answered.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=1, help="How often each variant runs, in turn.")] = 1,
    json_file: Json = None,
) -> None:
    """Seconds to all scores, intervals and differences of many methods."""
    from proper_ds.bench.report import bench_report

    bench_report(methods, questions, repeats, json_file)
