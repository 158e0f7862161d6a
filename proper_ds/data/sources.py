"""Finds out what a path holds: which files, in which format, of which splits and which task."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.data.benchmarks import BENCHMARKS
from proper_ds.data.config import DataConfig
from proper_ds.data.files import stem_of
from proper_ds.data.readers import (
    Complain,
    declared_task,
    read_jsonl,
    read_lamp_golds,
    read_lamp_questions,
    read_parquet,
)
from proper_ds.data.records import RawGold, RawQuestion
from proper_ds.data.tasks import LEGAL_NAMES
from proper_ds.errors import DataError

SPLITS = ("train", "dev", "validation", "test")
INFO_KEYS = ("name", "task", "labels", "instruction", "generated")
_QUESTIONS, _OUTPUTS = "_questions", "_outputs"


@dataclass(frozen=True)
class Source:
    """One data set: the files of one task.

    Attributes:
        questions: (file, split) of each questions or rows file; split None where each row names its own.
        golds: (file, split) of LaMP's outputs files; empty for JSONL and Parquet.
        info: the folder's info.json, or {}.
        declared: the task that the configuration, info.json or an outputs file names.
    """

    path: Path
    format: str
    questions: tuple[tuple[Path, str | None], ...]
    golds: tuple[tuple[Path, str], ...]
    info: dict[str, Any]
    declared: str

    @property
    def files(self) -> list[Path]:
        """All files, in reading order."""
        return [file for file, _ in (*self.golds, *self.questions)]

    @property
    def is_rows(self) -> bool:
        """Whether it is somebody's own JSONL or Parquet, in the form that only proper_ds has."""
        return self.format in ("jsonl", "parquet")

    @property
    def gold_splits(self) -> frozenset[str]:
        """Splits whose answers stand in a file of their own."""
        return frozenset(split for _, split in self.golds)

    def read_questions(self, complain: Complain) -> Iterator[RawQuestion]:
        """All questions of all splits, in file order."""
        for file, split in self.questions:
            if self.format == "lamp":
                yield from read_lamp_questions(file, split or "train", complain)
            elif self.format in BENCHMARKS:
                yield from BENCHMARKS[self.format].read(file, split or "train", self.info, complain)
            elif self.format == "jsonl":
                yield from read_jsonl(file, split, complain)
            else:
                yield from read_parquet(file, split, complain)

    def read_golds(self, complain: Complain) -> Iterator[RawGold]:
        """All separate gold answers, in file order."""
        for file, split in self.golds:
            yield from read_lamp_golds(file, split, complain)


def find_sources(config: DataConfig) -> list[Source]:
    """One source for each of `config.path`.

    Raises:
        DataError: for paths that do not exist or hold nothing readable, and for an undeclared task.
    """
    missing = [path for path in config.path if not Path(path).exists()]
    if missing:
        exist = "does not exist" if len(missing) == 1 else "do not exist"
        raise DataError(f"data.path {', '.join(missing)} {exist}; give folders or files of LaMP, JSONL or Parquet data")
    return [_find_source(Path(path), config) for path in config.path]


def _find_source(path: Path, config: DataConfig) -> Source:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    benchmark = _benchmark_source(path, files, config)
    if benchmark is not None:
        return benchmark
    found = _guess_format(files) if config.format == "auto" else config.format
    if found is None:
        inside = [child.name for child in files if child.is_dir() and _guess_format(sorted(child.iterdir()))]
        hint = f" Its folders {', '.join(inside)} do: name them." if inside else ""
        raise DataError(
            f"data.path {path} holds no *_questions.json[.gz], *.jsonl[.gz] or *.parquet.{hint}"
            " For a folder written by `data prepare` use data.prepared."
        )
    folder = path if path.is_dir() else path.parent
    info = read_info(folder / "info.json")
    if found == "lamp":
        return _lamp_source(path, files, info, config.task)
    ending = ".jsonl" if found == "jsonl" else ".parquet"
    chosen = [file for file in files if file.name.removesuffix(".gz").endswith(ending)]
    if not chosen:
        raise DataError(f"data.path {path} holds no *{ending} file, which data.format={found} asks for")
    questions = tuple((file, split_of(file)) for file in chosen)
    declared = config.task or str(info.get("task", "generic"))
    return Source(path, found, questions, (), info, declared)


def _benchmark_source(path: Path, files: list[Path], config: DataConfig) -> Source | None:
    """The files of another benchmark in its own form, or None where they are not."""
    asked = config.format
    for name in BENCHMARKS if asked == "auto" else [asked]:
        found = BENCHMARKS[name].find(files) if name in BENCHMARKS else None
        if found is not None:
            info = found.info | read_info((path if path.is_dir() else path.parent) / "info.json")
            declared = config.task or str(info.get("task", found.task))
            return Source(path, name, found.questions, found.golds, info, declared)
    if asked in BENCHMARKS:
        raise DataError(f"data.path {path} holds no {BENCHMARKS[asked].files}, which data.format={asked} asks for")
    return None


def split_of(file: Path) -> str | None:
    """The split that a file of rows is named after: `dev` for dev.jsonl and dev-00000-of-00001.parquet, else None."""
    word = re.split(r"[-._]", stem_of(file), maxsplit=1)[0]
    return word if word in SPLITS else None


def _guess_format(files: list[Path]) -> str | None:
    for file in files:
        if stem_of(file).endswith(_QUESTIONS) and ".json" in file.name:
            return "lamp"
    for file in files:
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            return "jsonl"
        if file.suffix == ".parquet":
            return "parquet"
    return None


def _lamp_source(path: Path, files: list[Path], info: dict[str, Any], task: str | None) -> Source:
    folder = path if path.is_dir() else path.parent
    questions: list[tuple[Path, str | None]] = []
    golds: list[tuple[Path, str]] = []
    for file in files:
        stem = stem_of(file)
        if stem.endswith(_QUESTIONS):
            split = stem.removesuffix(_QUESTIONS)
            questions.append((file, split))
            for ending in (".json", ".json.gz"):
                outputs = folder / f"{split}{_OUTPUTS}{ending}"
                if outputs.exists():
                    golds.append((outputs, split))
                    break
    if not questions:
        raise DataError(f"data.path {path} holds no *_questions.json[.gz], which data.format=lamp asks for")
    declared = task or info.get("task")
    for file, _ in golds:
        declared = declared or declared_task(file)
    if declared is None:
        raise DataError(
            f"{path}: no outputs file names its task; set data.task (data prepare: --task) to one of"
            f" {', '.join(LEGAL_NAMES)}"
        )
    return Source(path, "lamp", tuple(questions), tuple(golds), info, str(declared))


def read_info(path: Path) -> dict[str, Any]:
    """A data set's info.json, or {} where there is none. Raises DataError for a broken one or a misspelt key."""
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error})") from None
    if not isinstance(info, dict):
        raise DataError(f"{path}: holds no JSON object")
    for key in info.keys() - set(INFO_KEYS):  # other keys may say what they like, but not a misspelt one of ours
        near = difflib.get_close_matches(key, INFO_KEYS, n=1, cutoff=0.8)
        if near:
            raise DataError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
    return info
