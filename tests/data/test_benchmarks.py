"""Other benchmarks' published files, hand-made in small: they come in as users with histories and questions."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.data.config import DataConfig
from proper_ds.data.oppu import split_profiles
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import history_prompt
from proper_ds.data.protocols import hold_out_most_active
from proper_ds.errors import DataError
from tests.fakes import write_json


def run(path, out, **config):
    prepare(DataConfig(path=str(path), **config), out)
    return PreparedData(out)


def rating(n):
    return {"id": f"i{n}", "text": f"review {n}", "score": "4", "date": f"2020-01-0{n}"}


def oppu_user(name, ids, num_items):
    asked = [{"id": key, "input": f"on a scale of 1 to 5? review: text {key}", "gold": "3"} for key in ids]
    return {"user_id": name, "profile": [rating(n) for n in range(1, num_items + 1)], "query": asked}


def oppu_folder(folder, held_out="user_top_100_history"):
    write_json(folder / "user_others.json", [oppu_user(7, ["1"], 2), oppu_user(8, [], 1)])
    write_json(folder / f"{held_out}.json", [oppu_user(9, ["2", "3"], 5)])
    golds = [{"id": key, "output": "5"} for key in "23"]
    write_json(folder / f"{held_out}_label.json", {"task": "LaMP_3", "golds": golds})
    write_json(folder / "profile_user_100.json", [{"output": "likes films"}])
    write_json(folder / "profile_user_others.json", [{"output": "a"}, {"output": "b"}])
    return folder


@pytest.mark.parametrize("held_out", ["user_top_100_history", "user_more_100_history"])
def test_oppu(tmp_path, held_out):
    data = run(oppu_folder(tmp_path / "tweet_paraphrase", held_out), tmp_path / "out")
    users = {user.key: user for user in data.users()}
    assert {key: len(user.history) for key, user in users.items()} == {"7": 2, "8": 1, "9": 5}
    assert [(q.id, q.split, q.answer) for q in users["9"].queries] == [("2", "test", "5"), ("3", "test", "5")]
    assert [(q.split, q.answer) for q in users["7"].queries] == [("train", "3")]
    assert data.manifest.tasks["LaMP_3"].lamp_id == "LaMP_3"


def test_oppus_profile_texts_get_their_users_names(tmp_path):
    folder = oppu_folder(tmp_path / "product_rating")
    assert split_profiles(folder, tmp_path / "profiles.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "profiles.jsonl").open()]
    assert {row["user"]: row["profile"] for row in rows} == {"7": "a", "8": "b", "9": "likes films"}
    write_json(folder / "profile_user_100.json", [])
    with pytest.raises(DataError, match="0 texts for the 1 users"):
        split_profiles(folder, tmp_path / "profiles.jsonl")
    write_json(folder / "profile_user_100.json", [{"text": "likes films"}])
    with pytest.raises(DataError, match=r"profile_user_100.json, record 1: `output` is missing"):
        split_profiles(folder, tmp_path / "profiles.jsonl")


def test_oppus_protocol_holds_out_the_most_active(tmp_path):
    rows = [
        {
            "user": f"u{n}",
            "history": [{"input": f"{n} {k}", "output": "x"} for k in range(n)],
            "query": "q",
            "answer": "a",
        }
        for n in (3, 1, 5, 2)
    ]
    rows.append({"user": "silent", "history": [{"input": "s", "output": "x"}] * 9, "query": "q"})
    for split, part in (("train", rows[:2]), ("dev", rows[2:])):
        path = tmp_path / "in" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, part)))
    data = run(tmp_path / "in", tmp_path / "prepared")
    manifest, shortest = hold_out_most_active(data, tmp_path / "out", 2)
    again = PreparedData(tmp_path / "out")
    found = {user.key: ([query.split for query in user.queries], len(user.history)) for user in again.users()}
    assert found == {
        "u3": (["test"], 3),
        "u1": (["train"], 1),
        "u5": (["test"], 5),
        "u2": (["train"], 2),
        "silent": ([], 9),
    }
    assert (shortest, manifest.splits["test"]["num_users"]) == (3, 2)
    assert again.manifest == manifest and again.keys() == data.keys()
    asked = ["data", "oppu-split", tmp_path / "prepared", "--top", 1, "--out", tmp_path / "third"]
    assert "held out: 1 users with 5 or more" in CliRunner().invoke(app, list(map(str, asked))).output
    with pytest.raises(DataError, match="has 4 users with answered questions: too few to hold 4 out"):
        hold_out_most_active(data, tmp_path / "other", 4)


LONGLAMP = {
    "LongLaMP_abstract": (
        "name",
        {"id": "p", "title": "On X", "abstract": "We study x.", "year": 2019},
        'Generate an abstract for the title "On Y" using the following items: 1. y',
        'Generate an abstract for the title "On X"',
        "We study x.",
    ),
    "LongLaMP_topic": (
        "author",
        {"id": "p", "summary": "a cat", "content": "There is a cat.", "author": "ann"},
        "Generate the content for a reddit post a dog",
        "Generate the content for a reddit post a cat",
        "There is a cat.",
    ),
    "LongLaMP_review": (
        "reviewerId",
        {"overall": "5.0", "description": "A pan", "summary": "good", "reviewText": "It is a good pan."},
        'Generate the review text written by a reviewer who has a given an overall rating of "1.0" for a product with'
        ' description "A pot". The summary of the review text is "bad".',
        'Generate the review text written by a reviewer who has a given an overall rating of "5.0" for a product with'
        ' description "A pan". The summary of the review text is "good".',
        "It is a good pan.",
    ),
}


@pytest.mark.parametrize("task", LONGLAMP)
@pytest.mark.parametrize("container", ["parquet", "jsonl", "json.gz"])
def test_longlamp(tmp_path, task, container):
    author, item, question, prompt, answer = LONGLAMP[task]
    folder = tmp_path / "in"
    folder.mkdir()
    for split, user in (("train", "ann"), ("val", "bob"), ("test", "cas")):
        row = {author: user, "input": question, "output": f"answer of {user}", "profile": [item]}
        path = folder / f"{split}-00000-of-00001.{container}"
        if container == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        elif container == "jsonl":
            path.write_text(json.dumps(row) + "\n")
        else:
            path.write_bytes(gzip.compress(json.dumps([row]).encode()))
    data = run(folder, tmp_path / "out")
    assert {u.key: (u.queries[0].split, u.queries[0].answer) for u in data.users()} == {
        "ann": ("train", "answer of ann"),
        "bob": ("dev", "answer of bob"),
        "cas": ("test", "answer of cas"),
    }
    manifest = data.manifest.tasks[task]
    first = next(data.users()).history[0]
    assert (history_prompt(manifest, first), first.answer) == (prompt, answer)
    assert manifest.metrics == ("rouge-1", "rouge-L", "meteor-stem")


def test_longlamp_items_without_an_answer_are_bad_records(tmp_path):
    row = {
        "author": "ann",
        "input": "Generate the content for a reddit post x",
        "output": "y",
        "profile": [{"summary": "s"}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="history item 1"):
        run(tmp_path / "train.jsonl", tmp_path / "out")


def sample(text, *labels):
    return {"text": text, "label": list(labels)}


def test_peft_u(tmp_path):
    data = {
        "3": {"train": {"t1": sample("good day", "Hateful"), "t2": sample("hi", "Normal")},
              "val": {"t3": sample("you", "Normal")}, "test": {"t4": sample("them", "Hateful")}},
        "5": {"train": {"t3": sample("you", "Hateful")}, "val": {}, "test": {}},
    }  # fmt: skip
    write_json(tmp_path / "gabhate" / "user_data_leaked.json", data)
    found = run(tmp_path / "gabhate", tmp_path / "out", train_split="dev")
    task = found.manifest.tasks["gabhate"]
    assert (task.labels, task.kind) == (("Hateful", "Normal"), "classification")
    first, second = found.users()
    assert [(q.id, q.split, q.answer) for q in first.queries] == [
        ("3:t3", "dev", "Normal"),
        ("3:t4", "test", "Hateful"),
    ]
    assert [item.answer for item in first.history] == ["Hateful", "Normal"] and not second.queries
    assert first.queries[0].input == task.instruction + "you"
    assert history_prompt(task, first.history[0]) == task.instruction + "good day"
    write_json(tmp_path / "gabhate" / "user_data_no_leak.json", data)
    with pytest.raises(DataError, match="holds PEFT-U's data twice"):
        run(tmp_path / "gabhate", tmp_path / "out2")


def test_personal_llm(tmp_path):
    row = {"person_id": 4, "person_weight": [0.5, 0.5], "length": 5.0, "prompt_6": None, "chosen_6": None}
    for n in range(1, 6):
        row |= {f"prompt_{n}": f"ask {n}", f"response_{n}_a": f"a{n} of this", f"response_{n}_b": f"b{n} of that"}
        row[f"chosen_{n}"] = "a" if n % 2 else "b"
    evaluated = {"person_id": 5, "user_history_length": 1, "prompt_1": "p", "chosen_1": "the text", "test_prompt": "t"}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in" / "train.parquet")
    (tmp_path / "in" / "test.jsonl").write_text(json.dumps(evaluated | {"best_response": "best of all"}))
    one, two = sorted(run(tmp_path / "in", tmp_path / "out").users(), key=lambda user: user.key)
    assert [(item.text, item.answer) for item in one.history] == [
        ("ask 1", "a1 of this"), ("ask 2", "b2 of that"), ("ask 3", "a3 of this"), ("ask 4", "b4 of that"),
    ]  # fmt: skip
    assert [(q.input, q.answer, q.split) for q in one.queries] == [("ask 5", "a5 of this", "train")]
    assert [(q.input, q.answer, q.split) for q in two.queries] == [("t", "best of all", "test")]


def test_a_format_that_is_not_there_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds no user_others.json .* which data.format=oppu asks for"):
        run(tmp_path, tmp_path / "out", format="oppu")


def test_time_based_lamp_files(lamp_folder, tmp_path):
    """The same people ask in several splits; dates are the items', and earlier questions are later histories."""
    text = "Generate a headline for the following article: "
    old = [{"id": "1", "text": "first", "title": "One", "date": "2013-01-01"}]
    new = [*old, {"id": "2", "text": "second", "title": "Two", "date": "2014-01-01"}]
    early = {"id": "q1", "user_id": "u", "input": text + "second", "profile": old, "date": "2014-01-01"}
    late = {"id": "q2", "user_id": "u", "input": text + "third", "profile": new, "date": "2015-01-01"}
    lamp_folder([early], [{"id": "q1", "output": "Two"}], task="LaMP_4")
    folder = lamp_folder([late], [{"id": "q2", "output": "Three"}], split="dev", task="LaMP_4")
    data = run(folder, tmp_path / "out")
    (user,) = data.users()
    assert [item.time for item in user.history] == ["2013-01-01", "2014-01-01"]
    assert [(query.split, query.answer) for query in user.queries] == [("train", None), ("dev", "Three")]
    assert (data.manifest.set_aside["queries_now_history"], data.manifest.num_before_history) == (1, 0)
