"""The LaMP tasks as data: how each one's history becomes training pairs, and what is retrieved."""

from __future__ import annotations

import pytest

from proper_ds.data.convert import history_item
from proper_ds.data.instruction import SharedBeginning
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.problems import BadRecord
from proper_ds.data.prompts import history_prompt
from proper_ds.data.tasks import TASKS, candidates, query_text, task_of, with_info
from proper_ds.errors import DataError

ITEMS = {
    "LaMP_1": (
        {"id": "1", "title": "T", "abstract": "A"},
        "A",
        'Write the abstract of the paper with the title "T".',
        "T A",
    ),
    "LaMP_2M": ({"id": "1", "description": "D", "tag": "comedy"}, "comedy", "description: D", ""),
    "LaMP_2N": ({"id": "1", "text": "X", "title": "T", "category": "sports"}, "sports", "article: X", "T X"),
    "LaMP_3": ({"id": "1", "text": "X", "score": 4.0}, "4", "review: X", ""),
    "LaMP_4": ({"id": "1", "text": "X", "title": "T"}, "T", "article: X", "T X"),
    "LaMP_5": ({"id": "1", "title": "T", "abstract": "A"}, "T", "paper: A", "T A"),
    "LaMP_6": ({"id": "1", "text": "X", "title": "T"}, "T", "email: X", ""),
    "LaMP_7": ({"id": "1", "text": "X"}, "X", "tweet:", "X"),
    "LongLaMP_abstract": ({"text": '"T"', "output": "A"}, "A", 'for the title "T"', '"T" A'),
    "LongLaMP_topic": ({"text": "S", "output": "C"}, "C", "reddit post S", "S C"),
    "LongLaMP_review": ({"text": '"5.0" for P', "output": "R"}, "R", 'overall rating of "5.0" for P', '"5.0" for P R'),
    "generic": ({"id": "1", "input": "I", "output": "O"}, "O", "I", ""),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_history_item_becomes_a_pair(name):
    raw, answer, prompt_end, retrieval = ITEMS[name]
    task = TASKS[name]
    item = history_item(task, raw)
    manifest = TaskManifest.of(task, task.instruction, generated=False)
    assert item.answer == answer
    assert history_prompt(manifest, item).endswith(prompt_end)
    assert item.retrieval == retrieval
    assert TaskManifest.from_json(__import__("json").loads(__import__("json").dumps(manifest.__dict__))) == manifest


def test_other_pairs_of_the_same_task():
    cited = history_item(TASKS["LaMP_1"], {"title": "T", "abstract": "A", "citation": "C"})
    assert (cited.answer, cited.prompt) == ("C", 0)
    mail = history_item(TASKS["LaMP_7"], {"text": "polite", "original": "rude"})
    assert (mail.text, mail.answer, mail.prompt) == ("rude", "polite", 0)


@pytest.mark.parametrize(
    ("name", "fields", "hint"),
    [
        ("generic", ["text", "score", "id", "date"], "LaMP_3's fields; give data.task=LaMP_3 (data prepare: --task"),
        ("LaMP_3", ["input", "output"], "generic's fields; give data.task=generic"),
        ("generic", ["text", "title"], "LaMP_4's or LaMP_6's fields; give data.task=LaMP_4 or LaMP_6"),
        ("generic", ["text", "score", "shop"], None),
        ("LaMP_3", ["text"], None),
    ],
)
def test_items_of_another_task_are_known_by_their_fields(name, fields, hint):
    with pytest.raises(BadRecord) as caught:
        TASKS[name].pair_of(dict.fromkeys(fields, "x"))
    assert (hint is None) == ("these are" not in str(caught.value))
    assert hint is None or hint in str(caught.value)


def test_lamp_2_is_told_apart_by_its_fields():
    assert task_of("LaMP_2", frozenset({"tag", "description"}), "x").name == "LaMP_2M"
    assert task_of("LaMP_2", frozenset({"category", "text"}), "x").name == "LaMP_2N"
    with pytest.raises(DataError, match="need `tag`"):
        task_of("LaMP_2", frozenset({"text"}), "x")
    with pytest.raises(DataError, match=r"unknown task 'LaMP_9'; legal are LaMP_1, LaMP_2, LaMP_2M, .*data\.task"):
        task_of("LaMP_9", frozenset(), "x")


@pytest.mark.parametrize("labels", [[], ["a", "a"], "ab", [1]])
def test_bad_labels_are_refused(labels):
    with pytest.raises(DataError, match="labels"):
        with_info(TASKS["LaMP_2N"], {"labels": labels}, "info.json")


def test_rating_labels_must_be_numbers():
    with pytest.raises(DataError, match="must be numbers"):
        with_info(TASKS["LaMP_3"], {"labels": ["good", "bad"]}, "info.json")
    assert with_info(TASKS["LaMP_3"], {"labels": ["0", "10"]}, "info.json").labels == ("0", "10")


def test_labels_make_a_classification_of_open_answers():
    task = with_info(TASKS["generic"], {"labels": ["yes", "no"], "name": "mine"}, "info.json")
    assert (task.kind, task.metrics, task.name) == ("classification", ("accuracy", "f1_macro"), "mine")
    with pytest.raises(BadRecord, match="unknown label"):
        task.checked_answer("maybe")


def test_instruction_is_found_in_the_questions():
    task = TASKS["LaMP_3"]

    def found(*questions):
        beginning = SharedBeginning()
        for question in questions:
            beginning.update(question)
        return beginning.instruction(task)

    assert found("Rate this. review: The one: two", "Rate this. review: The other") == "Rate this. review: "
    assert found("Rate the movie: The A: x", "Rate the movie: The B") == "Rate the movie: "
    assert found("Rate the movie: Only one: here") == task.instruction
    assert found("no marker here", "nothing shared") == task.instruction


def test_retrieval_query_is_the_item():
    question = 'For an author of "X", which? [1]: "One, [2]: of" [2]: "Two"'
    assert candidates(question) == ("One, [2]: of", "Two")
    assert query_text(TASKS["LaMP_1"], question, "") == "One, [2]: of Two"
    assert query_text(TASKS["LaMP_3"], "Rate. review: fine", "Rate. review: ") == "fine"
