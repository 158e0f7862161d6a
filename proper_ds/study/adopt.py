"""Results that one run of a study takes over from another instead of making them again.

Same name and same fingerprint mean: made from the same data by the same settings and code paths, so the same bits would
come out, but for rounding on other workers; so what is taken over always stands on the very results it was made from.
`runner.py` and `sweep.py` call `adopt` before a run starts.

Files are copied, never linked: a run rewrites, compacts and forgets within its own folder, some of it in place, and
that must not reach into another run unnoticed. The copy is made beside its place and gets its name, marker included,
by one rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from proper_ds.data.forgotten import FORGOTTEN, Forgotten
from proper_ds.errors import UserError
from proper_ds.files import sync_folder, write_json_atomic
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import read_events
from proper_ds.pipeline.roster import keep_roster
from proper_ds.pipeline.stage import Stage
from proper_ds.pipeline.stages import StageList
from proper_ds.run_folder import MARKER, RunFolder, split_lane
from proper_ds.store.elsewhere import POINTER

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

FORGETTING = "forgotten"
"""The folder of a run that has forgotten somebody (erasure/forget.py)."""
COPYING = ".adopted-"
DTYPE = "dtype.json"
SAME_ANYWHERE = ("prepare", "tokens")
"""Steps whose result has the same bits wherever it is made: they read files, and compute nothing in floating point."""
Identity = tuple[str, str]
"""One result, however often it was copied: the folder that it was made in, and when it was finished."""


def identity_of(marker: Mapping[str, Any], root: Path) -> Identity:
    """Which result a marker in a run's folder is of."""
    return str(marker.get("adopted_from", root)), str(marker.get("finished", ""))


@dataclass(frozen=True)
class Donor:
    """What the policy has to know of a run that may have a result.

    Attributes:
        markers: by stage, what its marker says (`run_folder.StageFolder.inputs`).
        dtype: the base's type there, or None where nothing was computed yet.
        elsewhere: stages whose adapters lie outside the run's folder.
    """

    root: Path
    markers: Mapping[str, Mapping[str, Any]]
    dtype: str | None = None
    elsewhere: frozenset[str] = frozenset()

    def identity(self, name: str) -> Identity | None:
        """Which result the run has of a stage, or None where it has none."""
        marker = self.markers.get(name)
        return identity_of(marker, self.root) if marker is not None else None


@dataclass(frozen=True)
class Wanted:
    """A stage that a run lacks.

    Attributes:
        batch: examples of an optimizer step, for stages on ranks; a fingerprint leaves it to the number of ranks.
        stands_on: names of all stages behind it whose result may differ in bits, wherever it is made.
    """

    name: str
    fingerprint: str
    batch: int | None = None
    stands_on: frozenset[str] = frozenset()


def choose(
    wanted: Sequence[Wanted],
    donors: Iterable[Donor],
    dtype: str | None,
    own: Mapping[str, Identity] = MappingProxyType({}),
) -> dict[str, Donor]:
    """By stage, the first run that has exactly that result and may give it away. Pure.

    A result is given away with what it stands on only: where the run that wants it has a stage behind it of its own
    making, or will make it, a copy would have been made from another result than the one beside it.

    Args:
        wanted: in the order in which stages are made.
        dtype: the base's type in the run that wants them, or None where it is open; then that of the first donor.
        own: the results that the run has already.
    """
    known, found, held = list(donors), dict[str, Donor](), dict(own)
    for stage in wanted:
        for donor in known:
            marker = donor.markers.get(stage.name)
            if marker is None or marker["fingerprint"] != stage.fingerprint or stage.name in donor.elsewhere:
                continue
            batch = marker.get("made_from", {}).get("train_batch_size")
            if stage.batch is not None and batch != stage.batch:
                continue
            if None not in (dtype, donor.dtype) and dtype != donor.dtype:
                continue
            if any(name not in held or held[name] != donor.identity(name) for name in stage.stands_on):
                continue
            found[stage.name], dtype = donor, dtype or donor.dtype
            held[stage.name] = identity_of(marker, donor.root)
            break
    return found


def adopt(config: RunConfig, stages: StageList, siblings: Iterable[Path]) -> dict[str, Path]:
    """Copy what siblings have and the run lacks; returns from which folder, by stage.

    Nothing is adopted where that would not be safe: in an update of earlier results, where somebody was forgotten in
    one of the two runs, from stores outside a run's folder or into them, and from a run that is at work.
    """
    folder = RunFolder(config.output_path)
    if config.user.only_changed or has_forgotten(folder.root):
        return {}
    behind = _behind(stages)
    wanted = [_wanted(config, stage, behind[stage.name]) for stage in stages if _is_open(config, folder, stage)]
    donors = [_donor(root) for root in siblings if root != folder.root and not has_forgotten(root)]
    chosen = choose(wanted, donors, _dtype_of(folder.root), _own(folder, stages))
    if not chosen:
        return {}
    found, failed = dict[str, Path](), set[str]()
    with folder.locked():
        for leftover in folder.root.glob(f"{COPYING}*"):
            shutil.rmtree(leftover)
        for stage in [stage for stage in stages if stage.name in chosen]:
            donor = RunFolder(chosen[stage.name].root)
            try:
                with donor.locked():
                    if has_forgotten(donor.root):  # since the choice
                        raise UserError(f"{donor.root} has forgotten somebody")
                    if failed & behind[stage.name]:
                        raise UserError("so is what it stands on")
                    _copy(stage, donor, folder)
                    found[stage.name] = donor.root
            except UserError as error:
                get_logger().warning("%s is made again: %s", stage.name, error)
                failed.add(stage.name)
    return found


def _behind(stages: StageList) -> dict[str, frozenset[str]]:
    """By stage, all stages behind it, but for those that are the same wherever they are made."""
    found, same = dict[str, frozenset[str]](), set[str]()
    for stage in stages:
        before = [name for name in stage.before if name in found]  # given data and bases are no stages
        found[stage.name] = frozenset(before).difference(same).union(*(found[name] for name in before))
        if stage.step in SAME_ANYWHERE:
            same.add(stage.name)
    return found


def _own(folder: RunFolder, stages: StageList) -> dict[str, Identity]:
    markers = {stage.name: folder.stage(stage.name).inputs() for stage in stages if stage.is_done(folder)}
    return {name: identity_of(marker, folder.root) for name, marker in markers.items() if marker is not None}


def has_forgotten(root: Path) -> bool:
    """Whether users were forgotten in a run, or are about to be: its results are not those of the data any more."""
    return (root / FORGETTING).exists() or ((root / FORGOTTEN).exists() and len(Forgotten.read(root)) > 0)


def _is_open(config: RunConfig, folder: RunFolder, stage: Stage) -> bool:
    """Whether the run neither has a stage's result nor has begun it, nor wants it elsewhere.

    A report is always a run's own: it tells of its configuration and folder.
    """
    away = stage.name.startswith("store/") and config.store.location is not None
    if stage.is_update or stage.step == "report" or away:
        return False
    place = folder.stage(stage.name)
    begun = place.begun()
    return not place.is_done(stage.fingerprint) and (begun is None or begun["fingerprint"] != stage.fingerprint)


def _wanted(config: RunConfig, stage: Stage, behind: frozenset[str]) -> Wanted:
    if stage.where != "ranks":
        return Wanted(stage.name, stage.fingerprint, stands_on=behind)
    section = "joint" if split_lane(stage.name)[0].endswith("-joint") else stage.step
    batch = getattr(config, section).global_batch_size(config.distributed.num_ranks)
    return Wanted(stage.name, stage.fingerprint, batch, behind)


def _donor(root: Path) -> Donor:
    markers, elsewhere = {}, set()
    for path in root.glob(f"**/{MARKER}"):
        name = str(path.parent.relative_to(root))
        if name.startswith("superseded"):
            continue
        markers[name] = json.loads(path.read_text(encoding="utf-8"))
        pointer = path.parent / POINTER
        if pointer.exists() and "location" in json.loads(pointer.read_text(encoding="utf-8")):
            elsewhere.add(name)
    return Donor(root, markers, _dtype_of(root), frozenset(elsewhere))


def _dtype_of(root: Path) -> str | None:
    path = root / DTYPE
    return str(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _copy(stage: Stage, donor: RunFolder, folder: RunFolder) -> None:
    source, place = donor.stage(stage.name), folder.stage(stage.name)
    copy = folder.root / f"{COPYING}{stage.name.replace('/', '-')}"
    shutil.copytree(source.path, copy)
    marker = json.loads((copy / MARKER).read_text(encoding="utf-8"))
    write_json_atomic(copy / MARKER, {"adopted_from": str(donor.root)} | marker)
    _copy_events(stage, donor, folder)
    if not (folder.root / DTYPE).exists() and (donor.root / DTYPE).exists():
        write_json_atomic(folder.root / DTYPE, _dtype_of(donor.root))
    place.begin(f"adopting {stage.fingerprint}")  # moves aside what is there; cut short here, it is begun anew
    shutil.rmtree(place.path)
    copy.rename(place.path)
    sync_folder(place.path.parent)
    if stage.step == "prepare":
        keep_roster(folder, stage)
    get_logger().info("%s: adopted from %s", stage.name, donor.root)


def _copy_events(stage: Stage, donor: RunFolder, folder: RunFolder) -> None:
    """What a stage logged, for the report: rank stages log under their name, units under their step, with a part."""
    events, _ = read_events(donor.metrics)
    own, _ = read_events(folder.metrics)
    known = {(event["time"], event["stage"]) for event in own}
    parts = (stage.name, stage.name.removeprefix("store/"))

    def is_its(event: dict[str, Any]) -> bool:
        if event.get("event") == "done":  # of a step, which may be several stages
            return False
        return event["stage"] == stage.name or (event["stage"] == stage.step and event.get("part") in parts)

    with folder.metrics.open("a", encoding="utf-8") as file:
        for event in events:
            if is_its(event) and (event["time"], event["stage"]) not in known:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
