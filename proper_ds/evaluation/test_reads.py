"""The ledger of test users: they are read for one configuration, and every further reading is asked for and counted.

`pipeline/run.py` checks it before a run that evaluates split `test` begins, and writes a line before the first answer;
the report counts its lines. A study has a ledger of its own beside those of its runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proper_ds.errors import UserError
from proper_ds.files import digest_of, sync_folder

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

TEST = "test"
LEDGER = "test_reads.jsonl"
IDLE = ("output_dir", "seed", "fleet", "chosen_by")
"""What does not make another configuration: several seeds of one are one choice."""


def configuration_hash(config: RunConfig) -> str:
    """Of everything that can change an answer, but the seed."""
    return digest_of({name: value for name, value in config.model_dump(mode="json").items() if name not in IDLE})


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's ledger, oldest first; none where there is no ledger."""
    path = folder / LEDGER
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class TestReads:
    """The ledgers that a run answers to: its own, and its study's where it has one."""

    __test__ = False  # no test, whatever its name says

    def __init__(self, folders: Sequence[Path], again: bool = False) -> None:
        """`again`: whether the user asked for another reading."""
        self._folders, self._again = list(folders), again

    def check(self, config: RunConfig, data: str) -> None:
        """Does nothing for other splits than `test`.

        Args:
            data: a digest of what is read; a study's tasks have different ones.

        Raises:
            UserError: where another configuration has read the same test users, and another reading was not asked for.
        """
        if config.evaluation.split != TEST or self._again:
            return
        mine = configuration_hash(config)
        for folder in self._folders:
            readings = [line for line in read_ledger(folder) if line["data"] == data]
            if readings and not any(line["config_hash"] == mine for line in readings):
                last = readings[-1]
                raise UserError(
                    f"test users are read once: {folder / LEDGER} says that {last['run']} read them on {last['time']}"
                    " with another configuration. Make choices on dev users (`proper-ds sweep`); `--again` reads"
                    " the test users once more, and the report will say how often they were read"
                )

    def record(self, config: RunConfig, data: str) -> None:
        """Write down a reading, durably; the same configuration is written once."""
        if config.evaluation.split != TEST:
            return
        mine = configuration_hash(config)
        lines = [line for folder in self._folders for line in read_ledger(folder) if line["data"] == data]
        known = list(dict.fromkeys(line["config_hash"] for line in lines))
        number = known.index(mine) + 1 if mine in known else len(known) + 1
        line = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": str(config.output_path),
            "seed": config.seed,
            "config_hash": mine,
            "data": data,
            "number": number,
        }
        for folder in self._folders:
            if any(old | {"time": line["time"]} == line for old in read_ledger(folder)):
                continue
            with (folder / LEDGER).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)


def num_reads(folder: Path) -> int:
    """How many configurations had read a run's test users by the time it did, itself among them; 0 without any."""
    return max((int(line["number"]) for line in read_ledger(folder)), default=0)
