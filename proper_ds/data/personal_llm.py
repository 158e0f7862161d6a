"""PersonalLLM's rows: a simulated person's prompts, and which of two answers was preferred; these are taught.

A row has `person_id`, `prompt_1`, `response_1_a`, `response_1_b`, `chosen_1`, `prompt_2` .., and how many there are as
`length` or `user_history_length`. `chosen_1` is `a` or `b`, or the preferred answer itself. Rows of the evaluation set
end in a `test_prompt`; of others the last quarter of the prompts are questions (at least one, at most four).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proper_ds.data.benchmark_files import Found, columns_of, row_files, rows_of
from proper_ds.data.files import stem_of
from proper_ds.data.problems import BadRecord
from proper_ds.data.readers import Complain, made_several
from proper_ds.data.records import RawQuestion
from proper_ds.data.rows import checked_record, optional_text, text_of

MAX_QUESTIONS = 4


def find(files: list[Path]) -> Found | None:
    """The rows among `files`, or None."""
    questions = [(file, split) for file, split in row_files(files) if columns_of(file) >= {"prompt_1", "chosen_1"}]
    return Found(tuple(questions), "generic", info={"name": "personal_llm"}) if questions else None


def read(path: Path, split: str, info: dict[str, Any], complain: Complain) -> Iterator[RawQuestion]:
    """The questions of one file; a person's history comes with the first."""
    yield from made_several(rows_of(path, complain), _questions, path, split, complain)


def _questions(row: Any, file: str, position: int, split: str) -> Iterator[RawQuestion]:
    row = checked_record(row)
    stem = stem_of(Path(file))
    person = optional_text(row, "person_id") or f"{stem}-{position}"
    pairs = _pairs(row)
    if optional_text(row, "test_prompt"):
        asked: list[tuple[str, str | None]] = [
            (text_of(row, "test_prompt", ""), optional_text(row, "best_response") or None)
        ]
    else:
        num_asked = min(MAX_QUESTIONS, max(1, len(pairs) // 4))
        asked = list(pairs[-num_asked:])
        pairs = pairs[:-num_asked]
    profile = [{"id": str(n), "input": prompt, "output": answer} for n, (prompt, answer) in enumerate(pairs, start=1)]
    for number, (prompt, answer) in enumerate(asked, start=1):
        yield RawQuestion(file, position, f"{stem}-{position}-{number}", person, split, prompt, profile, gold=answer)
        profile = []


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = optional_text(row, "length", "user_history_length")
    num_pairs = int(float(given)) if given else sum(key.startswith("chosen_") and bool(row[key]) for key in row)
    found = []
    for number in range(1, num_pairs + 1):
        prompt = text_of(row, f"prompt_{number}", "the person's prompt")
        chosen = text_of(row, f"chosen_{number}", "the preferred answer, or which of two it is")
        if chosen in ("a", "b"):
            chosen = text_of(row, f"response_{number}_{chosen}", "the preferred answer")
        found.append((prompt, chosen))
    if not found:
        raise BadRecord("no prompts")
    return found
