"""The leak guard: planted leaks are refused, honest look-alikes are not, LaMP-1 is judged by its candidates."""

from __future__ import annotations

import json

import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError

RATE = "What is the score? review: "
TITLE = "Generate a title for the following abstract of a paper: "
CITE = 'For an author who has written the paper with the title "{}", which reference is related? [1]: "{}" [2]: "{}"'


def lamp3(n, user, text, profile):
    return {"id": n, "user_id": user, "input": RATE + text, "profile": profile}


def run(path, out, **config):
    prepare(DataConfig(path=str(path), **config), out)
    return PreparedData(out)


def test_same_input_text_is_refused_or_set_aside(lamp_folder, tmp_path):
    own = [{"id": "a", "text": "A  fine film", "score": "4"}]
    questions = [
        lamp3("1", "u", "a fine FILM", own),
        lamp3("2", "u", "another film", own),
        lamp3("3", "v", "A fine film", []),
    ]
    golds = [{"id": n, "output": "4"} for n in "123"]
    folder = lamp_folder(questions, golds, task="LaMP_3")
    with pytest.raises(DataError, match=r"1 question whose answer stands in the same user's history[\s\S]*\(id 1\)"):
        run(folder, tmp_path / "out")
    data = run(folder, tmp_path / "out", leaks="set_aside")
    assert [q.id for u in data.users() for q in u.queries] == ["2", "3"], "another user's item is no leak"
    assert data.manifest.set_aside["leak"] == 1


def test_same_rating_is_no_leak_but_same_text_answer_is(lamp_folder, tmp_path):
    profile = [{"id": "a", "title": "The Title", "abstract": "old words"}]
    questions = [{"id": "1", "user_id": "u", "input": TITLE + "new words", "profile": profile}]
    folder = lamp_folder(questions, [{"id": "1", "output": "the title"}], task="LaMP_5")
    with pytest.raises(DataError, match="the same answer is in the user's history"):
        run(folder, tmp_path / "out")
    own = [{"id": "a", "text": "old words", "score": "4"}]
    folder = lamp_folder([lamp3("1", "u", "new words", own)], [{"id": "1", "output": "4"}], task="LaMP_3", folder="b")
    assert run(folder, tmp_path / "out2").manifest.set_aside == {"queries_now_history": 0}


@pytest.mark.parametrize(("candidate", "leaks"), [("An Own Title", True), ("A Stranger's Title", False)])
def test_lamp_1_looks_at_the_candidates(lamp_folder, tmp_path, candidate, leaks):
    profile = [
        {"id": "a", "title": "an own title", "abstract": "words"},
        {"id": "b", "title": "Named", "abstract": "w"},
    ]
    text = CITE.format("Named", candidate, "Something else")
    folder = lamp_folder(
        [{"id": "1", "user_id": "u", "input": text, "profile": profile}], [{"id": "1", "output": "[2]"}], task="LaMP_1"
    )
    if leaks:
        with pytest.raises(DataError, match="candidate title"):
            run(folder, tmp_path / "out")
    else:
        assert run(folder, tmp_path / "out").manifest.splits["train"]["num_queries"] == 1


def test_time_based_split_teaches_old_questions_as_history(lamp_folder, tmp_path):
    """The later profile holds the earlier question's item: no leak, but the question must not be taught twice."""
    early = [{"id": "a", "text": "first", "score": "1", "date": "2020"}]
    late = [*early, {"id": "b", "text": "second", "score": "5", "date": "2021"}]
    lamp_folder([lamp3("q1", "u", "second", early)], [{"id": "q1", "output": "5"}], task="LaMP_3")
    folder = lamp_folder([lamp3("q2", "u", "third", late)], [{"id": "q2", "output": "3"}], split="dev", task="LaMP_3")
    data = run(folder, tmp_path / "out")
    (user,) = data.users()
    assert [item.text for item in user.history] == ["first", "second"]
    assert [q.id for q in user.queries] == ["q2"]
    assert data.manifest.set_aside["queries_now_history"] == 1
    (listed,) = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").open()]
    assert (listed["id"], listed["kind"]) == ("q1", "queries_now_history")


def test_the_shared_data_sets_have_no_leaks(shared_data, tmp_path):
    for task in ("movie_rating", "acl_author", "acl_title", "email_polish"):
        assert run(shared_data / task, tmp_path / task).manifest.num_users > 100


@pytest.mark.parametrize(("answer", "leaks"), [("positive", False), ("I would never buy it again", True)])
def test_short_answers_of_a_generic_task_may_recur(tmp_path, answer, leaks):
    row = {"user": "u", "history": [{"input": "old", "output": answer}], "query": "new", "answer": answer}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row))
    if leaks:
        with pytest.raises(DataError, match="the same answer"):
            run(path, tmp_path / "out")
    else:
        assert run(path, tmp_path / "out").manifest.num_users == 1


def test_one_odd_wording_does_not_blind_the_guard(lamp_folder, tmp_path, caplog):
    own = [{"id": "a", "text": "a fine film", "score": "4"}]
    questions = [lamp3("1", "u", "a fine film", own) | {"input": "Rate it now. review: a fine film"}]
    questions += [lamp3("2", "v", "x", []) | {"input": "Worded otherwise"}]
    folder = lamp_folder(questions, [{"id": n, "output": "4"} for n in "12"], task="LaMP_3")
    with pytest.raises(DataError, match="the same input text"):
        run(folder, tmp_path / "out")
    assert "the questions share no beginning" in caplog.text
