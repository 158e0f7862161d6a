"""`proper-ds evaluate`: scores of prediction files in LaMP's form, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def evaluate(
    predictions: Annotated[Path, typer.Option(help="Answers in LaMP's form: a file (.gz too), a folder or a zip.")],
    golds: Annotated[Path, typer.Option(help="Gold answers, in the same form.")],
    task: Annotated[str | None, typer.Option(help="LaMP_1, LaMP_2M, LaMP_2N, ..: where the files do not say.")] = None,
    labels: Annotated[str | None, typer.Option(help="The label set, separated by |, in place of the task's.")] = None,
    questions: Annotated[Path | None, typer.Option(help="The questions file, which says who asked.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores to this file, too.")] = None,
) -> None:
    """Score answers by the official definitions of LaMP and LongLaMP."""
    from proper_ds.evaluation.score_files import as_json, score_files
    from proper_ds.files import write_json_atomic

    scores = score_files(predictions, golds, task, labels.split("|") if labels is not None else None, questions)
    if json is not None:
        write_json_atomic(json, as_json(scores))
    table = Table()
    for column in ("task", "metric", "value", "user mean", "questions", "users"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in scores:
        for name, value in score.values.items():
            mean = f"{score.user_means[name]:.4f}" if name in score.user_means else "-"
            users = "-" if score.num_users is None else str(score.num_users)
            table.add_row(score.task, name, f"{value:.4f}", mean, str(score.num_questions), users)
    console = Console()
    console.print(table)
    for score in scores:
        for odd in score.odd:
            console.print(f"{score.task}: {odd}", highlight=False, markup=False, soft_wrap=True)
