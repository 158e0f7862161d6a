"""Forgetting users of one run: every step may be cut short, and the same command again completes the work.

For whom it is and the list of who is kept out are written first, the users' own rows of the prepared data go last:
until then their places can be found. `proper-ds store forget` calls `forget`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.manifest import Manifest
from proper_ds.erasure import rows
from proper_ds.erasure.exports import erase_exports, erase_records
from proper_ds.erasure.people import Traces, check_known, places_of, stores_of, traces_of
from proper_ds.erasure.remains import how_to_remove, learned_from, still_in_sources
from proper_ds.erasure.rows import Taken
from proper_ds.erasure.scan import Scan, scan
from proper_ds.errors import UserError
from proper_ds.evaluation.answers import UNITS, read_answers
from proper_ds.evaluation.prior_fit import ASKED
from proper_ds.evaluation.results import write_lamp_files
from proper_ds.files import write_json_atomic
from proper_ds.run_folder import RunFolder, StageFolder, stage_of
from proper_ds.store.elsewhere import location_of, open_store
from proper_ds.store.mentions import mention_pattern
from proper_ds.training.context import RunContext
from proper_ds.training.rank_stage import CHECKPOINT

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

FOLDER, PENDING = "forgotten", "pending.json"
BY_PLACE = ("tokens", "features", "predictions", "embeddings", "profiles", "prior")
"""Stages that know users by index alone."""
OUT_OF_REACH = (
    "Not searched: Ray's own logs (its temporary folder on each node, the driver log of a job), output of the terminal"
    " that was redirected to files, and what file systems, object stores and backups keep of deleted files."
)


@dataclass
class Receipt:
    """What was done, written as JSON into the run's folder; names nobody.

    Attributes:
        removed: by kind, rows, files and bytes.
        remains: what shared stages learned from the users, by stage.
        sources: the caller's own files in which the users still stand.
        not_reached: exported adapters that are not where they were written, by number: folders are often named after
            users.
        not_reached_folders: the same with their folders, for the terminal; never written to disk.
        proof: what was read back, and everything found there that should be gone.
    """

    time: str
    num_users: int
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    remains: dict[str, Any] = field(default_factory=dict)
    how_to_remove: str = ""
    sources: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    not_reached_folders: list[str] = field(default_factory=list)
    out_of_reach: str = OUT_OF_REACH
    proof: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What is written to disk."""
        return {name: value for name, value in asdict(self).items() if name != "not_reached_folders"}

    @property
    def is_proved(self) -> bool:
        """Whether nothing was found that should be gone, in files that could all be read."""
        return not self.proof["found"] and not self.proof["not_decoded"]


def check_nothing_pending(root: Path) -> None:
    """Raise UserError where forgetting was cut short: a run would work with half of somebody's data."""
    if (root / FOLDER / PENDING).exists():
        raise UserError(
            f"{root}: forgetting users was cut short there; run the same `proper-ds store forget` again first"
        )


def _check_same_users(root: Path, keys: Sequence[str], forgotten: Forgotten) -> None:
    """Raise UserError where forgetting was cut short for somebody who is not among these users."""
    path = root / FOLDER / PENDING
    if path.exists():
        begun = set(json.loads(path.read_text(encoding="utf-8"))["users"])
        if num_left := len(begun - forgotten.hashes_of(keys)):
            raise UserError(
                f"{root}: forgetting {len(begun):,} users was cut short there, and {num_left:,} of them are not among"
                " those given now; give them all, with others if you like (who they are is kept as keyed hashes only)"
            )


class _Work:
    """One call of `forget`; what it has done so far is kept in `pending.json`, in case it is cut short."""

    def __init__(
        self, context: RunContext, keys: Sequence[str], places: dict[str, int], hashes: Collection[str]
    ) -> None:
        self.context, self.run = context, context.folder
        self.keys, self.hashes = frozenset(keys), sorted(hashes)
        self.indices = sorted(places.values())
        pattern = mention_pattern(keys)
        self.mentions: Callable[[str], bool] = lambda text: bool(
            pattern.search(text.encode("utf-8", "surrogateescape"))
        )
        self._pending = self.run.root / FOLDER / PENDING
        self.receipt = Receipt(time.strftime("%Y-%m-%d %H:%M:%S"), len(keys))
        if self._pending.exists():
            before = json.loads(self._pending.read_text(encoding="utf-8"))
            for name in ("removed", "remains", "not_reached"):
                setattr(self.receipt, name, before["receipt"][name])
        self.save()
        if not self.receipt.remains:
            self.receipt.remains = learned_from(context, self.indices)
        self.receipt.how_to_remove = how_to_remove(self.run)
        self.save()

    def save(self) -> None:
        """Write down what was done."""
        write_json_atomic(self._pending, {"users": self.hashes, "receipt": self.receipt.to_json()})

    def note(self, kind: str, taken: Taken) -> None:
        """Add to what was removed."""
        if taken == Taken():
            return
        before = Taken(**self.receipt.removed.get(kind, {}))
        self.receipt.removed[kind] = asdict(before + taken)
        self.save()

    def leftovers(self) -> None:
        """What killed writers left: it may hold anything."""
        left = [
            *self.run.root.rglob(".*.tmp"),
            *self.run.root.rglob(".staging.sqlite*"),
            *self.run.root.glob(".check-*"),
        ]
        for path in left:
            if path.exists():
                self.note("leftovers of killed processes", rows.delete(path))

    def aside(self) -> None:
        """Results moved aside: what knows users by place goes as a whole, as those places are not known any more."""
        for path in sorted((self.run.root / "superseded").glob("*")):
            name = stage_of(path)
            if (
                name.startswith(BY_PLACE)
                or rows.has_tables(path)
                or (name == "prepared" and not rows.is_prepared(path))
            ):
                self.note("superseded results", rows.delete(path))
            elif name == "prepared":
                self.note("superseded prepared data", rows.erase_prepared(path, self.keys, self.mentions))
            elif (path / CHECKPOINT).exists():
                self.note("superseded results", rows.delete(path / CHECKPOINT))

    def adapters(self) -> None:
        """Adapters of all versions, live and moved aside."""
        for path in stores_of(self.run):
            store = open_store(path)
            before = store.stats().pack_bytes
            report = store.forget(self.keys)
            after = store.stats().pack_bytes
            if report.num_packs or report.num_fragments:
                self.note("adapters", Taken(report.num_rows, report.num_packs + report.num_fragments, before - after))

    def exports(self) -> None:
        """Adapters written elsewhere."""
        erased = erase_exports(self.run.root, self.keys)
        self.note("exported adapters", Taken(len(erased.folders), len(erased.folders), erased.num_bytes))
        if erased.not_reached:
            self.receipt.not_reached = [f"{n}: {why}" for n, (_, why) in enumerate(erased.not_reached, start=1)]
            self.receipt.not_reached_folders = [f"{folder}: {why}" for folder, why in erased.not_reached]
        self.save()
        erase_records(self.run.root, self.keys, erased.folders)  # the others last of all: they are told again

    def retire(self) -> None:
        """Move aside what was made from data in another order, as the next run would."""
        order = self._order()
        level_folders = [self.run.stage(f"group/{path.name}") for path in self.run.root.glob("group/*")]
        level_folders += self.run.in_all_lanes("plora")
        by_place = [
            place for name in ("tokens", "features", "embeddings", "profiles") for place in self.run.in_all_lanes(name)
        ]
        for place in [*by_place, *self.run.predictions(), *level_folders]:
            found = place.inputs() or place.begun()
            if found is not None and found.get("made_from", {}).get("order", order) != order:
                place.begin("retired")

    def _order(self) -> str | None:
        marker = self.run.stage("tokens").inputs() if self.context.config.data.prepared else None
        marker = marker or self.run.stage("prepared").inputs() or self.run.stage("prepared").begun()
        return marker.get("made_from", {}).get("order") if marker else None

    def stages(self) -> None:
        """What stages derived from the users' data, known by their places."""
        run = self.run
        for features in run.in_all_lanes("features"):
            self.note("features", rows.erase_features(features.path, self.indices))
        for profiles in run.in_all_lanes("profiles"):
            self.note("profiles by a model", rows.erase_predictions(profiles.path, self.indices))
        for embeddings in run.in_all_lanes("embeddings"):
            self.note("embeddings", rows.erase_embeddings(embeddings.path, self.indices))
        for path in sorted({*run.root.glob(f"prior/*/{UNITS}"), *run.root.glob(f"prior/*/{ASKED}")}):
            self.note("answers that label priors are fitted to", rows.delete(path))  # a finished stage keeps none
        for predictions in run.predictions():
            if predictions.inputs() is None:
                self.note("predictions", rows.delete(predictions.path))  # its units would be cut otherwise now
            else:
                self.note("predictions", rows.erase_predictions(predictions.path, self.indices))
                self._write_lamp_files(predictions)
        # later stages save the level that they go on from
        for folder in ("group/*", "router/*", "store/*", "plora", "plora@*"):
            for path in sorted(run.root.glob(f"{folder}/level.safetensors")):
                self.note("user tables", rows.erase_table_lines(path, self.indices))
        for path in [
            *run.root.glob(CHECKPOINT),
            *run.root.glob(f"*/{CHECKPOINT}"),
            *run.root.glob(f"*/*/{CHECKPOINT}"),
        ]:
            self.note("checkpoints of unfinished stages", rows.delete(path))
        for tokens in run.in_all_lanes("tokens"):
            if tokens.inputs() is None:
                self.note("tokens", rows.delete(tokens.path))
            else:
                self.note("tokens", rows.erase_tokens(tokens.path, self.indices))

    def _write_lamp_files(self, predictions: StageFolder) -> None:
        tasks = Manifest.read(self.context.prepared_path).tasks
        if all((predictions.path / "lamp" / f"{task}.json").exists() for task in tasks):  # else there is no report yet
            write_lamp_files(read_answers(predictions.path), tasks, predictions.path)

    def words(self) -> None:
        """Lines that speak of the users."""
        for path in sorted(self.run.logs.glob("*")):
            self.note("lines of logs", rows.erase_lines(path, self.mentions))
        if self.run.metrics.exists():
            self.note("lines of metrics", rows.erase_lines(self.run.metrics, self.mentions))

    def data(self) -> None:
        """The users' own rows, and with them the way to their places."""
        prepared = self.run.stage("prepared").path
        if self.run.roster.exists():
            self.note("roster", rows.erase_roster(self.run.roster, self.keys))
        if rows.is_prepared(prepared):
            self.note("prepared data", rows.erase_prepared(prepared, self.keys, self.mentions))
        elif prepared.exists():
            self.note("prepared data", rows.delete(prepared))
        erase_records(self.run.root, self.keys)

    def prove(self, traces: Traces) -> None:
        """Read everything back."""
        foreign = _drop_foreign(self.run, traces)
        elsewhere = [found for path in stores_of(self.run) if isinstance(found := location_of(path), str)]
        others = [Path(location) for location in elsewhere if "://" not in location]
        result = scan(self.run.root, sorted(self.keys), traces.by_kind, others)
        remote = [location for location in elsewhere if "://" in location]
        root = self.run.root.resolve()
        sources = [Path(path) for path in self.context.config.data.path]
        own = [str(path.relative_to(root)) for path in sources if path.is_relative_to(root)]
        self.receipt.proof = _proof(result, traces, foreign, own) | {"stores_not_searched_by_bytes": remote}

    def finish(self) -> Path:
        """Write the receipt."""
        name = f"receipt-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.json"
        path = self.run.root / FOLDER / name
        write_json_atomic(path, self.receipt.to_json())
        self._pending.unlink()
        return path


def _drop_foreign(run: RunFolder, traces: Traces) -> int:
    """Leave out traces that others have too: what is still in data whose own rows were just emptied. Returns how many.

    That those rows are empty is read back by key and by place, not by these traces.
    """
    num_foreign = 0
    for kind in ("text", "tokens", "features", "embeddings"):
        name = "prepared" if kind == "text" else kind
        if kind not in traces.by_kind:  # the run has none
            continue
        sought = {str(number): [trace] for number, trace in enumerate(traces.by_kind[kind])}
        first, *lanes = [run.root / name, *(place.path for place in run.in_all_lanes(name) if place.name != name)]
        foreign = {number for _, number in scan(first, [], sought, lanes).found}
        traces.by_kind[kind] = [trace for number, (trace,) in sought.items() if number not in foreign]
        num_foreign += len(foreign)
    return num_foreign


def _proof(result: Scan, traces: Traces, num_foreign: int, own_data: Sequence[str]) -> dict[str, Any]:
    """The proof for the receipt; `own_data` are the caller's sources that lie in the run's folder, by name."""
    # a base's vocabulary may have any word
    in_base = [name for name, kind in result.found if kind == "key" and name.startswith("base/")]
    in_data = sorted({name for name, _ in result.found if any(name == d or name.startswith(f"{d}/") for d in own_data)})
    excused = {*in_base, *in_data}
    return {
        "num_files_read": result.num_files,
        "num_bytes_read": result.num_bytes,
        "num_bytes_unpacked": result.num_unpacked_bytes,
        "num_traces_sought": {kind: len(found) for kind, found in traces.by_kind.items()},
        "num_traces": traces.num_found,
        "num_traces_others_have_too": num_foreign,
        "found": [f"{n}: {kind}" for n, kind in result.found if n not in excused or (n in in_base and kind != "key")],
        "own_data_in_the_run": in_data,
        "not_decoded": result.not_decoded,
        "words_of_the_base": in_base,
    }


def forget(config: RunConfig, root: Path, keys: Sequence[str]) -> tuple[Receipt, Path]:
    """Remove everything of these users from a run's folder, and prove it.

    Args:
        config: of the run.
        root: the run's folder, which may have been moved since.
        keys: the users' keys, as in the data.

    Returns:
        The receipt, and the file it was written to.

    Raises:
        UserError: while a run is at work there, or where forgetting others was cut short.
        StoreError: for keys of whom the run has nothing; then nobody is forgotten.
    """
    import torch

    keys = list(dict.fromkeys(keys))
    context = RunContext(config.model_copy(update={"output_dir": str(root.resolve())}), torch.device("cpu"))
    run = context.folder
    with run.locked():
        forgotten = Forgotten.read(run.root)
        _check_same_users(run.root, keys, forgotten)
        places = places_of(run, keys, context.prepared_path)
        check_known(run, keys, places, forgotten)
        forgotten.add([], run.root)  # the hashes' own key: without it nobody could tell for whom the work is pending
        work = _Work(context, keys, places, forgotten.hashes_of(keys))
        forgotten.add(keys, run.root)
        work.retire()
        traces = traces_of(run, places, keys)
        work.leftovers()
        work.aside()
        work.adapters()
        work.exports()
        work.stages()
        work.words()
        work.data()
        work.receipt.sources = still_in_sources(config, work.keys)
        work.prove(traces)
        return work.receipt, work.finish()
