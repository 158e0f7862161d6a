"""Where LaMP's files are: the official server's paths by task and split. `proper-ds data fetch lamp` asks here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from proper_ds.data.fetch import Fetcher, Missing
from proper_ds.errors import DataError, FetchError

OFFICIAL = "https://ciir.cs.umass.edu/downloads/LaMP/"
MIRROR_VARIABLE = "PROPER_DS_LAMP_MIRROR"
FOLDERS = {
    "1": "LaMP_1",
    "2": "LaMP_2/new",
    "2M": "LaMP_2/new",
    "2N": "LaMP_2",
    "3": "LaMP_3",
    "4": "LaMP_4",
    "5": "LaMP_5",
    "7": "LaMP_7",
}
"""By task; of LaMP-2, the movies took the place of the news, which are still served under the old path."""
FILES = ("train_outputs", "train_questions", "dev_outputs", "dev_questions", "test_questions")
"""Golds of the test split are the leaderboard's secret."""

Split = Literal["user", "time"]


def mirror(given: str | None) -> str:
    """The address to download from: as given, else the environment's, else the official one."""
    return given or os.environ.get(MIRROR_VARIABLE) or OFFICIAL


def remote_paths(task: str, split: Split) -> dict[str, str]:
    """Path below the server's address by file name.

    Raises:
        DataError: for a task that there is not, and for LaMP-6, whose texts may not be handed out.
    """
    number = task.removeprefix("LaMP_").removeprefix("LaMP-")
    if number == "6":
        raise DataError(
            "LaMP-6 is made from the Avocado e-mail collection, which the LDC licenses (LDC2015T03): LaMP serves only"
            " the numbers of its e-mails. With the collection, LaMP's own script makes files that data.path takes."
        )
    if number not in FOLDERS:
        raise DataError(f"--task {task!r} is no task of LaMP; legal are {', '.join(FOLDERS)}")
    folder = ("time/" if split == "time" else "") + FOLDERS[number]
    return {f"{file}.json": f"{folder}/{file.partition('_')[0]}/{file}.json" for file in FILES}


def fetch_lamp(
    task: str,
    split: Split,
    base_url: str,
    out: Path,
    make: Callable[[str, Path], Fetcher] = Fetcher,
) -> list[str]:
    """Bring one task's files into `out`, which `data.path` then takes; returns the names of those that were not there.

    Raises:
        DataError, FetchError: see Fetcher.fetch; and where the server lacks a file of the train or dev split.
    """
    paths = remote_paths(task, split)
    fetcher, brought = make(base_url, out), []
    for name, remote in paths.items():
        try:
            if fetcher.fetch(remote, name):
                brought.append(name)
        except Missing as reason:
            if not name.startswith("test_"):
                raise DataError(f"{reason}; is {base_url} the right address for LaMP's files?") from None
            logging.getLogger("proper_ds").warning("no test questions: %s", reason)
        except FetchError as reason:
            raise FetchError(
                f"{reason}. Where this address cannot be reached, name another with the same paths: --mirror ADDRESS,"
                f" or {MIRROR_VARIABLE} in the environment"
            ) from None
    return brought
