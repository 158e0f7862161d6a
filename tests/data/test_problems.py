"""What is told of data that is at fault or not as it seems: each mistake once, where it is, and what would mend it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.data.config import DataConfig
from proper_ds.data.manifest import MANIFEST, Manifest
from proper_ds.data.prepare import PROBLEMS_FILE, prepare
from proper_ds.errors import DataError
from tests.fakes import write_json


def rated(*texts):
    return [{"text": text, "score": "4"} for text in texts]


@pytest.fixture
def rows(tmp_path):
    """`rows(history of each user)`: a folder with one JSONL of training rows."""

    def write(*histories):
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        made = [
            {"user": f"u{n}", "history": history, "query": f"film {n}?", "answer": "4"}
            for n, history in enumerate(histories)
        ]
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in made))
        return folder

    return write


def test_ratings_without_their_task_are_told_once_with_the_task(rows, tmp_path):
    folder = rows(*[rated(f"a{n}", f"b{n}", f"c{n}") for n in range(5)])
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(path=str(folder)), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "15 bad records. They look like data of another task."
    assert lines[1].startswith("  15 times: history item has fields ['score', 'text'], but generic needs input+output")
    assert lines[1].endswith("these are LaMP_3's fields; give data.task=LaMP_3 (data prepare: --task LaMP_3)")
    file = folder / "train.jsonl"
    places = [f"{file}, record {n + 1} (user u{n}), history item 1" for n in range(3)]
    assert lines[2] == f"    in {'; '.join(places)}; .."
    assert lines[3:] == [f"All of them are listed in {tmp_path / 'out' / PROBLEMS_FILE}."]
    assert len((tmp_path / "out" / PROBLEMS_FILE).read_text().splitlines()) == 15


def test_other_mistakes_may_be_set_aside_and_each_is_told_once(rows, tmp_path):
    pair = {"input": "a", "output": "b"}
    folder = rows([pair, {"input": "c"}], [{"input": "d"}, pair], [{"input": "e", "output": ""}])
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(path=str(folder)), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 bad records. Mend them, or go on without them: --skip-bad (data.bad_records=set_aside)."
    file = folder / "train.jsonl"
    assert lines[1] == "  2 times: history item has fields ['input'], but generic needs input+output"
    assert lines[2] == f"    in {file}, record 1 (user u0), history item 2; {file}, record 2 (user u1), history item 1"
    assert lines[3] == f"  {file}, record 3 (user u2), history item 1: the answer is empty"
    assert prepare(DataConfig(path=str(folder), bad_records="set_aside"), tmp_path / "out").num_history_items == 2


def test_more_mistakes_than_are_told_are_counted(rows, tmp_path):
    folder = rows([{"text": f"t{n}", "score": str(n)} for n in range(6, 18)] * 2)
    with pytest.raises(DataError, match=r"24 bad records(?s:.*)  \.\.\. and 4 more\n"):
        prepare(DataConfig(path=str(folder), task="LaMP_3"), tmp_path / "out")


def test_a_data_set_that_would_lose_all_its_history_is_refused_also_where_bad_records_are_set_aside(rows, tmp_path):
    folder, out = rows(rated("a", "b"), [], rated("c")), tmp_path / "out"
    with pytest.raises(
        DataError, match=r"none of 3 history items can be used, so nobody(?s:.*)data\.task=LaMP_3"
    ) as no:
        prepare(DataConfig(path=str(folder), bad_records="set_aside"), out)
    assert "--skip-bad" not in str(no.value) and not (out / MANIFEST).exists() and not list(out.glob("*.parquet"))
    other = tmp_path / "other"
    other.mkdir()
    other.joinpath("train.jsonl").write_text(json.dumps({"user": "x", "history": [{"input": "a", "output": "b"}]}))
    write_json(other / "info.json", {"name": "other"})
    with pytest.raises(DataError, match="rows: none of 3 history items"):
        prepare(DataConfig(path=[str(other), str(folder)], bad_records="set_aside"), out)
    manifest = prepare(DataConfig(path=str(rows([], [])), bad_records="set_aside"), out)
    assert manifest.num_cold_users == 2, "none was given, so none was lost"


def test_the_list_of_a_checks_own_copy_is_not_named_once_it_is_gone(rows, tmp_path):
    yaml = tmp_path / "run.yaml"
    write_json(yaml, {"output_dir": str(tmp_path / "run"), "data": {"path": str(rows([]))}, "base": {"model": "none"}})
    first = CliRunner().invoke(app, ["check", str(yaml), "data.task=LaMP_3"])
    assert "the data has no questions of split 'dev'" in str(first.exception), "which is seen once it is prepared"
    rows(rated("a"))
    second = CliRunner().invoke(app, ["check", str(yaml)])
    assert "1 bad record." in str(second.exception) and "`proper-ds data prepare` lists" in str(second.exception)
    assert ".check-" not in str(second.exception) and not list((tmp_path / "run").glob(".check-*"))
    assert Manifest.read(tmp_path / "run" / "prepared").num_cold_users == 1, "what was there stays"


def test_data_prepare_says_as_which_task_it_read_the_data(rows, tmp_path):
    folder, out = rows(rated("a", "b")), str(tmp_path / "out")
    told = CliRunner().invoke(app, ["data", "prepare", str(folder), "--out", out, "--task", "LaMP_3"]).output
    assert "task LaMP_3: LaMP_3, 5 labels, mae, rmse\n" in told
    write_json(folder / "info.json", {"name": "mine", "task": "LaMP_4", "generated": True})
    rows([{"text": "a", "title": "b"}])
    told = CliRunner().invoke(app, ["data", "prepare", str(folder), "--out", out, "--overwrite"]).output
    assert "task mine: LaMP_4, open answers, rouge-1, rouge-L, GENERATED data\n" in told


def test_questions_without_a_profile_among_others_of_their_user_are_counted(lamp_folder, tmp_path, caplog):
    asked = [
        {"id": str(n), "user_id": user, "input": f"text {n}", "profile": profile}
        for n, (user, profile) in enumerate([("ann", rated("a")), ("ann", []), ("ann", None), ("bob", [])])
    ]
    del asked[2]["profile"]
    folder = lamp_folder(asked, [{"id": str(n), "output": "4"} for n in range(4)], task="LaMP_3")
    prepare(DataConfig(path=str(folder)), tmp_path / "out")
    told = [line for line in caplog.messages if "have no `profile`" in line]
    assert told == [
        f"{folder}: 2 questions have no `profile`, but others of the same users have; they are taken to share it"
    ]


def test_rows_that_share_a_history_are_not_complained_of(rows, tmp_path, caplog):
    folder = rows(rated("a"))
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"user": "u0", "query": "another?", "answer": "3"}))
    prepare(DataConfig(path=str(folder), task="LaMP_3"), tmp_path / "out")
    assert not any("profile" in line for line in caplog.messages)
