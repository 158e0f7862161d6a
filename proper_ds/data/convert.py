"""One staged user to one User: history items become training pairs, answers are checked, leaks are found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from proper_ds.data.config import TUNE, DataConfig
from proper_ds.data.leaks import LeakGuard
from proper_ds.data.problems import LEAK, NEAR, NOW_HISTORY, BadRecord, Complaint, Complaints
from proper_ds.data.records import HistoryItem, Query, User
from proper_ds.data.rows import number_text, optional_text
from proper_ds.data.staging import StagedProfile, StagedUser
from proper_ds.data.tasks import Task
from proper_ds.files import seed_of

_ORDER = {"train": 0, "dev": 1, "validation": 1, "test": 2}
"""Of splits in time, where the same people ask in several; splits of other names are in none."""
Kept = dict[tuple[int | str, ...], tuple[HistoryItem, set[str]]]
"""History items and the splits in whose profiles they stood, by source, content and number of repeats."""


@dataclass(frozen=True)
class SourceTask:
    """A data set's task and the instruction found in its questions."""

    task: Task
    instruction: str


class Converter:
    """Makes users from staged ones; complains of what cannot be used and leaves it out."""

    def __init__(self, tasks: list[SourceTask], config: DataConfig, complaints: Complaints) -> None:
        self._tasks = tasks
        self._config = config
        self._complaints = complaints
        self.num_near_duplicates = 0
        """Questions kept although a near copy stands in the user's history, as asked for."""
        self.num_before_history = 0
        """Questions outside the training split with a time before that of some item of the user's history."""
        self.num_users_ahead: Counter[str] = Counter()
        """By split other than the training split, users whose history holds what only later splits' profiles do."""
        self.num_taught_as_history = 0
        """Questions of the training split that a later split's history holds."""
        self.num_tuned_elsewhere = 0
        """Users set apart for choices who are asked in another split, too."""
        self.num_given: Counter[int] = Counter()
        self.num_usable: Counter[int] = Counter()
        """By source, history items that records hold, and those of them that can be used; repeats count again."""

    def convert(self, staged: StagedUser) -> User:
        """The user, with history oldest first."""
        kept: Kept = {}
        for profile in staged.profiles:
            self._add_profile(staged.key, profile, kept)
        items = [(item, frozenset(splits)) for item, splits in kept.values()]
        history = _oldest_first([item for item, _ in items])
        user = User(staged.key, _newest(history, self._limit_of(staged)))
        guard = LeakGuard(items)  # of all of them, so that the same questions are kept
        self._count_splits(staged, items)
        for question in staged.questions:
            source = self._tasks[question.source]
            try:
                answer = None if question.gold is None else source.task.checked_answer(question.gold)
            except BadRecord as reason:
                self._complaints.add(
                    Complaint("bad", question.file, question.record, question.id, f"gold answer: {reason}", staged.key)
                )
                continue
            leak = guard.find(source.task, source.instruction, question.input, answer)
            if leak is not None:
                likeness, what, splits = leak
                kind = LEAK if likeness == "same" else NEAR
                if all(self._is_later(split, question.split) for split in splits):
                    kind, what = NOW_HISTORY, "a later split has it in the user's history, where it is taught"
                if kind == NEAR and self._config.near_duplicates == "allow":
                    self.num_near_duplicates += 1
                else:
                    self._complaints.add(Complaint(kind, question.file, question.record, question.id, what, staged.key))
                    if kind != NOW_HISTORY or question.split != self._config.train_split:
                        continue
                    answer = None  # not taught twice, but its user stays one of the training users
                    self.num_taught_as_history += 1
            name = source.task.name
            split = self._split_of(staged.key, question.split)
            user.queries.append(Query(question.id, split, name, question.input, answer, question.time))
            if question.split != self._config.train_split:
                self.num_before_history += _is_before(question.time, user.history)
        user.queries.sort(key=lambda query: (query.split != self._config.train_split, query.answer is None))
        return user

    def _limit_of(self, staged: StagedUser) -> int | None:
        """How many items of each task the user's history may keep."""
        limits = self._config.max_history_items
        if not isinstance(limits, dict):
            return limits
        asked = {self._split_of(staged.key, question.split) for question in staged.questions}
        return min((limits[split] for split in asked & limits.keys()), default=None)

    def _count_splits(self, staged: StagedUser, items: list[tuple[HistoryItem, frozenset[str]]]) -> None:
        """Count, for each split a user is asked in, whether the history is ahead of it."""
        config, asked = self._config, {question.split for question in staged.questions}
        is_tuned = config.train_split in asked and self._split_of(staged.key, config.train_split) == TUNE
        self.num_tuned_elsewhere += is_tuned and len(asked) > 1
        for split in asked - {config.train_split}:
            self.num_users_ahead[split] += any(
                all(self._is_later(other, split) for other in splits) for _, splits in items
            )

    def _is_later(self, split: str, than: str) -> bool:
        """Whether a split comes after another: the training split is the first, then dev, then test."""
        if self._config.train_split in (split, than):
            return split != than == self._config.train_split
        return split in _ORDER and than in _ORDER and _ORDER[split] > _ORDER[than]

    def _split_of(self, user: str, split: str) -> str:
        config = self._config
        return TUNE if split == config.train_split and is_for_tuning(user, config.tune_share) else split

    def _add_profile(self, user: str, profile: StagedProfile, kept: Kept) -> None:
        task = self._tasks[profile.source].task
        num_alike: Counter[tuple[str, ...]] = Counter()
        self.num_given[profile.source] += len(profile.items)
        for position, raw in enumerate(profile.items, start=1):
            try:
                item = history_item(task, raw)
            except BadRecord as reason:
                key = optional_text(raw, "id")
                text = f"history item {position}: {reason}"
                self._complaints.add(Complaint("bad", profile.file, profile.record, key, text, user))
                continue
            self.num_usable[profile.source] += 1
            # The same item may stand in several of the user's profiles. Items without an id that are alike in one
            # profile are several: the user did it again.
            content = (item.id, item.text, item.answer, item.time)
            num_alike[content] += 1
            identity = (profile.source, *content, 0 if item.id else num_alike[content])
            if identity in kept:
                kept[identity][1].add(profile.split)
            else:
                kept[identity] = (item, {profile.split})


def history_item(task: Task, raw: dict[str, Any]) -> HistoryItem:
    """A raw history item as a training pair. Raises BadRecord."""
    index = task.pair_of(raw)
    pair = task.pairs[index]
    text = "" if pair.text is None else _field(raw, pair.text)
    answer = task.checked_answer(_field(raw, pair.answer)) if _keeps_labels(task) else _field(raw, pair.answer).strip()
    if not answer:
        raise BadRecord(f"`{pair.answer}` is empty")
    retrieval = " ".join(_field(raw, name) for name in task.retrieval_fields if raw.get(name) is not None)
    time = optional_text(raw, "date", "time")
    return HistoryItem(
        optional_text(raw, "id"), task.name, index, text, answer, time, "" if retrieval == text else retrieval
    )


def _keeps_labels(task: Task) -> bool:
    """Whether history items carry the task's own labels (LaMP-1's do not: they have no candidates)."""
    return task.lamp_id != "LaMP_1"


def _field(raw: dict[str, Any], name: str) -> str:
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord(f"`{name}` is {str(value)[:40]!r}, not a text")
    return number_text(value)


def is_for_tuning(user: str, share: float) -> bool:
    """Whether a user of the training split is set apart for choices: by the key alone, whatever else the data holds."""
    return seed_of("tune", user) < share * 2**63


def _is_before(time: str, history: list[HistoryItem]) -> bool:
    """Whether a question is older than an item that it may be answered with; False where times are not known."""
    if not time or not history or not all(item.time for item in history):
        return False
    try:
        return any(float(item.time) > float(time) for item in history)
    except ValueError:
        return any(item.time > time for item in history)


def _newest(items: list[HistoryItem], count: int | None) -> list[HistoryItem]:
    """The last so many items of each task."""
    if count is None:
        return items
    left, kept = Counter({item.task: count for item in items}), list[HistoryItem]()
    for item in reversed(items):
        if left[item.task]:
            left[item.task] -= 1
            kept.append(item)
    return kept[::-1]


def _oldest_first(items: list[HistoryItem]) -> list[HistoryItem]:
    """Sorted by time where all items have one (ISO dates, or numbers), else as given."""
    if not items or not all(item.time for item in items):
        return items
    try:
        return sorted(items, key=lambda item: float(item.time))
    except ValueError:
        return sorted(items, key=lambda item: item.time)
