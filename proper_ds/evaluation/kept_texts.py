"""Bytes of what prompts and floors must keep of a user's history: texts, a summary of them, or counts alone.

`state.py` adds them up. All are averages over users with history; where there are many, over some of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proper_ds.data.background import Background
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.profile_text import Summary
from proper_ds.data.profiles import Profiles
from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import HistoryItem, User

if TYPE_CHECKING:
    from proper_ds.training.context import RunContext

NUM_BLOCKS, USERS_PER_BLOCK = 16, 256
"""So many users are looked at, in blocks that are spread over the data."""
NUMBER_BYTES = 4


def recipe_bytes(context: RunContext, recipe: PromptRecipe) -> float:
    """Bytes of text that a user's prompts are made from: items to choose from, a profile, or both.

    Args:
        context: of the recipe's lane, whose background or written profiles are read.
    """
    kept = _Kept(context, recipe)
    return _mean(context.prepared, lambda user: sum(kept.num_bytes(user.key, *task) for task in _by_task(user)))


def floor_bytes(prepared: PreparedData, method: str) -> float:
    """Bytes that a floor must keep of a user, over all tasks: nothing for `words`, counts or an offset for the others,
    and the titles of LaMP-1, with which candidates are compared."""
    if method == "words":
        return 0.0
    tasks = prepared.manifest.tasks
    total = float(sum(NUMBER_BYTES * _num_numbers(task, method) for task in tasks.values()))
    compared = {name for name, task in tasks.items() if task.lamp_id == "LaMP_1"}
    if compared:
        total += _mean(prepared, lambda user: sum(_size(i.text) for i in user.history if i.task in compared))
    return total


def _num_numbers(task: TaskManifest, method: str) -> int:
    """How many numbers a floor keeps of a user for one task."""
    if task.lamp_id == "LaMP_1":
        return 0
    if task.kind == "classification":
        return len(task.labels or ())  # how often each was given
    if method == "words+own":
        return 2  # an offset or a typical length, and of how many items
    return len(task.labels or ()) or 1  # for the median: counts of ratings; a typical length


class _Kept:
    """What one recipe keeps of users."""

    def __init__(self, context: RunContext, recipe: PromptRecipe) -> None:
        self._recipe, self._tasks = recipe, context.prepared.manifest.tasks
        self._background = Background.read(context.stage("tokens").path) if recipe.needs_background else None
        self._profiles = None
        if recipe.profile == "file":
            assert recipe.profile_file is not None
            self._profiles = Profiles.from_file(Path(recipe.profile_file))
        elif recipe.profile == "model":
            self._profiles = Profiles.from_units(context.stage("profiles").path / "units", context.keys)

    def num_bytes(self, user: str, task: str, items: list[HistoryItem]) -> int:
        """Bytes of one user's items of one task, oldest first."""
        shown = items
        if self._recipe.retriever is None:
            shown = []
        elif self._recipe.retriever == "recency":  # nobody searches the others
            shown = items[-self._recipe.num_retrieved :]
        return sum(_size(item.text) + _size(item.answer) for item in shown) + _size(self._profile(user, task, items))

    def _profile(self, user: str, task: str, items: list[HistoryItem]) -> str:
        found = self._profiles.of(user, task) if self._profiles is not None else None
        if found is None and self._background is not None:
            return Summary(self._tasks[task], items, self._background.of(task)).before(len(items))
        return found or ""


def _by_task(user: User) -> Iterator[tuple[str, list[HistoryItem]]]:
    found: dict[str, list[HistoryItem]] = defaultdict(list)
    for item in user.history:
        found[item.task].append(item)
    yield from found.items()


def _size(text: str) -> int:
    return len(text.encode("utf-8"))


def _mean(prepared: PreparedData, bytes_of: Callable[[User], int]) -> float:
    found = [bytes_of(user) for user in _sampled(prepared) if user.history]
    return float(np.mean(found)) if found else 0.0


def _sampled(prepared: PreparedData) -> Iterator[User]:
    num_users = prepared.manifest.num_users
    if num_users <= NUM_BLOCKS * USERS_PER_BLOCK:
        yield from prepared.users()
        return
    for start in np.linspace(0, num_users - USERS_PER_BLOCK, NUM_BLOCKS, dtype=np.int64).tolist():
        yield from prepared.users(start, start + USERS_PER_BLOCK)
