"""`data prepare`: any readable data to Parquet shards of users with a manifest written last.

Called by the command line and by a run's first stage. Memory does not grow with the number of users.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proper_ds.data.config import TUNE, DataConfig
from proper_ds.data.convert import Converter, SourceTask
from proper_ds.data.forgotten import Forgotten
from proper_ds.data.instruction import SharedBeginning
from proper_ds.data.manifest import MANIFEST, Counts, Manifest, Shard, TaskManifest
from proper_ds.data.problems import NOW_HISTORY, Complaints, RefusedError
from proper_ds.data.shards import ShardWriter
from proper_ds.data.sources import Source, find_sources
from proper_ds.data.staging import Staging
from proper_ds.data.tasks import task_of, with_info
from proper_ds.errors import DataError
from proper_ds.files import digest_of_file

PROBLEMS_FILE = "problems.jsonl"
LIMITS = ("max_users_per_split", "max_history_items")
Progress = Callable[[str, int, int | None], None]
"""Called with (what, done, total or None)."""


def describe_sources(sources: list[Source]) -> list[dict[str, object]]:
    """The input files by name, size and digest: what a prepared folder was made from."""
    return [
        {
            "path": str(source.path),
            "declared": source.declared,
            "info": source.info,
            "files": [
                {"name": f.name, "num_bytes": f.stat().st_size, "digest": digest_of_file(f)} for f in source.files
            ],
        }
        for source in sources
    ]


@dataclass(frozen=True)
class Known:
    """What a run knows before it reads its data.

    Attributes:
        users: keys that have the first places, in this order, so that indices mean the same in every update.
        instructions: by task; they take the place of what the questions' shared beginning says.
        forgotten: users to leave out.
    """

    users: Sequence[str] = ()
    instructions: Mapping[str, str] = field(default_factory=dict)
    forgotten: Forgotten | None = None


def prepare(
    config: DataConfig,
    out: Path,
    progress: Progress = lambda what, done, total: None,
    known: Known = Known(),
) -> Manifest:
    """Read `config.path`, check everything, and write `out`.

    Raises:
        DataError: for unreadable input, and for bad records or leaks that are to be refused; every one of them is
            listed in `out/problems.jsonl`, and no manifest is written. Also where bad records are set aside, and a data
            set would lose all its history by that.
    """
    sources = find_sources(config)
    out.mkdir(parents=True, exist_ok=True)
    for stale in [out / MANIFEST, *out.glob("users-*.parquet")]:
        stale.unlink(missing_ok=True)
    with (
        Complaints(out / PROBLEMS_FILE) as complaints,
        Staging(out / ".staging.sqlite", complaints, config.max_users_per_split, known.forgotten) as staging,
    ):
        staging.seat(known.users)
        tasks = _stage(sources, staging, complaints, progress, known.instructions, config.splits)
        staging.complain_of_unused_golds()
        for name in LIMITS:
            _check_limits(name, config, staging)
        converter = Converter(tasks, config, complaints)
        shards, counts = _write_users(staging, converter, out, config.num_users_per_shard, len(known.users), progress)
        _settle(complaints, config, out, sources, converter)
        _check_tuning(converter.num_tuned_elsewhere, config)
    if counts.num_users == counts.num_empty:
        raise DataError(f"{', '.join(config.path)}: no usable user was found")
    manifest = Manifest(
        tasks={
            source_task.task.name: TaskManifest.of(
                source_task.task, source_task.instruction, bool(source.info.get("generated"))
            )
            for source, source_task in zip(sources, tasks, strict=True)
        },
        shards=shards,
        num_users=counts.num_users,
        num_cold_users=counts.num_cold,
        num_history_items=counts.num_items,
        splits=counts.splits(),
        sources=describe_sources(sources),
        set_aside={NOW_HISTORY: 0} | dict(complaints.counts),
        num_empty=counts.num_empty,
        num_forgotten=staging.num_kept_out,
        num_near_duplicates=converter.num_near_duplicates,
        num_before_history=converter.num_before_history,
        num_users_ahead={split: num for split, num in converter.num_users_ahead.items() if num},
        num_taught_as_history=converter.num_taught_as_history,
        limits={name: getattr(config, name) for name in LIMITS if getattr(config, name) is not None},
        tune_share=config.tune_share,
        from_rows=[task.task.name for source, task in zip(sources, tasks, strict=True) if source.is_rows],
    )
    _warn_of_history(manifest)
    manifest.write(out)
    return manifest


def _write_users(
    staging: Staging, converter: Converter, out: Path, num_per_shard: int, num_known: int, progress: Progress
) -> tuple[list[Shard], Counts]:
    """Convert everybody into shards; the first `num_known` have a row even where nothing is left of them."""
    counts = Counts()
    with ShardWriter(out, num_per_shard) as writer:
        for done, staged in enumerate(staging.users(), start=1):
            user = converter.convert(staged)
            if user.history or user.queries or done <= num_known:
                writer.write(user)
                counts.add(user)
            if done % 200 == 0:
                progress("users", done, staging.num_users)
    progress("users", staging.num_users, staging.num_users)
    return writer.shards, counts


def _warn_of_history(manifest: Manifest) -> None:
    """Say how many questions are easier than they should be, by what stands in their users' histories."""
    log = logging.getLogger("proper_ds")
    if manifest.num_near_duplicates:
        log.warning("%d questions have a near copy in their user's history", manifest.num_near_duplicates)
    if manifest.num_before_history:
        text = "%d questions are older than some item of their user's history, which methods will use to answer them"
        log.warning(text, manifest.num_before_history)


def _warn_of_bare(source: Source, num: int) -> None:
    """Say how many questions are answered with a history that did not come with them."""
    if num:
        text = "%s: %d questions have no `profile`, but others of the same users have; they are taken to share it"
        logging.getLogger("proper_ds").warning(text, source.path, num)


def _check_limits(name: str, config: DataConfig, staging: Staging) -> None:
    """Refuse limits of splits that are not there: they would limit nothing."""
    limits = getattr(config, name)
    # people of split `tune` are read as those of the training split, and told apart by their keys later
    made = {TUNE} if name == "max_history_items" and config.tune_share else set()
    unknown = sorted(limits.keys() - staging.splits - made) if isinstance(limits, dict) else []
    if unknown:
        read = ", as data.splits says" if config.splits else ""
        tuned = f" (`{TUNE}` is a part of {config.train_split!r})" if TUNE in unknown and config.tune_share else ""
        raise DataError(
            f"data.{name}: no question is of split {', '.join(unknown)}{tuned}; read were"
            f" {', '.join(sorted(staging.splits)) or 'none'}{read}. Limit those, or leave the others out"
        )


def _check_tuning(num_users: int, config: DataConfig) -> None:
    """Refuse to choose on people who are asked again later: that would be choosing on those who are evaluated."""
    if num_users:
        raise DataError(
            f"data.tune_share sets {num_users} users apart who are asked in another split than {config.train_split!r},"
            " too, as in a time-based split: choices would be made on people who are evaluated. Leave data.tune_share"
            f" out, or read data.splits=[{config.train_split}] alone"
        )


def _settle(
    complaints: Complaints, config: DataConfig, out: Path, sources: Sequence[Source], converter: Converter
) -> None:
    try:
        complaints.settle(config.bad_records, config.leaks, config.near_duplicates)
        _check_histories(complaints, sources, converter)
    except DataError:
        for shard in out.glob("users-*.parquet"):
            shard.unlink()
        raise


def _check_histories(complaints: Complaints, sources: Sequence[Source], converter: Converter) -> None:
    """Refuse to set all history of a data set aside: that is no handful of bad records, but data read as another's."""
    for index, source in enumerate(sources):
        given = converter.num_given[index]
        if given and not converter.num_usable[index]:
            raise RefusedError(
                f"{source.path}: none of {given:,} history items can be used, so nobody would have a history; that is"
                f" refused where bad records are set aside, too.\n{complaints.bad_text(may_skip=False)}",
                complaints.path,
            )


def _stage(
    sources: list[Source],
    staging: Staging,
    complaints: Complaints,
    progress: Progress,
    instructions: Mapping[str, str],
    splits: Sequence[str],
) -> list[SourceTask]:
    tasks: list[SourceTask] = []
    for index, source in enumerate(sources):
        for done, gold in enumerate(source.read_golds(complaints.add), start=1):
            if not splits or gold.split in splits:
                staging.add_gold(index, gold)
            if done % 1000 == 0:
                progress(f"gold answers of {source.path.name}", done, None)
        beginning, fields, done = SharedBeginning(), frozenset[str](), 0
        for done, question in enumerate(source.read_questions(complaints.add), start=1):
            if splits and question.split not in splits:
                continue
            staging.add_question(index, question, question.split in source.gold_splits)
            if question.has_query and not staging.is_kept_out(question.user):
                beginning.update(question.input)
            if not fields and question.profile:
                fields = frozenset(question.profile[0])
            if done % 200 == 0:
                progress(f"questions of {source.path.name}", done, None)
        progress(f"questions of {source.path.name}", done, done)
        if source.format == "lamp":  # elsewhere, a user's history may stand in one of several rows alone
            _warn_of_bare(source, staging.num_bare(index))
        task = with_info(task_of(source.declared, fields, str(source.path)), source.info, str(source.path))
        if any(task.name == other.task.name for other in tasks):
            raise DataError(
                f"{source.path}: a second data set of task {task.name!r}; give it a `name` in its info.json"
            )
        given = instructions.get(task.name)
        words = task.instruction if "instruction" in source.info else given or beginning.instruction(task)
        if "instruction" not in source.info and given is None and not beginning.shows(words):
            logging.getLogger("proper_ds").warning(
                "%s: the questions share no beginning, so histories are taught under %r; an `instruction` in info.json"
                " says otherwise",
                source.path,
                words,
            )
        tasks.append(SourceTask(task, words))
    return tasks
