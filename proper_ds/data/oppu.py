"""OPPU's processed LaMP files: the 100 most active users held out (split `test`), all others to train the base on.

A user is `{"user_id", "profile": [item ..], "query": [{"id", "input", "gold"} ..]}`. `split_profiles` turns the profile
texts that come with them into a file that a prompt recipe can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proper_ds.data.benchmark_files import Found
from proper_ds.data.problems import BadRecord, Complaint
from proper_ds.data.readers import Complain, declared_task, json_records, made_several
from proper_ds.data.records import RawQuestion
from proper_ds.data.rows import checked_record, history_of, optional_text, text_of
from proper_ds.errors import DataError
from proper_ds.files import write_text_atomic

OTHERS = "user_others.json"
HELD_OUT = ("user_top_100_history.json", "user_more_100_history.json")
"""Of the tweets, the release has the second."""
PROFILES = {OTHERS: "profile_user_others.json"} | dict.fromkeys(HELD_OUT, "profile_user_100.json")
_TASKS = {
    "citation": "LaMP_1",
    "movie_tagging": "LaMP_2M",
    "news_categorize": "LaMP_2N",
    "product_rating": "LaMP_3",
    "news_headline": "LaMP_4",
    "scholarly_title": "LaMP_5",
    "tweet_paraphrase": "LaMP_7",
}


def find(files: list[Path]) -> Found | None:
    """OPPU's files among `files`, or None. The task is the label file's, else that of the folder's name."""
    by_name = {file.name: file for file in files}
    held_out = [by_name[name] for name in HELD_OUT if name in by_name]
    if not held_out:
        return None
    questions = [(file, "test") for file in held_out]
    if OTHERS in by_name:
        questions.insert(0, (by_name[OTHERS], "train"))
    labels = [by_name[name] for name in (f"{file.stem}_label.json" for file in held_out) if name in by_name]
    folder = held_out[0].absolute().parent.name
    declared = (declared_task(labels[0]) if labels else None) or _TASKS.get(folder, "")
    return Found(tuple(questions), declared, tuple((file, "test") for file in labels))


def read(path: Path, split: str, info: dict[str, Any], complain: Complain) -> Iterator[RawQuestion]:
    """The questions of one file; a user's history comes with the first."""
    yield from made_several(json_records(path, "item", complain), _questions, path, split, complain)


def _questions(record: Any, file: str, position: int, split: str) -> Iterator[RawQuestion]:
    record = checked_record(record)
    user = text_of(record, "user_id", "every user needs one")
    profile = history_of(record.get("profile"), "profile")
    queries = history_of(record.get("query"), "query")
    for query in queries:
        key = text_of(query, "id", "every query needs an id")
        asked = text_of(query, "input", "the question's text")
        yield RawQuestion(file, position, key, user, split, asked, profile, gold=optional_text(query, "gold") or None)
        profile = []
    if not queries:
        yield RawQuestion(file, position, "", user, split, "", profile, has_query=False)


def split_profiles(folder: Path, out: Path) -> int:
    """Write the profile texts of a folder's users as JSON lines `{"user", "profile"}`; returns how many.

    OPPU's lists name nobody: the n-th text belongs to the n-th user of the file beside it.

    Raises:
        DataError: where there are no profiles, not as many as users, or records without a user or a text.
    """
    lines: list[str] = []
    for users_name, texts_name in PROFILES.items():
        users_file, texts_file = folder / users_name, folder / texts_name
        if users_file.exists() and texts_file.exists():
            complaints: list[Complaint] = []
            users = _fields(users_file, "user_id", complaints)
            texts = _fields(texts_file, "output", complaints)
            if complaints:
                raise DataError(str(complaints[0]))
            if len(users) != len(texts):
                raise DataError(f"{texts_file} has {len(texts)} texts for the {len(users)} users of {users_file}")
            for user, text in zip(users, texts, strict=True):
                lines.append(json.dumps({"user": user, "profile": text}, ensure_ascii=False) + "\n")
    if not lines:
        raise DataError(f"{folder} holds no {' or '.join(sorted(set(PROFILES.values())))} beside OPPU's users")
    write_text_atomic(out, "".join(lines))
    return len(lines)


def _fields(file: Path, name: str, complaints: list[Complaint]) -> list[str]:
    """One field of every record of a file, as text; complains of those that lack it."""
    found = []
    for position, record in json_records(file, "item", complaints.append):
        try:
            found.append(text_of(checked_record(record), name, "every record of this file needs one"))
        except BadRecord as reason:
            complaints.append(Complaint("bad", str(file), position, "", str(reason)))
    return found
