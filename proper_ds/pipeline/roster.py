"""The roster of a run: its users by index, and the words under which histories are taught.

Shared stages know users by index (their user tables) and prompts by their words. A nightly update keeps both as they
were when those stages were trained: users keep their places, new ones come last. `run.py` and `plan.py` call it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.prepare import Known
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import UserError
from proper_ds.files import atomic_path
from proper_ds.pipeline.stage import Stage
from proper_ds.run_folder import RunFolder


@dataclass(frozen=True)
class Roster:
    """Users in the order of their indices.

    Attributes:
        order: fingerprint of the prepared data that first had this order; updates append to it.
        instructions: by task.
    """

    order: str
    users: list[str]
    instructions: dict[str, str]

    def write(self, path: Path) -> None:
        """Replace the run's roster."""
        about = {"order": self.order, "instructions": self.instructions}
        table = pa.table({"user": pa.array(self.users, pa.string())})
        with atomic_path(path) as temporary:
            pq.write_table(table.replace_schema_metadata({"roster": json.dumps(about)}), temporary, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> Roster | None:
        """The run's roster, or None where there is none."""
        if not path.exists():
            return None
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"roster"])
        return cls(about["order"], table.column("user").to_pylist(), about["instructions"])


def known_before(folder: RunFolder, stage: Stage) -> Known:
    """What preparing the run's data must respect: forgotten users and, in an update, everybody's place.

    Raises:
        UserError: where the places that the kept stages know are not on record any more.
    """
    forgotten, order = Forgotten.read(folder.root), stage.made_from["order"]
    if order == stage.fingerprint:
        return Known(forgotten=forgotten)
    roster = Roster.read(folder.roster)
    if roster is None or roster.order != order:
        raise UserError(
            f"user.only_changed: the data in {folder.root} was prepared anew after the shared stages were trained, so"
            " their order of users is lost; run once without user.only_changed, or give another output_dir"
        )
    return Known(roster.users, roster.instructions, forgotten)


def keep_roster(folder: RunFolder, stage: Stage) -> None:
    """Write down the order of the data just prepared; called before it is committed."""
    prepared = PreparedData(folder.stage(stage.name).path)
    instructions = {name: task.instruction for name, task in prepared.manifest.tasks.items()}
    Roster(stage.made_from["order"], prepared.keys(), instructions).write(folder.roster)
