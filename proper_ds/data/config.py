"""The `data` section of a run: where people's data is and how strict to be with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from proper_ds.section import Section


def _as_list(value: object) -> object:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
Strictness = Literal["refuse", "set_aside"]
NearStrictness = Literal["refuse", "set_aside", "allow"]
TUNE = "tune"
"""The split of users who are set apart from the training split for choices."""


class DataConfig(Section):
    """Input data, or a folder that `proper-ds data prepare` has already written."""

    path: Names = []
    """Folders or files in LaMP's format, JSONL or Parquet; each is one task. Leave empty when `prepared` is given."""
    prepared: str | None = None
    """A folder written by `proper-ds data prepare`, used as it is."""
    format: Literal["auto", "lamp", "jsonl", "parquet", "oppu", "longlamp", "peft-u", "personal-llm"] = "auto"
    task: str | None = None
    """LaMP_1, LaMP_2M, LaMP_2N, LaMP_3 .. LaMP_7 or `generic`; needed only where the data does not say."""
    train_split: str = "train"
    """Users with questions in this split teach the population and group stages."""
    splits: Names = []
    """Read only these splits; all where empty. Where the same people ask in several splits (LaMP's time-based split),
    the histories of later ones hold the answers to earlier questions: leave out what comes after `evaluation.split`."""
    bad_records: Strictness = "refuse"
    leaks: Strictness = "refuse"
    """What to do with a question whose own item stands in the same user's history."""
    near_duplicates: NearStrictness = "set_aside"
    """What to do with a question of which a near copy stands in the same user's history, as question or as answer."""
    tune_share: float = Field(default=0, ge=0, lt=1)
    """This share of the training split's users, chosen by their keys, become split `tune`: choices (epochs, rank, which
    router) can be made on them, so that dev users are looked at once. Their questions are not trained on. Refused where
    some of them are asked in another split, too."""
    max_users_per_split: PositiveInt | Annotated[dict[str, PositiveInt], Field(min_length=1)] | None = None
    """Use only the first so many users of each split, or, by split, of those that are named: for trying things out."""
    max_history_items: PositiveInt | Annotated[dict[str, PositiveInt], Field(min_length=1)] | None = None
    """Keep each user's newest so many history items of a task only, for whatever method: for trying things out. Or, by
    split, of the users who are asked in it (in several: the smallest number): `{dev: 2}` shows how everything answers
    people of whom little is known, with shared stages that learned from whole histories."""
    num_users_per_shard: int = Field(default=10_000, ge=1)
