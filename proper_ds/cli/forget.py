"""`proper-ds store forget`: everything of some users out of a run's folder, with proof and a receipt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proper_ds.errors import StoreError, UserError

if TYPE_CHECKING:
    from proper_ds.erasure.forget import Receipt


def forget(
    users: Annotated[list[str], typer.Argument(help="The users' keys, as in the data.")],
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove users' adapters, features, answers, tokens, prepared rows and exports from disk, and read back the proof.

    They stay out of later runs in this folder. What the shared stages learned from them remains; the receipt says so.
    """
    from proper_ds.config import load_config
    from proper_ds.erasure.forget import forget as erase

    if not (run / "config.yaml").exists():
        raise StoreError(f"{run} is no run's folder: it has no config.yaml")
    if not yes and not sys.stdin.isatty():
        raise UserError("forgetting cannot be undone and asks before it begins; without a terminal, give --yes")
    if not yes:
        typer.confirm(f"Forget {', '.join(map(repr, users))} in {run}? This cannot be undone.", abort=True)
    receipt, path = erase(load_config(run / "config.yaml"), run, users)
    for line in receipt_lines(receipt):
        typer.echo(line)
    typer.echo(f"receipt: {path}")
    if not receipt.is_proved:
        raise StoreError(
            "traces were found that should be gone, or files could not be searched (see above); run the command again,"
            " or look there"
        )


def receipt_lines(receipt: Receipt) -> list[str]:
    """The receipt for people."""
    lines = ["removed:"]
    for kind, taken in receipt.removed.items():
        what = f"{taken['num_rows']:,} rows, {taken['num_files']:,} files, {taken['num_bytes']:,} bytes"
        lines.append(f"  {kind:<36} {what}")
    if not receipt.removed:
        lines.append("  nothing: all of it was gone already")
    lines += [f"  not reached: {line}" for line in receipt.not_reached_folders or receipt.not_reached]
    proof = receipt.proof
    sought = ", ".join(
        f"{count:,} of {proof['num_traces'][kind]:,} of {kind}" for kind, count in proof["num_traces_sought"].items()
    )
    lines.append(
        f"proof: {proof['num_files_read']:,} files read, {proof['num_bytes_read']:,} bytes and"
        f" {proof['num_bytes_unpacked']:,} unpacked; sought the keys and traces: {sought or 'none'}"
    )
    lines += [f"  FOUND {line}" for line in proof["found"]] or ["  nothing of the users was found"]
    lines += [f"  NOT SEARCHED {name}: damaged, it cannot be decompressed" for name in proof["not_decoded"]]
    lines += [f"  {receipt.out_of_reach}", "what remains:"]
    for stage, about in receipt.remains.items():
        learned = about.get("note") or (
            f"learned from {about['num_items']:,} items and {about['num_questions']:,} questions"
            f" of {about['num_users']:,} of the users"
        )
        lines.append(f"  {stage} (of {about['made']}): {learned}")
    lines.append(f"  {receipt.how_to_remove}" if receipt.remains else "  nothing: no shared stage was trained")
    lines += [f"  your own data, not touched: {line}" for line in receipt.sources]
    return lines
