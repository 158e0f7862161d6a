"""The ledgers of test users: they are read for one configuration, and every further reading is asked for and counted.

`pipeline/run.py` checks them before a run that evaluates split `test` begins, and writes a line before the first
answer; the report counts its lines. There is one in the run's folder, one in its study's, and one beside the data,
which other runs and studies find.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proper_ds.errors import UserError
from proper_ds.evaluation.configuration import configuration_hash
from proper_ds.files import digest_of, sync_folder
from proper_ds.observe.log import get_logger

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

TEST = "test"
LEDGER = "test_reads.jsonl"
"""In the folder of a run or study."""
DATA_LEDGER = "test_reads.ledger"
"""Beside the data, where a `.jsonl` would be taken for data."""


@dataclass(frozen=True)
class TestData:
    """One data set that a run reads.

    Attributes:
        digest: of its files, however they are prepared.
        ledgers: beside the data; folders that are not there have none.
    """

    __test__ = False  # no test, whatever its name says

    digest: str
    ledgers: tuple[Path, ...] = ()

    @classmethod
    def of(cls, path: str, files: Sequence[dict[str, Any]], prepared: Sequence[Path]) -> TestData:
        """As a manifest describes a source: its path and files; `prepared` are folders made from it."""
        source = Path(path)
        folders = [*prepared, source if source.is_dir() else source.parent]
        return cls(digest_of(files), tuple(folder / DATA_LEDGER for folder in folders if folder.is_dir()))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, oldest first; none where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class TestReads:
    """The ledgers that a run answers to: its own, its study's where it has one, and those beside the data."""

    __test__ = False

    def __init__(self, folders: Sequence[Path], again: bool = False) -> None:
        """`again`: whether the user asked for another reading; `folders` are the run's and its study's."""
        self._ledgers, self._again = [folder / LEDGER for folder in folders], again

    def check(self, config: RunConfig, data: Sequence[TestData]) -> None:
        """Does nothing for other splits than `test`.

        Raises:
            UserError: where another configuration has read the same test users, and another reading was not asked for.
        """
        if config.evaluation.split != TEST or self._again:
            return
        mine = configuration_hash(config.model_dump(mode="json"))
        for ledger, digest in self._pairs(data):
            readings = [line for line in read_ledger(ledger) if line["data"] == digest]
            if readings and not any(line["config_hash"] == mine for line in readings):
                last = readings[-1]
                raise UserError(
                    f"test users are read once: {ledger} says that {last['run']} read them on {last['time']}"
                    " with another configuration. Make choices on dev users (`proper-ds sweep`); `--again` reads"
                    " the test users once more, and the report will say how often they were read"
                )

    def record(self, config: RunConfig, data: Sequence[TestData]) -> None:
        """Write down a reading, durably; the same configuration is written once."""
        if config.evaluation.split != TEST:
            return
        mine = configuration_hash(config.model_dump(mode="json"))
        for one in data:
            lines = [line for ledger, digest in self._pairs([one]) for line in read_ledger(ledger)]
            known = list(dict.fromkeys(line["config_hash"] for line in lines if line["data"] == one.digest))
            line = {
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "run": str(config.output_path),
                "seed": config.seed,
                "config_hash": mine,
                "data": one.digest,
                "number": known.index(mine) + 1 if mine in known else len(known) + 1,
            }
            for ledger in self._ledgers:
                _append(ledger, line)
            for ledger in one.ledgers:
                try:
                    _append(ledger, line)
                except OSError as error:
                    told = "%s cannot be written (%s): runs elsewhere will not know that these test users were read"
                    get_logger().warning(told, ledger, error.strerror)

    def _pairs(self, data: Sequence[TestData]) -> list[tuple[Path, str]]:
        """(ledger, digest of the data to look for there)."""
        return [(ledger, one.digest) for one in data for ledger in (*self._ledgers, *one.ledgers)]


def _append(ledger: Path, line: dict[str, Any]) -> None:
    if any(old | {"time": line["time"]} == line for old in read_ledger(ledger)):
        return
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(ledger.parent)


def num_reads(folder: Path) -> int:
    """How many configurations had read a run's test users by the time it did, itself among them; 0 without any."""
    return max((int(line["number"]) for line in read_ledger(folder / LEDGER)), default=0)
