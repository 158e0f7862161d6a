"""The LaMP tasks as data: wording, how a history item becomes a training pair, labels, metrics, retrieval text.

Facts from LaMP (github LaMP-Benchmark/LaMP at 38c9d4d: prompts.py, eval/evaluation.py) and OPPU
(github TamSiuhin/OPPU at 9fb3f46: prompt/prompt.json). Readers, the leak guard and the metrics ask here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from proper_ds.data.problems import GIVE_TASK, BadRecord
from proper_ds.errors import DataError

Kind = Literal["classification", "ordinal", "generation"]


@dataclass(frozen=True)
class Pair:
    """How a history item becomes a training pair: `prompt` with the item's `text` field in place of `{}`.

    Attributes:
        text: the field that fills `{}`; None for a prompt without one.
        instruction: put the instruction found in the questions before it, so that training and question look alike.
    """

    answer: str
    text: str | None
    prompt: str = "{}"
    instruction: bool = True

    @property
    def fields(self) -> frozenset[str]:
        """The fields that an item needs for this pair."""
        return frozenset([self.answer] if self.text is None else [self.answer, self.text])

    def fits(self, item: Mapping[str, Any]) -> bool:
        """Whether the item has the fields that this pair needs."""
        return self.fields <= item.keys()


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what it is called in reports: the data set's own name, else the LaMP id.
        lamp_id: the id in LaMP's output files.
        instruction: LaMP's wording up to the item's text.
        marker: the words that end the instruction in a question.
        pairs: ways to train on a history item; the first that fits is taken.
        labels: the closed label set, or None.
        retrieval_fields: fields of a history item that are searched, joined by spaces.
        max_new_tokens: for generated answers.
        form: the name it has in TASKS, whatever a data set calls it.
    """

    name: str
    lamp_id: str
    kind: Kind
    instruction: str
    marker: str
    pairs: tuple[Pair, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    retrieval_fields: tuple[str, ...] = ("text",)
    max_new_tokens: int = 64
    form: str = ""

    def pair_of(self, item: Mapping[str, Any]) -> int:
        """Index of the pair that fits a raw history item. Raises BadRecord when none does."""
        for index, pair in enumerate(self.pairs):
            if pair.fits(item):
                return index
        wanted = " or ".join("+".join(f for f in (p.text, p.answer) if f) for p in self.pairs)
        raise BadRecord(f"history item has fields {sorted(item)}, but {self.name} needs {wanted}{_whose(item)}")

    def checked_answer(self, answer: str) -> str:
        """The answer, stripped; raises BadRecord when it is empty or not one of the labels."""
        answer = answer.strip()
        if not answer:
            raise BadRecord("the answer is empty")
        if self.labels is None or answer in self.labels:
            return answer
        if self.kind == "ordinal":
            raise BadRecord(f"score {answer!r} is out of range: legal are {', '.join(self.labels)}")
        shown = ", ".join(self.labels[:25]) + (" ..." if len(self.labels) > 25 else "")
        raise BadRecord(f"unknown label {answer!r}: legal are {shown}")


TAGS_2M = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
CATEGORIES_2N = (
    "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
    "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
    "healthy living",
)  # fmt: skip
SCORES = ("1", "2", "3", "4", "5")
CHOICES = ("[1]", "[2]")
CITED = "citation"
"""The field of a LaMP-1 history item that names a paper which it cites; only OPPU's data has it."""
_CLASS = ("accuracy", "f1_macro")
_ROUGE = ("rouge-1", "rouge-L")
_LONG = ("rouge-1", "rouge-L", "meteor-stem")

TASKS = {
    task.name: replace(task, form=task.name)
    for task in (
        Task(
            "LaMP_1", "LaMP_1", "classification",
            'For an author who has written the paper with the title "', "with the title ",
            (
                # A history item has no candidates to choose from. OPPU's data names a cited paper; without one,
                # LaMP's own per-user baseline learns to write the abstract for the title.
                Pair(CITED, "title", 'paper title: "{}" reference:', instruction=False),
                Pair("abstract", "title", 'Write the abstract of the paper with the title "{}".', instruction=False),
            ),
            _CLASS, CHOICES, ("title", "abstract"), 4,
        ),
        Task(
            "LaMP_2M", "LaMP_2", "classification",
            "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
            f"further explanation. tags: [{', '.join(TAGS_2M)}] description: ", "description: ",
            (Pair("tag", "description"),), _CLASS, TAGS_2M, ("description",), 10,
        ),
        Task(
            "LaMP_2N", "LaMP_2", "classification",
            "Which category does this article relate to among the following categories? Just answer with the "
            f"category name without further explanation. categories: [{', '.join(CATEGORIES_2N)}] article: ",
            "article: ",
            (Pair("category", "text"),), _CLASS, CATEGORIES_2N, ("title", "text"), 10,
        ),
        Task(
            "LaMP_3", "LaMP_3", "ordinal",
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
            "without further explanation. review: ", "review: ",
            (Pair("score", "text"),), ("mae", "rmse"), SCORES, ("text",), 4,
        ),
        Task(
            "LaMP_4", "LaMP_4", "generation", "Generate a headline for the following article: ", "article: ",
            (Pair("title", "text"),), _ROUGE, None, ("title", "text"), 48,
        ),
        Task(
            "LaMP_5", "LaMP_5", "generation", "Generate a title for the following abstract of a paper: ", "paper: ",
            (Pair("title", "abstract"),), _ROUGE, None, ("title", "abstract"), 64,
        ),
        Task(
            "LaMP_6", "LaMP_6", "generation", "Generate a subject for the following email: ", "email: ",
            (Pair("title", "text"),), _ROUGE, None, ("text",), 48,
        ),
        Task(
            "LaMP_7", "LaMP_7", "generation",
            "Paraphrase the following tweet without any explanation before or after it: ", "after it: ",
            # LaMP's own items hold the person's text alone: OPPU then learns to write it from nothing.
            (Pair("text", "original"), Pair("text", None, "tweet:", instruction=False)),
            _ROUGE, None, ("text",), 96,
        ),
        # LongLaMP: `longlamp.py` makes `text` and `output` of a history item, in the wording of the questions.
        Task(
            "LongLaMP_abstract", "LongLaMP_abstract", "generation",
            "Generate an abstract for the title ", "for the title ",
            (Pair("output", "text"),), _LONG, None, ("text", "output"), 400,
        ),
        Task(
            "LongLaMP_topic", "LongLaMP_topic", "generation",
            "Generate the content for a reddit post ", "reddit post ",
            (Pair("output", "text"),), _LONG, None, ("text", "output"), 512,
        ),
        Task(
            "LongLaMP_review", "LongLaMP_review", "generation",
            "Generate the review text written by a reviewer who has a given an overall rating of ",
            "overall rating of ",
            (Pair("output", "text"),), _LONG, None, ("text", "output"), 512,
        ),
        Task(
            "generic", "generic", "generation", "", "", (Pair("output", "input"),), _ROUGE, None, ("input",), 96,
        ),
    )
}  # fmt: skip


LEGAL_NAMES = tuple(dict.fromkeys(name for task in TASKS.values() for name in (task.lamp_id, task.name)))
"""What a task may be called: as in TASKS, and `LaMP_2`, by which LaMP's files mean two tasks."""


def _whose(item: Mapping[str, Any]) -> str:
    """A hint at the tasks whose history items have exactly these fields; "" where there are none.

    A single field says nothing: an item of most tasks that lacks its answer looks like one of LaMP-7. LongLaMP's items
    have other fields in its files than here.
    """
    fields = item.keys() - {"id", "date", "time"}
    names = [
        task.name
        for task in TASKS.values()
        if not task.name.startswith("LongLaMP")
        and any(len(pair.fields) > 1 and pair.fields <= fields <= _known_fields(task, pair) for pair in task.pairs)
    ]
    if not names:
        return ""
    whose, legal = " or ".join(f"{name}'s" for name in names), " or ".join(names)
    return f"; these are {whose} fields; {GIVE_TASK}{legal} (data prepare: --task {legal})"


def _known_fields(task: Task, pair: Pair) -> frozenset[str]:
    return pair.fields.union(task.retrieval_fields)


def task_of(declared: str, profile_fields: frozenset[str], where: str) -> Task:
    """The task that a data set declares, told apart by its profile's fields where LaMP reuses an id.

    Raises:
        DataError: for an unknown id, or a `LaMP_2` whose items have neither `tag` nor `category`.
    """
    if declared in TASKS:
        return TASKS[declared]
    if declared == "LaMP_2":
        if "category" in profile_fields:
            return TASKS["LaMP_2N"]
        if "tag" in profile_fields or not profile_fields:
            return TASKS["LaMP_2M"]
        fields = ", ".join(sorted(profile_fields))
        raise DataError(f"{where}: LaMP_2 items need `tag` (movies) or `category` (news); found fields {fields}")
    legal = ", ".join(LEGAL_NAMES)
    mend = "Set it with data.task (data prepare: --task), or as `task` in info.json."
    raise DataError(f"{where}: unknown task {declared!r}; legal are {legal}. {mend}")


def with_info(task: Task, info: Mapping[str, Any], where: str) -> Task:
    """The task with what a data set's own info.json says of it: `name`, `labels`, `instruction`.

    Raises:
        DataError: for labels that are empty, repeated or not text.
    """
    changes: dict[str, Any] = {}
    if "name" in info:
        changes["name"] = str(info["name"])
    if "instruction" in info:
        changes["instruction"] = str(info["instruction"])
    if info.get("labels") is not None:
        labels = info["labels"]
        if not isinstance(labels, list) or not labels or not all(isinstance(x, str) and x.strip() for x in labels):
            raise DataError(f"{where}: `labels` must be a list of texts, given {labels!r}")
        if len(set(labels)) != len(labels):
            raise DataError(f"{where}: `labels` repeats {sorted({x for x in labels if labels.count(x) > 1})}")
        changes["labels"] = tuple(label.strip() for label in labels)
        if task.kind == "generation":
            changes |= {"kind": "classification", "metrics": _CLASS, "max_new_tokens": 10}
        if task.kind == "ordinal" and not all(re.fullmatch(r"-?\d+(\.\d+)?", x) for x in changes["labels"]):
            raise DataError(f"{where}: the labels of a rating task must be numbers, given {labels!r}")
    return replace(task, **changes)


def candidates(question: str) -> tuple[str, str] | None:
    """The two candidate titles of a LaMP-1 question, or None."""
    found = re.search(r'\[1\]: "(.*)" \[2\]: "(.*)"\s*$', question, flags=re.DOTALL)
    return (found.group(1), found.group(2)) if found else None


def asked_title(question: str) -> str:
    """The title that a LaMP-1 question asks about, or ""."""
    found = re.search(r'with the title "(.*)", which reference', question, flags=re.DOTALL)
    return found.group(1) if found else ""


def query_text(task: Task, question: str, instruction: str) -> str:
    """The part of a question that is about this item: for leak checks and retrieval (LaMP's prompts.py)."""
    if task.lamp_id == "LaMP_1":
        pair = candidates(question)
        return " ".join(pair) if pair else question
    if question.startswith(instruction):
        return question.removeprefix(instruction)
    return question.partition(task.marker)[2] if task.marker and task.marker in question else question
