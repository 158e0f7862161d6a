"""`exports.jsonl` of a run: which adapters were written elsewhere, so that forgetting a user reaches them too.

`proper-ds store get` adds to it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from proper_ds.errors import DataError
from proper_ds.files import digest_of_file, sync_folder, write_text_atomic
from proper_ds.model.adapter_file import CONFIG, WEIGHTS

EXPORTS = "exports.jsonl"


@dataclass(frozen=True)
class Export:
    """One adapter written as a PEFT directory.

    Attributes:
        digest: of its weights' file, to tell it from what may stand there later.
    """

    user: str
    adapter_set: str
    folder: str
    digest: str


def record_export(run: Path, user: str, adapter_set: str, folder: Path) -> None:
    """Note that a user's adapter was written to `folder`."""
    export = Export(user, adapter_set, str(folder.resolve()), digest_of_file(folder / WEIGHTS))
    with (run / EXPORTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(export), ensure_ascii=False) + "\n")


def read_exports(run: Path) -> list[Export]:
    """All that is on record. Raises DataError where the file is damaged."""
    path = run / EXPORTS
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Export(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number} cannot be read ({error}); mend or remove the line") from None
    return found


def erase_exports(run: Path, users: Collection[str]) -> tuple[int, int, list[str]]:
    """Delete what was exported of the users, and the lines that say so.

    Returns:
        Folders deleted, their bytes, and one line for each export that could not be reached.
    """
    exports = read_exports(run)
    num_folders = num_bytes = 0
    not_reached = []
    for export in exports:
        if export.user not in users:
            continue
        folder = Path(export.folder)
        weights = folder / WEIGHTS
        if not weights.exists():
            not_reached.append(f"{folder}: not there any more; if it was moved or copied, delete it there")
        elif digest_of_file(weights) != export.digest:
            not_reached.append(f"{folder}: holds other weights than were exported; left alone")
        else:
            for path in (weights, folder / CONFIG):
                num_bytes += path.stat().st_size if path.exists() else 0
                path.unlink(missing_ok=True)
            sync_folder(folder)
            num_folders += 1
            if not any(folder.iterdir()):
                folder.rmdir()
    if exports:
        kept = [json.dumps(asdict(export), ensure_ascii=False) for export in exports if export.user not in users]
        write_text_atomic(run / EXPORTS, "".join(line + "\n" for line in kept))
    return num_folders, num_bytes, not_reached
