"""`data generate`: a population with a known structure, in LaMP's format, to try things out on.

Users belong to latent groups that differ in taste, and deviate from their group; history lengths are heavy-tailed.
It is generated, and says so in its info.json, its task names and every report made from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from proper_ds.errors import DataError
from proper_ds.files import write_json_atomic

CUES = {
    "comedy": ("jokes in every scene", "a clumsy waiter", "witty talk", "a silly wedding"),
    "action": ("a long car chase", "a fight on a train", "a daring escape", "an exploding bridge"),
    "romance": ("two shy lovers", "a kiss in the rain", "letters to a sweetheart", "a summer of love"),
    "fantasy": ("a talking dragon", "an old spell", "a hidden kingdom", "a magic sword"),
    "dystopia": ("a state that watches all", "forbidden books", "a walled city", "the last free radio"),
    "classic": ("black and white pictures", "a famous old cast", "a slow waltz", "a silent opening"),
    "violence": ("a bloody feud", "a cruel gang", "a brutal prison", "a knife in the dark"),
    "true story": ("events of the year 1969", "the real diary", "a court case that happened", "news reels"),
}
TAGS = tuple(CUES)
HEROES = (
    "a sailor",
    "a doctor",
    "two sisters",
    "a teacher",
    "an old farmer",
    "a young clerk",
    "three friends",
    "a cook",
)
PLACES = (
    "in a harbour town",
    "in the mountains",
    "on an island",
    "in a big city",
    "by the river",
    "in a small village",
)

ASPECTS = ("story", "acting", "music", "pictures", "pace", "ending")
PRAISE = ("superb", "lovely", "strong", "a delight")
BLAME = ("dull", "weak", "a mess", "awful")

TRUTH = "groups.json"
"""Beside a task's data: which group each user is of. Only the report reads it (evaluation/grouping.py)."""
NUM_MENTIONED = 3
NOISE = 0.05
COLD_SHARE = 0.03
TRAIN_SHARE = 0.5
LONGEST = 100

TAG_INSTRUCTION = (
    f"Which tag does this movie relate to? Just answer with the tag name. tags: [{', '.join(TAGS)}] description: "
)
RATING_INSTRUCTION = "What is the score of the following review on a scale of 1 to 5? review: "


@dataclass(frozen=True)
class Taste:
    """What one group or user likes.

    Attributes:
        rank: for each tag its place in the taste's order: of two tags that fit, the lower place wins.
        weight: for each aspect how much it moves the score.
        bias: added to every score.
    """

    rank: np.ndarray
    weight: np.ndarray
    bias: float


def group_taste(generator: np.random.Generator) -> Taste:
    """A group's own order of tags, one aspect that matters most, and a mild or harsh manner."""
    weight = np.full(len(ASPECTS), 0.6)
    weight[generator.integers(len(ASPECTS))] += 0.8
    return Taste(generator.permutation(len(TAGS)).astype(float), weight, float(generator.uniform(-1.2, 1.2)))


def user_taste(group: Taste, generator: np.random.Generator) -> Taste:
    """A user's deviation from the group: some tags change places, one aspect gains weight, a manner of one's own."""
    rank = group.rank + generator.normal(0, 1.0, len(TAGS))
    weight = group.weight.copy()
    weight[generator.integers(len(ASPECTS))] += 0.4
    return Taste(rank, weight, group.bias + float(generator.normal(0, 0.6)))


def _tag_item(taste: Taste, generator: np.random.Generator) -> tuple[str, str]:
    first, second = generator.choice(len(TAGS), size=2, replace=False)
    cues = [CUES[TAGS[tag]][generator.integers(4)] for tag in (first, second)]
    who = f"{HEROES[generator.integers(8)]} {PLACES[generator.integers(6)]}"
    text = f"{who}. Some see {cues[0]} and say {TAGS[first]}, some see {cues[1]} and say {TAGS[second]}."
    chosen = first if taste.rank[first] < taste.rank[second] else second
    if generator.random() < NOISE:
        chosen = second if chosen == first else first
    return text[0].upper() + text[1:], TAGS[chosen]


def _rating_item(taste: Taste, generator: np.random.Generator) -> tuple[str, str]:
    aspects = generator.choice(len(ASPECTS), size=NUM_MENTIONED, replace=False)
    moods = generator.choice([-1, 1], size=NUM_MENTIONED)
    words = [(PRAISE if mood > 0 else BLAME)[generator.integers(4)] for mood in moods]
    verdicts = ["Good" if mood > 0 else "Bad" for mood in moods]
    text = " ".join(f"{v} {ASPECTS[a]}: it was {w}." for a, w, v in zip(aspects, words, verdicts, strict=True))
    score = 3 + taste.bias + float((taste.weight[aspects] * moods).sum()) + float(generator.normal(0, 0.2))
    return text, str(int(np.clip(round(score), 1, 5)))


@dataclass(frozen=True)
class GeneratedTask:
    """One of the generated tasks."""

    name: str
    lamp_id: str
    instruction: str
    text_field: str
    answer_field: str
    labels: tuple[str, ...]
    make: Callable[[Taste, np.random.Generator], tuple[str, str]]


GENERATED = (
    GeneratedTask("generated_tags", "LaMP_2", TAG_INSTRUCTION, "description", "tag", TAGS, _tag_item),
    GeneratedTask(
        "generated_ratings", "LaMP_3", RATING_INSTRUCTION, "text", "score", ("1", "2", "3", "4", "5"), _rating_item
    ),
)


def _history_length(generator: np.random.Generator) -> int:
    """Pareto with index 1.2 from 2 up, cut at LONGEST."""
    return min(LONGEST, int(2 * (1 - generator.random()) ** (-1 / 1.2)))


def _user_records(
    task: GeneratedTask, taste: Taste, key: str, num_history: int, generator: np.random.Generator
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(questions, golds) of one user: the newest third of the items is asked for, at least 2 and at most 8."""
    num_questions = min(8, max(2, num_history // 2))
    seen: set[str] = set()
    items: list[tuple[str, str]] = []
    while len(items) < num_history + num_questions:
        text, answer = task.make(taste, generator)
        if text not in seen:
            seen.add(text)
            items.append((text, answer))
    profile = [
        {
            "id": f"{key}-{n}",
            task.text_field: text,
            task.answer_field: answer,
            "date": f"{2000 + n // 365}-{n % 365:03d}",
        }
        for n, (text, answer) in enumerate(items[:num_history])
    ]
    questions, golds = [], []
    for n, (text, answer) in enumerate(items[num_history:]):
        name = f"{key}-q{n}"
        questions.append({"id": name, "user_id": key, "input": task.instruction + text, "profile": profile})
        golds.append({"id": name, "output": answer})
    return questions, golds


class _JsonList:
    """Writes a JSON list element by element."""

    def __init__(self, file: IO[str], before: str, after: str) -> None:
        self._file, self._after, self._first = file, after, True
        file.write(before)

    def add(self, value: Any) -> None:
        self._file.write(("" if self._first else ",\n") + json.dumps(value))
        self._first = False

    def end(self) -> None:
        self._file.write(self._after)


def generate(num_users: int, num_groups: int, seed: int, out: Path) -> Iterator[tuple[int, int]]:
    """Write the generated population below `out`, one folder a task; yields (users done, users in all).

    Raises:
        DataError: for numbers that make no population.
    """
    if num_users < 4 or num_groups < 1 or num_groups > num_users:
        raise DataError(
            f"given {num_users} users and {num_groups} groups; use 4 users or more, and 1 to that many groups"
        )
    groups = [group_taste(np.random.default_rng([seed, 1, g])) for g in range(num_groups)]
    num_train = max(2, round(num_users * TRAIN_SHARE))
    with ExitStack() as stack:
        lists: dict[tuple[str, str, str], _JsonList] = {}
        for task in GENERATED:
            folder = out / task.name
            folder.mkdir(parents=True, exist_ok=True)
            for split in ("train", "dev"):
                for kind, before, after in (
                    ("questions", "[\n", "\n]\n"),
                    ("outputs", f'{{"task": "{task.lamp_id}", "golds": [\n', "\n]}\n"),
                ):
                    file = stack.enter_context((folder / f"{split}_{kind}.json").open("w", encoding="utf-8"))
                    lists[task.name, split, kind] = _JsonList(file, before, after)
            truth = stack.enter_context((folder / TRUTH).open("w", encoding="utf-8"))
            lists[task.name, "", TRUTH] = _JsonList(truth, "[\n", "\n]\n")
        for user in range(num_users):
            generator = np.random.default_rng([seed, 2, user])
            taste = user_taste(groups[user % num_groups], generator)
            split = "train" if user < num_train else "dev"
            cold = generator.random() < COLD_SHARE
            for task in GENERATED:
                length = 0 if cold else _history_length(generator)
                key = f"g{user:07d}"
                lists[task.name, "", TRUTH].add([key, user % num_groups])
                questions, golds = _user_records(task, taste, key, length, generator)
                for question, gold in zip(questions, golds, strict=True):
                    lists[task.name, split, "questions"].add(question)
                    lists[task.name, split, "outputs"].add(gold)
            yield user + 1, num_users
        for written in lists.values():
            written.end()
    for task in GENERATED:
        about = {
            "name": task.name,
            "task": task.lamp_id,
            "labels": list(task.labels),
            "generated": True,
            "num_users": num_users,
            "num_groups": num_groups,
            "group_of_user": "number in the user_id modulo num_groups",
            "seed": seed,
        }
        write_json_atomic(out / task.name / "info.json", about)
