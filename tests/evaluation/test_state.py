"""What must be kept of a user to answer: no more than a method looks at, averaged over users with history."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from proper_ds.data.background import Background
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.evaluation.kept_texts import floor_bytes
from proper_ds.evaluation.methods import METHODS
from proper_ds.evaluation.state import bytes_per_user
from proper_ds.run_folder import RunFolder, in_lane
from tests.fakes import write_json


@dataclass
class Context:
    """As much of a RunContext as methods without adapters ask for."""

    prepared: PreparedData
    folder: RunFolder
    lane: str = ""
    hidden_size: int = 16
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(plora=SimpleNamespace(user_vector_size=8)))

    def stage(self, name):
        """See RunContext."""
        return self.folder.stage(in_lane(name, self.lane))


@pytest.fixture
def context(tmp_path):
    """Two users with six history items of ten bytes each, and one without any."""
    items = [{"input": f"rain {n}", "output": "long"} for n in range(6)]
    rows = [{"user": user, "history": items, "query": "asked?", "answer": "x"} for user in "ab"]
    rows += [{"user": "cold", "history": [], "query": "asked?", "answer": "x"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(DataConfig(path=str(tmp_path)), tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    found = Context(prepared, RunFolder(tmp_path / "run"))
    pag = found.folder.stage(in_lane("tokens", METHODS["PAG"].lane)).path
    pag.mkdir(parents=True)
    Background.count(prepared.users(), "train").write(pag)
    return found


def test_without_adapters(context):
    assert bytes_per_user(context, METHODS["base"]) == 0
    assert bytes_per_user(context, METHODS["population"]) == 0
    assert bytes_per_user(context, METHODS["PLoRA"]) == 32
    assert bytes_per_user(context, METHODS["merged"]) == 128


def test_texts_are_kept_where_they_are_looked_at(context):
    """Averaged over the two users who have any."""
    assert bytes_per_user(context, METHODS["RAG"]) == bytes_per_user(context, METHODS["RAG-random"]) == 60
    assert bytes_per_user(context, METHODS["RAG-recent"]) == 40, "the four newest"
    assert bytes_per_user(context, METHODS["PAG"]) == len("About this person: answers of about 1 words.")


def test_profiles_of_a_file_count_as_they_are(context, tmp_path):
    path = Path(tmp_path / "profiles.json")
    write_json(path, {"a": "likes rain", "b": "likes snow", "cold": "?"})
    recipe = METHODS["PAG"].recipe.model_copy(update={"profile": "file", "profile_file": str(path)})
    method = METHODS["PAG"].__class__("mine", "", recipe=recipe)
    assert bytes_per_user(context, method) == 10


@pytest.mark.parametrize(
    ("task", "item", "wanted"),
    [
        ("LaMP_3", {"text": "a review", "score": "4"}, {"own-habit": 20, "words+own": 8}),
        ("LaMP_2N", {"text": "some news", "title": "t", "category": "sports"}, {"own-habit": 60, "words+own": 60}),
        ("LaMP_4", {"text": "an article", "title": "headline"}, {"own-habit": 4, "words+own": 8}),
        ("LaMP_1", {"title": "ten bytes!", "abstract": "many more"}, {"own-habit": 10, "words+own": 10}),
    ],
)
def test_floors_keep_numbers_and_titles(lamp_folder, tmp_path, task, item, wanted):
    asked = 'the title "x", which reference? [1]: "y" [2]: "z"'
    questions = [{"id": "1", "user_id": "u", "input": asked, "profile": [{"id": "p", **item}]}]
    folder = lamp_folder(questions, None, "test", "LaMP_3")
    prepare(DataConfig(path=str(folder), task=task), tmp_path / "out")
    prepared = PreparedData(tmp_path / "out")
    assert {method: floor_bytes(prepared, method) for method in wanted} == wanted
    assert floor_bytes(prepared, "words") == 0
