"""`exports.jsonl` of a run: which adapters were written elsewhere, so that forgetting a user reaches them too.

`proper-ds store get` writes through `export`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from proper_ds.errors import DataError
from proper_ds.files import atomic_path, digest_of_file, sync_folder, write_text_atomic
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


def export(run: Path, user: str, adapter_set: str, folder: Path, write: Callable[[Path], None]) -> None:
    """Write a user's adapter to `folder`, on record before anything of it is there.

    Args:
        write: writes the PEFT directory to a folder, here one within the run.
    """
    with TemporaryDirectory(prefix=".export-", suffix=".tmp", dir=run) as made:
        write(Path(made))
        record = Export(user, adapter_set, str(folder.resolve()), digest_of_file(Path(made) / WEIGHTS))
        with (run / EXPORTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name in (WEIGHTS, CONFIG):
            with atomic_path(folder / name) as path:
                shutil.copyfile(Path(made) / name, path)


def read_exports(run: Path) -> list[Export]:
    """All that is on record. Raises DataError where the file is damaged."""
    path = run / EXPORTS
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            found += [Export(**json.loads(line))] if line else []
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number} cannot be read ({error}); mend or remove the line") from None
    return found


@dataclass(frozen=True)
class ErasedExports:
    """What became of the users' exports.

    Attributes:
        folders: those it was deleted in.
        not_reached: (folder, why) for each folder that does not hold what was written there.
    """

    folders: list[str]
    num_bytes: int
    not_reached: list[tuple[str, str]]


def erase_exports(run: Path, users: Collection[str]) -> ErasedExports:
    """Delete what was exported of the users; the records stay until `erase_records`."""
    digests: dict[str, set[str]] = {}
    for record in read_exports(run):
        if record.user in users:
            digests.setdefault(record.folder, set()).add(record.digest)
    num_bytes, done, not_reached = 0, list[str](), list[tuple[str, str]]()
    for name, recorded in digests.items():
        folder = Path(name)
        weights = folder / WEIGHTS
        num_bytes += _delete([path for half in (WEIGHTS, CONFIG) for path in folder.glob(f".{half}.*.tmp")])
        if not weights.exists():
            not_reached.append((name, "not there any more; if it was moved or copied, delete it there"))
        elif digest_of_file(weights) not in recorded:
            not_reached.append((name, "holds other weights than were exported; left alone"))
        else:
            num_bytes += _delete([folder / CONFIG, weights])
            done.append(name)
        if folder.is_dir():
            sync_folder(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    return ErasedExports(done, num_bytes, not_reached)


def _delete(paths: list[Path]) -> int:
    num_bytes = sum(path.stat().st_size for path in paths if path.exists())
    for path in paths:
        path.unlink(missing_ok=True)
    return num_bytes


def erase_records(run: Path, users: Collection[str], folders: Collection[str] | None = None) -> None:
    """Leave out the records of the users' exports, those to `folders` or all."""
    exports = read_exports(run)
    kept = [each for each in exports if each.user not in users or (folders is not None and each.folder not in folders)]
    if len(kept) < len(exports):
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in kept]
        write_text_atomic(run / EXPORTS, "".join(lines))
