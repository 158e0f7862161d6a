"""Which golds a file of predictions is scored against, and as which task; `score_files.py` asks.

A task may be known by several names (`LaMP_2` is also `LaMP_2M` or `LaMP_2N`), or by none that is known here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from proper_ds.data.tasks import LEGAL_NAMES, TASKS
from proper_ds.errors import DataError
from proper_ds.evaluation.answer_files import AnswerFile


class Pair(NamedTuple):
    """Predictions, their golds, and the name of the task: one of `LEGAL_NAMES`."""

    given: AnswerFile
    golds: AnswerFile
    name: str


def pairs_of(
    given_files: list[AnswerFile], gold_files: list[AnswerFile], predictions: Path, golds: Path, task: str | None
) -> list[Pair]:
    """The golds of each file of predictions.

    Args:
        predictions: where the predictions came from, as asked for.
        golds: the same of the golds.
        task: what the files are to be scored as, where they name another form of the same task or none that is known.

    Raises:
        DataError: for a task that is unknown or not there, for golds of other tasks, and where several files fit.
    """
    if task is not None:
        if task not in LEGAL_NAMES:
            raise DataError(f"--task {task!r} is not known; legal are {', '.join(LEGAL_NAMES)}")
        given_files = _of_task(given_files, predictions, task)
        gold_files = _of_task(gold_files, golds, task)
    found = []
    for given in given_files:
        gold = _golds_of(given, gold_files, golds, decided=task is not None)
        found.append(Pair(given, gold, _name_of(given, gold, task)))
    for name, count in Counter(pair.name for pair in found).items():
        if count > 1:
            several = ", ".join(pair.given.source for pair in found if pair.name == name)
            raise DataError(f"{count} files hold answers of task {name!r} ({several}); give the one that is meant")
    return found


def _agree(one: str, other: str) -> bool:
    """Whether two names may mean the same task: `LaMP_2` and `LaMP_2M` do, `LaMP_2M` and `LaMP_2N` do not."""
    return one == other or _lamp_id(one) == other or one == _lamp_id(other)


def _lamp_id(name: str) -> str:
    return TASKS[name].lamp_id if name in TASKS else name


def _of_task(files: list[AnswerFile], path: Path, task: str) -> list[AnswerFile]:
    """The files of a task: those that say so, else those that say nothing that is known."""
    found = [file for file in files if file.task is not None and _agree(file.task, task)]
    found = found or [file for file in files if file.task not in LEGAL_NAMES]
    if not found:
        said = ", ".join(sorted({str(file.task) for file in files}))
        raise DataError(f"{path} holds no answers of task {task}; its `task` says {said}. Give --task that, or none")
    return found


def _golds_of(given: AnswerFile, gold_files: list[AnswerFile], golds: Path, decided: bool) -> AnswerFile:
    """The golds of the same task that ask for the ids which the predictions have.

    Args:
        decided: whether --task was given, so that names which are not known count as that task's.
    """
    free: set[str | None] = {None}
    if decided:
        free |= {file.task for file in [given, *gold_files] if file.task not in LEGAL_NAMES}
    fitting = [
        file
        for file in gold_files
        if given.task in free or file.task in free or _agree(str(given.task), str(file.task))
    ]
    if not fitting:
        held = ", ".join(sorted({str(file.task) for file in gold_files}))
        raise DataError(
            f"{given.source} answers task {given.task!r}, but the golds of {golds} are of {held}. Give golds of the"
            " same task; where a name is none of LaMP's, say with --task which task it is"
        )
    if len(fitting) == 1:
        return fitting[0]
    num_shared = {file.source: len(given.answers.keys() & file.answers.keys()) for file in fitting}
    asking = [file for file in fitting if num_shared[file.source]]
    exact = [file for file in asking if file.answers.keys() == given.answers.keys()]
    chosen = exact or asking
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise DataError(f"{given.source} answers no question of {', '.join(num_shared)}; give golds with the same ids")
    several = ", ".join(f"{file.source} ({num_shared[file.source]:,} ids in common)" for file in chosen)
    raise DataError(f"{given.source} answers questions of several files: {several}; give the one that is meant")


def _name_of(given: AnswerFile, golds: AnswerFile, task: str | None) -> str:
    """The task's name: the narrowest that anybody says, so `LaMP_2M` where others say `LaMP_2`."""
    said = [name for name in (task, golds.task, given.task) if name in LEGAL_NAMES]
    narrow = [name for name in said if name in TASKS]
    for name in narrow or said:
        assert name is not None, "no name is not legal"
        return name
    what = "names no task" if golds.task is None else f"is of an unknown task {golds.task!r}"
    raise DataError(f"{golds.source} {what}; say which it is with --task: {', '.join(LEGAL_NAMES)}")
