"""LongLaMP's rows as its public data set has them (abstracts, Reddit posts, reviews; by user or by time).

A row is a question: `input`, `output`, a `profile`, and its author under a name that differs by task. History items
have no question of their own; they get the wording of the task's questions. E-mail completion is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.data.benchmark_files import Found, columns_of, row_files, rows_of
from proper_ds.data.files import stem_of
from proper_ds.data.readers import Complain, made
from proper_ds.data.records import RawQuestion
from proper_ds.data.rows import checked_record, history_of, optional_text, text_of

_COLUMNS = frozenset({"input", "output", "profile"})


@dataclass(frozen=True)
class _Form:
    """One task's rows.

    Attributes:
        text: of a profile item, what follows the task's instruction in a question.
        output: the profile field that is answered.
    """

    task: str
    text: Callable[[Mapping[str, Any]], str]
    output: str


def _rated(item: Mapping[str, Any]) -> str:
    rating, product, summary = (item.get(key, "") for key in ("overall", "description", "summary"))
    return f'"{rating}" for a product with description "{product}". The summary of the review text is "{summary}".'


_FORMS = {  # by the column that names the author
    "name": _Form("LongLaMP_abstract", lambda item: f'"{item.get("title", "")}"', "abstract"),
    "author": _Form("LongLaMP_topic", lambda item: str(item.get("summary", "")), "content"),
    "reviewerId": _Form("LongLaMP_review", _rated, "reviewText"),
}


def find(files: list[Path]) -> Found | None:
    """The rows among `files`, or None."""
    questions = []
    forms: set[str] = set()
    for file, split in row_files(files):
        columns = columns_of(file)
        authors = _FORMS.keys() & columns
        if columns >= _COLUMNS and len(authors) == 1:
            questions.append((file, split))
            forms |= authors
    return Found(tuple(questions), _FORMS[forms.pop()].task) if len(forms) == 1 else None


def read(path: Path, split: str, info: dict[str, Any], complain: Complain) -> Iterator[RawQuestion]:
    """The questions of one file."""
    yield from made(rows_of(path, complain), _question, path, split, complain)


def _question(row: Any, file: str, position: int, split: str) -> RawQuestion:
    row = checked_record(row)
    column = next((name for name in _FORMS if row.get(name) is not None), "name")
    form = _FORMS[column]
    items = [_item(form, item) for item in history_of(row.get("profile"), "profile")]
    return RawQuestion(
        file,
        position,
        optional_text(row, "id") or f"{stem_of(Path(file))}-{position}",
        text_of(row, column, "the author of the question"),
        split,
        text_of(row, "input", "the question's text"),
        items,
        gold=text_of(row, "output", "the gold answer"),
    )


def _item(form: _Form, item: Mapping[str, Any]) -> dict[str, Any]:
    made_of = {"id": item.get("id"), "text": form.text(item), "date": item.get("year")}
    return made_of | ({"output": item[form.output]} if item.get(form.output) else {})
