"""Changes to a generated population's files, as a new day would bring them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FOLDERS = ("generated_tags", "generated_ratings")


def _rewrite(path: Path, change) -> None:
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(records)), encoding="utf-8")


def lengthen(data: Path, users: Sequence[str]) -> None:
    """Give users one more item of history each, in both tasks."""

    def change(records):
        for record in records:
            if record["user_id"] in users and record["profile"]:
                newest = dict(record["profile"][-1])
                newest |= {"id": f"{record['user_id']}-new", "date": "2001-001"}
                record["profile"].append(newest)
        return records

    for path in (data / name / f"{split}_questions.json" for name in FOLDERS for split in ("train", "dev")):
        _rewrite(path, change)


def add_user(data: Path, like: str, key: str) -> None:
    """Put a new user before everybody else, with the history of another one, and without questions to learn from."""
    for name in FOLDERS:
        questions = json.loads((data / name / "dev_questions.json").read_text(encoding="utf-8"))
        golds = json.loads((data / name / "dev_outputs.json").read_text(encoding="utf-8"))
        found = next(record for record in questions if record["user_id"] == like)
        answer = next(gold for gold in golds["golds"] if gold["id"] == found["id"])
        questions.insert(0, found | {"id": f"{key}-q", "user_id": key})
        golds["golds"].append(answer | {"id": f"{key}-q"})
        (data / name / "dev_questions.json").write_text(json.dumps(questions), encoding="utf-8")
        (data / name / "dev_outputs.json").write_text(json.dumps(golds), encoding="utf-8")
