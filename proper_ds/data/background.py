"""In how many history items of the training users each word stands: what a person's own words are compared with.

Words that one user alone has are left out, so that the file names nobody. Made once a lane while its prompts are
tokenised, and written there; `profile_text.py` reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from proper_ds.data.records import HistoryItem, User
from proper_ds.data.retrieval import search_text
from proper_ds.errors import DataError
from proper_ds.files import write_json_atomic

BACKGROUND = "background.json"
MAX_WORDS = 50_000
"""Distinct words a task keeps; the rarest go, which bounds memory and the file."""
_WORD = re.compile(r"\b[^\W\d_][^\W_]{2,}")
_PRUNE_AT = 8 * MAX_WORDS


def item_words(item: HistoryItem) -> list[str]:
    """The distinct words of an item in order: lower case, three letters or more, none that begins with a digit."""
    return list(dict.fromkeys(_WORD.findall(search_text(item).casefold())))


@dataclass(frozen=True)
class TaskBackground:
    """One task: items that hold a word, and the sum of these numbers over all words."""

    num_items_with: dict[str, int]
    total: int


@dataclass(frozen=True)
class Background:
    """By task."""

    tasks: dict[str, TaskBackground]

    def of(self, task: str) -> TaskBackground:
        """That of a task; empty where no training user has history of it."""
        return self.tasks.get(task, TaskBackground({}, 0))

    @classmethod
    def count(cls, users: Iterable[User], train_split: str) -> Background:
        """From the histories of users with questions in `train_split` or with none at all, one user at a time."""
        counts: dict[str, Counter[str]] = {}
        num_users: dict[str, Counter[str]] = {}
        totals: Counter[str] = Counter()
        for user in users:
            if not user.teaches(train_split):
                continue
            own: dict[str, Counter[str]] = {}
            for item in user.history:
                own.setdefault(item.task, Counter()).update(item_words(item))
            for task, words in own.items():
                totals[task] += words.total()
                counts.setdefault(task, Counter()).update(words)
                num_users.setdefault(task, Counter()).update(words.keys())
                if len(counts[task]) > _PRUNE_AT:
                    counts[task] = Counter(dict(_commonest(counts[task])))
                    num_users[task] = Counter({word: num_users[task][word] for word in counts[task]})
        for task, held in num_users.items():
            counts[task] = Counter({word: count for word, count in counts[task].items() if held[word] > 1})
        return cls({task: TaskBackground(dict(_commonest(words)), totals[task]) for task, words in counts.items()})

    def write(self, folder: Path) -> None:
        """Commit it to a lane's tokens."""
        tasks = {name: {"total": t.total, "num_items_with": t.num_items_with} for name, t in self.tasks.items()}
        write_json_atomic(folder / BACKGROUND, tasks)

    @classmethod
    def read(cls, folder: Path) -> Background:
        """Raises DataError where there is none."""
        try:
            raw = json.loads((folder / BACKGROUND).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder} holds no {BACKGROUND}: its prompts have no built-in profiles") from None
        return cls({name: TaskBackground(task["num_items_with"], task["total"]) for name, task in raw.items()})


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    """The words that are kept: alphabet decides between equals, so that the order of users does not."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_WORDS]
