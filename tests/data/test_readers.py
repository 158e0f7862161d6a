"""Readers and preparation: every supported form comes in, every bad record is named, nothing vanishes."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from proper_ds.data.config import DataConfig
from proper_ds.data.manifest import MANIFEST
from proper_ds.data.prepare import PROBLEMS_FILE, prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import history_prompt
from proper_ds.errors import DataError
from tests.fakes import write_json

ARTICLE = "Which category? categories: [sports, politics] article: "


def news(n, user=None, gold="sports", profile=None, **more):
    record = {
        "id": str(n),
        "input": f"{ARTICLE}text number {n}",
        "profile": profile
        if profile is not None
        else [{"id": f"p{n}", "text": f"old {n}", "title": "t", "category": gold}],
    }
    if user is not None:
        record["user_id"] = user
    return record | more


def run(path, out, **config):
    prepare(DataConfig(path=str(path), **config), out)
    return PreparedData(out)


def problems_in(out):
    return [json.loads(line) for line in (out / PROBLEMS_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_lamp_with_user_and_date(lamp_folder, tmp_path, ending):
    old = [
        {"id": "a", "text": "later", "title": "x", "category": "politics", "date": "2021-05-01"},
        {"id": "b", "text": "sooner", "title": "y", "category": "sports", "date": "2020-01-01"},
    ]
    questions = [news(1, "u1", profile=old, date="2022-01-01"), news(2, "u1", profile=old), news(3, "u2")]
    golds = [{"id": "3", "output": "sports"}, {"id": "1", "output": "politics"}, {"id": "2", "output": "sports"}]
    data = run(lamp_folder(questions, golds, ending=ending), tmp_path / "out")
    users = list(data.users())
    assert [u.key for u in users] == ["u1", "u2"]
    assert [item.text for item in users[0].history] == ["sooner", "later"], "oldest first"
    assert [item.answer for item in users[0].history] == ["sports", "politics"]
    assert [(q.id, q.answer, q.split, q.time) for q in users[0].queries] == [
        ("1", "politics", "train", "2022-01-01"),
        ("2", "sports", "train", ""),
    ]
    task = data.manifest.tasks["LaMP_2N"]
    assert task.instruction == ARTICLE
    assert task.history_prompts == ((ARTICLE, ""),)
    assert data.manifest.splits == {"train": {"num_users": 2, "num_queries": 3}}


def test_lamp_without_user_makes_each_question_a_user(lamp_folder, tmp_path):
    questions, golds = [news(1), news(2)], [{"id": "1", "output": "sports"}, {"id": "2", "output": "sports"}]
    assert [u.key for u in run(lamp_folder(questions, golds), tmp_path / "out").users()] == [
        "lamp:train:1",
        "lamp:train:2",
    ]


def test_test_split_without_outputs_has_hidden_answers(lamp_folder, tmp_path):
    lamp_folder([news(1, "u")], [{"id": "1", "output": "sports"}])
    folder = lamp_folder([news(5, "v")], None, split="test")
    users = list(run(folder, tmp_path / "out").users())
    found = {u.key: [(q.split, q.answer) for q in u.queries] for u in users}
    assert found == {"u": [("train", "sports")], "v": [("test", None)]}


def test_own_labels_from_info(lamp_folder, tmp_path):
    folder = lamp_folder([news(1, "u", gold="knitting")], [{"id": "1", "output": "knitting"}])
    write_json(folder / "info.json", {"name": "crafts", "task": "LaMP_2", "labels": ["knitting", "pottery"]})
    assert run(folder, tmp_path / "out").manifest.tasks["crafts"].labels == ("knitting", "pottery")


def test_jsonl_and_parquet_hold_the_same(tmp_path):
    rows = [
        {"user": "u", "history": [{"input": "a", "output": "b"}], "query": "q one", "answer": "x", "time": "3"},
        {"user": "u", "history": [{"input": "a", "output": "b"}], "query": "q two", "answer": "y", "time": "4"},
        {"user": "v", "history": [{"input": "c", "output": "d"}], "query": "", "answer": "", "time": ""},
    ]
    lines = tmp_path / "jsonl" / "train.jsonl.gz"
    lines.parent.mkdir()
    lines.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    table = tmp_path / "parquet" / "train.parquet"
    table.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), table)
    found = [list(run(path.parent, tmp_path / f"out-{path.suffix}").users()) for path in (lines, table)]
    assert found[0] == found[1]
    assert [len(u.queries) for u in found[0]] == [2, 0]
    assert found[0][0].history[0].answer == "b"


BAD = {
    "no id": (news(9) | {"id": None}, "`id` is missing"),
    "no input": (news(9) | {"input": ""}, "`input`"),
    "profile no list": (news(9) | {"profile": "x"}, "`profile` is no list"),
    "item no object": (news(9) | {"profile": ["x"]}, "`profile` item 1"),
    "no object": ("x", "not an object"),
    "unknown label in history": (news(9, gold="cooking"), "unknown label 'cooking'"),
    "history item without its answer": (news(9, profile=[{"text": "x"}]), "needs text+category"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_questions_are_refused_or_set_aside(lamp_folder, tmp_path, case):
    record, reason = BAD[case]
    folder = lamp_folder([news(1, "u"), record], [{"id": "1", "output": "sports"}, {"id": "9", "output": "sports"}])
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        run(folder, out)
    assert reason in str(caught.value)
    assert "train_questions.json, record 2" in str(caught.value)
    assert not (out / MANIFEST).exists()
    data = run(folder, out, bad_records="set_aside")
    listed = problems_in(out)
    assert data.manifest.set_aside["bad"] == len(listed)
    assert any(reason in problem["reason"] and problem["record"] == 2 for problem in listed)
    assert "u" in data.keys()  # noqa: SIM118 - a method


def test_bad_golds(lamp_folder, tmp_path):
    questions = [news(1, "u"), news(2, "u"), news(3, "u"), news(3, "u")]
    golds = [
        {"id": "1", "output": "cooking"},
        {"id": "3", "output": "sports"},
        {"id": "3", "output": "politics"},
        {"id": "7", "output": "sports"},
        {"output": "sports"},
    ]
    out = tmp_path / "out"
    data = run(lamp_folder(questions, golds), out, bad_records="set_aside")
    reasons = {(p["id"], p["reason"].split(":")[0]) for p in problems_in(out)}
    assert reasons == {
        ("1", "gold answer"),
        ("2", "a question without a gold answer in the outputs file"),
        ("3", "a second gold answer with this id"),
        ("3", "a second question with this id"),
        ("7", "a gold answer without a question"),
        ("", "`id` is missing"),
    }
    assert [q.id for u in data.users() for q in u.queries] == ["3"]


def test_score_out_of_range(lamp_folder, tmp_path):
    item = {"id": "p", "text": "old", "score": 10}
    question = {"id": "1", "user_id": "u", "input": "on a scale of 1 to 5? review: fine", "profile": [item]}
    with pytest.raises(DataError, match="score '10' is out of range: legal are 1, 2, 3, 4, 5"):
        run(lamp_folder([question], [{"id": "1", "output": "4"}], task="LaMP_3"), tmp_path / "out")


def test_invalid_utf8_loses_one_record_only(lamp_folder, tmp_path):
    folder = lamp_folder(
        [news(1, "u"), news(2, "v"), news(3, "w")], [{"id": str(n), "output": "sports"} for n in (1, 2, 3)]
    )
    path = folder / "train_questions.json"
    path.write_bytes(path.read_bytes().replace(b"text number 2", b"text \xff\xfe number 2"))
    out = tmp_path / "out"
    data = run(folder, out, bad_records="set_aside")
    assert data.keys() == ["u", "w"]
    assert {p["reason"] for p in problems_in(out)} == {"holds invalid UTF-8", "a gold answer without a question"}


def test_truncated_gzip(lamp_folder, tmp_path):
    many = [news(n, f"u{n}") for n in range(400)]
    folder = lamp_folder(many, [{"id": str(n), "output": "sports"} for n in range(400)], ending=".json.gz")
    path = folder / "train_questions.json.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="truncated or damaged gzip after record"):
        run(folder, tmp_path / "out")


def test_broken_json(lamp_folder, tmp_path):
    folder = lamp_folder([news(1, "u")], [{"id": "1", "output": "sports"}])
    (folder / "train_questions.json").write_text('[{"id": "1", "input": ')
    with pytest.raises(DataError, match="broken JSON after record 0"):
        run(folder, tmp_path / "out")


def test_jsonl_bad_lines(tmp_path):
    path = tmp_path / "in" / "train.jsonl"
    path.parent.mkdir()
    good = json.dumps({"user": "u", "history": [{"input": "a", "output": "b"}], "query": "q", "answer": "x"})
    path.write_bytes(b"\n".join([good.encode(), b"{", b'{"user": "\xff"}', b'{"query": "q"}', b'{"user": "z"}']))
    out = tmp_path / "out"
    run(path, out, bad_records="set_aside")
    assert [(p["record"], p["reason"][:20]) for p in problems_in(out)] == [
        (2, "is no JSON (Expectin"),
        (3, "holds invalid UTF-8"),
        (4, "`user` is missing: e"),
        (5, "neither `query` nor "),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, r"holds no \*_questions.json.*Its folders lamp do"),
    ],
)
def test_wrong_paths_say_what_would_do(lamp_folder, tmp_path, make, message):
    lamp_folder([news(1, "u")], [{"id": "1", "output": "sports"}])
    with pytest.raises(DataError, match=message):
        run(make(tmp_path), tmp_path / "out")


def test_cold_users_are_kept(lamp_folder, tmp_path):
    folder = lamp_folder([news(1, "u", profile=[]), news(2, "v")], [{"id": n, "output": "sports"} for n in "12"])
    data = run(folder, tmp_path / "out")
    assert data.manifest.num_cold_users == 1
    assert [u.is_cold for u in data.users()] == [True, False]


def test_preparing_again_replaces_the_shards(lamp_folder, tmp_path):
    golds = [{"id": str(n), "output": "sports"} for n in range(5)]
    folder = lamp_folder([news(n, f"u{n}") for n in range(5)], golds)
    out = tmp_path / "out"
    run(folder, out, num_users_per_shard=2)
    assert len(list(out.glob("*.parquet"))) == 3
    data = run(folder, out, num_users_per_shard=10)
    assert len(list(out.glob("*.parquet"))) == 1
    assert list(data.users(1, 3)) == list(data.users())[1:3]


def test_a_shard_cut_short_is_noticed(lamp_folder, tmp_path):
    out = tmp_path / "out"
    run(lamp_folder([news(1, "u")], [{"id": "1", "output": "sports"}]), out)
    shard = next(out.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="where its manifest says"):
        PreparedData(out)


def test_max_users_per_split(lamp_folder, tmp_path):
    golds = [{"id": str(n), "output": "sports"} for n in range(5)]
    folder = lamp_folder([news(n, f"u{n // 2}") for n in range(5)], golds)
    assert run(folder, tmp_path / "out", max_users_per_split=2).keys() == ["u0", "u1"]
    assert run(folder, tmp_path / "one", max_users_per_split={"train": 1}).keys() == ["u0"]
    with pytest.raises(DataError, match="no question is of split tset; read were train"):
        run(folder, tmp_path / "none", max_users_per_split={"train": 1, "tset": 1})
    with pytest.raises(DataError, match=r"split tune \(`tune` is a part of 'train'\); read were train"):
        run(folder, tmp_path / "none", max_users_per_split={"tune": 1}, tune_share=0.5)
    with pytest.raises(ValidationError, match="at least 1 item"):
        run(folder, tmp_path / "none", max_users_per_split={})


def test_a_limit_of_users_leaves_the_check_of_golds(lamp_folder, tmp_path):
    folder = lamp_folder([news(0, "u"), news(1, "v")], [{"id": str(n), "output": "sports"} for n in range(3)])
    with pytest.raises(DataError, match="a gold answer without a question"):
        run(folder, tmp_path / "out", max_users_per_split=1)


def test_max_history_items_keeps_the_newest(lamp_folder, tmp_path):
    profile = [
        {"id": f"p{n}", "text": f"news {n}", "title": "t", "category": "sports", "date": f"2020-01-0{n}"}
        for n in (2, 1, 3)
    ]
    question = {"id": "1", "user_id": "u", "input": "category article: other", "profile": profile}
    folder = lamp_folder([question], [{"id": "1", "output": "sports"}])
    (user,) = run(folder, tmp_path / "out", max_history_items=2).users()
    assert [item.text for item in user.history] == ["news 2", "news 3"]


def test_memory_does_not_grow_with_the_number_of_users(tmp_path):
    def peak(num_users):
        path = tmp_path / str(num_users) / "train.jsonl"
        path.parent.mkdir()
        with path.open("w") as file:
            for user in range(num_users):
                history = [{"input": f"text {user} {n} " + "word " * 20, "output": "good"} for n in range(5)]
                file.write(json.dumps({"user": f"u{user}", "history": history, "query": "q", "answer": "bad"}) + "\n")
        tracemalloc.start()
        try:
            prepare(DataConfig(path=[str(path)], num_users_per_shard=100), tmp_path / f"out{num_users}")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports
    small, large = peak(2000), peak(8000)
    assert large < 1.2 * small, (small, large)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def plain(user, query="q", answer="x", **more):
    return {"user": user, "history": [{"input": "a", "output": "b"}], "query": query, "answer": answer} | more


def test_people_without_a_name_in_two_data_sets_stay_apart(lamp_folder, tmp_path):
    for name in ("one", "two"):
        question = news(1, None) | {"input": f"text of {name}"}
        question.pop("user_id", None)
        folder = lamp_folder([question], [{"id": "1", "output": "sports"}], folder=name)
        write_json(folder / "info.json", {"name": name, "task": "LaMP_2"})
    prepare(DataConfig(path=[str(tmp_path / "one"), str(tmp_path / "two")]), tmp_path / "out")
    users = list(PreparedData(tmp_path / "out").users())
    assert [user.key for user in users] == ["one:train:1", "two:train:1"]


@pytest.mark.parametrize(
    ("name", "split"),
    [("dev-00000-of-00001", "dev"), ("validation", "validation"), ("train_2", "train"), ("test.part1", "test")],
)
def test_files_are_named_after_their_split(tmp_path, name, split):
    path = jsonl(tmp_path / "in" / f"{name}.jsonl", [plain("u")])
    (user,) = run(path.parent, tmp_path / "out").users()
    assert [query.split for query in user.queries] == [split]


def test_a_file_of_no_split_is_refused_unless_rows_name_theirs(tmp_path):
    path = jsonl(tmp_path / "in" / "people.jsonl", [plain("u")])
    with pytest.raises(DataError, match=r"of no split: name the file after one .train\.jsonl"):
        run(path.parent, tmp_path / "out")
    jsonl(path, [plain("u", split="dev")])
    (user,) = run(path.parent, tmp_path / "out").users()
    assert [query.split for query in user.queries] == ["dev"]


def test_rows_without_id_in_several_files_are_all_kept(tmp_path):
    for part in (1, 2):
        jsonl(tmp_path / "in" / f"train-{part}.jsonl", [plain(f"u{part}{n}") for n in range(3)])
    data = run(tmp_path / "in", tmp_path / "out")
    assert data.manifest.num_users == 6
    assert len({query.id for user in data.users() for query in user.queries}) == 6


def test_generic_questions_keep_what_they_share(tmp_path):
    """What all questions begin with may stand in the items, too: it must not be put before them once more."""
    history = [{"input": "Review: nice", "output": "good"}]
    rows = [{"user": f"u{n}", "history": history, "query": f"Review: film {n}", "answer": "bad"} for n in range(3)]
    path = jsonl(tmp_path / "in" / "train.jsonl", rows)
    data = run(path.parent, tmp_path / "out")
    (task,) = data.manifest.tasks.values()
    assert history_prompt(task, next(data.users()).history[0]) == "Review: nice"
    rows[1]["query"] = "Review: nice"
    jsonl(path, rows)
    with pytest.raises(DataError, match="the same input text"):
        run(path.parent, tmp_path / "out")


def test_items_alike_are_kept_where_they_are_several(tmp_path):
    alike = {"input": "a", "output": "b"}
    numbered = [{"id": 1, "input": "c", "output": "d"}, {"id": 1, "input": "e", "output": "f"}]
    rows = [plain("u", history=[alike, alike, *numbered]), plain("u", query="r", history=[alike])]
    (user,) = run(jsonl(tmp_path / "in" / "train.jsonl", rows).parent, tmp_path / "out").users()
    assert [item.text for item in user.history] == ["a", "a", "c", "e"]


def test_half_an_emoji_is_one_bad_record(tmp_path):
    path = jsonl(tmp_path / "in" / "train.jsonl", [plain("u"), plain("v", query="cut \ud83d"), plain("w")])
    assert [u.key for u in run(path.parent, tmp_path / "out", bad_records="set_aside").users()] == ["u", "w"]


def test_one_bad_row_of_parquet_loses_no_other(tmp_path):
    texts = [b"fine", b"not \xff utf-8", b"fine, too"]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(texts, pa.binary()).buffers())
    table = pa.table({"user": ["u", "v", "w"], "query": column, "answer": ["x", "y", "z"]})
    path = tmp_path / "in" / "train.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    data = run(path.parent, tmp_path / "out", bad_records="set_aside")
    assert [user.key for user in data.users()] == ["u", "w"]
    (problem,) = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").open()]
    assert (problem["record"], problem["reason"]) == (2, "holds invalid UTF-8")
