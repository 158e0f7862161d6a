"""The leak guard: planted leaks are refused, honest look-alikes are not, LaMP-1 is judged by its candidates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import RunConfig
from proper_ds.data.config import DataConfig
from proper_ds.data.leaks import MIN_SHINGLES, SHINGLE_WORDS, LeakGuard
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.protocols import hold_out_most_active
from proper_ds.data.records import HistoryItem
from proper_ds.data.tasks import TASKS
from proper_ds.errors import ConfigError, DataError
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.pipeline.plan import check_inputs

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


@pytest.mark.parametrize(
    ("asked", "candidate", "leaks"),
    [
        ("the paper: named", "A Cited Work", True),
        ("The paper; named", "a cited work!", True),
        ("The paper, named", "Another work", False),  # one of the candidates is always cited by the paper
        ("Another paper", "A Cited Work", False),  # who cited it once cites it again
    ],
)
def test_lamp_1_looks_at_what_the_asked_paper_cites(lamp_folder, tmp_path, asked, candidate, leaks):
    """OPPU's items say what a paper cites."""
    profile = [{"id": "a", "title": "The Paper: Named", "citation": "A cited work", "abstract": "words"}]
    text = CITE.format(asked, candidate, "Something else")
    question = {"id": "1", "user_id": "u", "input": text, "profile": profile}
    folder = lamp_folder([question], [{"id": "1", "output": "[1]"}], task="LaMP_1")
    assert run(folder, tmp_path / "out", leaks="set_aside").manifest.set_aside.get("leak", 0) == leaks


def test_time_based_split_teaches_old_questions_as_history(lamp_folder, tmp_path):
    """The later profile holds the earlier question's item: no leak, but the question must not be taught twice."""
    early = [{"id": "a", "text": "first", "score": "1", "date": "2020"}]
    late = [*early, {"id": "b", "text": "second", "score": "5", "date": "2021"}]
    lamp_folder([lamp3("q1", "u", "second", early)], [{"id": "q1", "output": "5"}], task="LaMP_3")
    folder = lamp_folder([lamp3("q2", "u", "third", late)], [{"id": "q2", "output": "3"}], split="dev", task="LaMP_3")
    data = run(folder, tmp_path / "out")
    (user,) = data.users()
    assert [item.text for item in user.history] == ["first", "second"]
    assert [(q.id, q.answer) for q in user.queries] == [("q1", None), ("q2", "3")], "q1: a training user, not asked"
    assert data.manifest.set_aside["queries_now_history"] == 1
    assert data.manifest.num_users_ahead == {}, "the training split may know what later ones do"
    (listed,) = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").open()]
    assert (listed["id"], listed["kind"]) == ("q1", "queries_now_history")


def time_based(lamp_folder, grow=True):
    """LaMP-3 by time: three people ask in train, dev and test, each time with what they rated before."""
    for split, num in (("train", 2), ("dev", 3), ("test", 4)):
        questions, golds = [], []
        for user in "abc":
            items = [{"id": f"{user}{n}", "text": f"{user} on film {n}", "score": str(n)} for n in range(1, num + 1)]
            items = [item | {"date": f"2020-01-0{n}"} for n, item in enumerate(items, start=1)]
            profile = items[:-1] if grow else items[:1]
            asked = items[-1]
            questions.append(lamp3(f"{split}-{user}", user, asked["text"], profile) | {"date": asked["date"]})
            golds.append({"id": f"{split}-{user}", "output": asked["score"]})
        folder = lamp_folder(questions, None if split == "test" else golds, split, "LaMP_3")
    return folder


def test_people_who_ask_in_every_split_are_read_up_to_the_one_that_is_asked(lamp_folder, tmp_path):
    folder = time_based(lamp_folder)
    data = run(folder, tmp_path / "dev", splits=["train", "dev"])
    for user in data.users():
        assert [item.time for item in user.history] == ["2020-01-01", "2020-01-02"]
        assert [(q.split, q.answer) for q in user.queries] == [("train", None), ("dev", "3")]
    assert data.manifest.set_aside == {"queries_now_history": 3}
    config = RunConfig(output_dir=str(tmp_path), evaluation=EvaluationConfig(split="dev", methods=["proper", "OPPU"]))
    with pytest.raises(
        ConfigError, match=r"router.train_on: learns from questions alone.* Set router.train_on: \[history\]"
    ):
        check_inputs(config, data)
    assert (data.manifest.num_users_ahead, data.manifest.num_before_history) == ({}, 0)
    data = run(folder, tmp_path / "test")
    for user in data.users():
        assert [item.time[-1] for item in user.history] == ["1", "2", "3"]
        assert [q.split for q in user.queries] == ["train", "test"], "dev's are history by then, and no leaks"
    assert data.manifest.set_aside == {"queries_now_history": 6}


def test_a_history_ahead_of_its_questions_is_not_evaluated(lamp_folder, tmp_path):
    """Whoever is asked in dev may not know what only the test profiles do, be it the answer or later items."""
    folder = time_based(lamp_folder)
    path = folder / "test_questions.json"
    rows = [row | {"profile": [*row["profile"][:2], item(row)]} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    data = run(folder, tmp_path / "out")
    assert (data.manifest.num_users_ahead, data.manifest.splits["dev"]["num_queries"]) == ({"dev": 3}, 3)
    config = RunConfig(output_dir=str(tmp_path), evaluation=EvaluationConfig(split="dev"))
    with pytest.raises(
        ConfigError, match=r"3 users of split 'dev' hold what later splits .*data.splits=\[train, dev\]"
    ):
        check_inputs(config, data)
    with pytest.raises(DataError, match="3 users of dev have history from later splits"):
        hold_out_most_active(PreparedData(tmp_path / "out"), tmp_path / "held", 1)


def item(row):
    return {"id": row["id"], "text": f"a later film of {row['user_id']}", "score": "1", "date": "2020-01-09"}


def test_nobody_is_set_apart_for_choices_who_is_evaluated(lamp_folder, tmp_path):
    folder = time_based(lamp_folder, grow=False)
    with pytest.raises(DataError, match=r"sets 3 users apart who are asked in another split"):
        run(folder, tmp_path / "out", tune_share=0.99)
    manifest = run(folder, tmp_path / "alone", tune_share=0.99, splits=["train"]).manifest
    assert manifest.splits == {"tune": {"num_users": 3, "num_queries": 3}} and manifest.tune_share == 0.99


def test_the_shared_data_sets_have_no_leaks(shared_data, tmp_path):
    for task in ("movie_rating", "acl_author", "acl_title", "email_polish"):
        manifest = run(shared_data / task, tmp_path / task).manifest
        assert manifest.num_users > 100 and not manifest.set_aside.get("near_duplicate")


def test_people_who_post_the_same_thing_twice_are_noticed(shared_data, tmp_path):
    manifest = run(shared_data / "usenet_topic", tmp_path / "out").manifest
    assert manifest.set_aside["near_duplicate"] == 19 and manifest.num_users > 2000


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


LONG = "the quick brown fox jumps over the lazy dog while seven old owls watch from a dark tree near the river"


def near_copy(lamp_folder, text, own, folder="lamp"):
    profile = [{"id": "a", "text": own, "score": "4"}]
    return lamp_folder([lamp3("1", "u", text, profile)], [{"id": "1", "output": "4"}], task="LaMP_3", folder=folder)


@pytest.mark.parametrize(
    ("own", "near"),
    [
        (LONG + " tonight", True),
        (LONG.upper().replace(" ", ", "), True),
        ("He wrote: " + LONG + " and much more followed that nobody had quoted before", True),
        (" ".join(LONG.split()[:11]), False),  # twelve words are the least of which parts are compared
        (" ".join(reversed(LONG.split())), False),
        (LONG.replace("brown", "red").replace("seven", "two"), False),  # some runs differ: a likeness, not a copy
    ],
)
def test_near_copies_are_refused_set_aside_or_allowed(lamp_folder, tmp_path, own, near):
    folder = near_copy(lamp_folder, LONG, own)
    data = run(folder, tmp_path / "aside")
    assert data.manifest.set_aside.get("near_duplicate", 0) == near
    assert data.manifest.splits.get("train", {"num_queries": 0})["num_queries"] == (not near)
    allowed = run(folder, tmp_path / "allowed", near_duplicates="allow").manifest
    assert (allowed.num_near_duplicates, allowed.splits["train"]["num_queries"]) == (near, 1)
    if near:
        with pytest.raises(DataError, match=r"1 question with a near copy in the same user's history[\s\S]*\(id 1\)"):
            run(folder, tmp_path / "refused", near_duplicates="refuse")


@pytest.mark.parametrize(
    ("own", "near"), [("Deep Learning: a survey", 1), ("Deep Learning: a study", 0), ("Deep, learning", 0)]
)
def test_punctuation_makes_no_other_text(lamp_folder, tmp_path, own, near):
    question = "deep learning - a survey." if len(own) > 20 else "deep learning"
    manifest = run(near_copy(lamp_folder, question, own), tmp_path / "out").manifest
    assert manifest.set_aside.get("near_duplicate", 0) == near


def test_a_near_copy_of_the_gold_is_found_and_a_strangers_is_none(lamp_folder, tmp_path):
    mail = "Paraphrase the following tweet without any explanation before or after it: "
    profile = [{"id": "a", "original": "other words", "text": LONG + " indeed"}]
    rows = [("1", "u", profile), ("2", "v", [{"id": "a", "original": "hello", "text": "there"}])]
    questions = [{"id": n, "user_id": user, "input": f"{mail}text {n}", "profile": own} for n, user, own in rows]
    folder = lamp_folder(questions, [{"id": n, "output": LONG} for n in "12"], task="LaMP_7")
    data = run(folder, tmp_path / "out")
    assert [query.id for user in data.users() for query in user.queries] == ["2"]
    (listed,) = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").open()]
    assert listed["kind"] == "near_duplicate" and "near copy of the answer" in listed["reason"]


WORDS = st.lists(st.integers(0, 10**6), min_size=SHINGLE_WORDS + MIN_SHINGLES - 1, max_size=60, unique=True)


@given(WORDS, st.data())
def test_a_planted_stretch_is_found_wherever_it_stands(words, data):
    """However it is wrapped and cut at the ends, four fifths of a text within another are a near copy."""
    text = " ".join(f"w{n}" for n in words)
    kept = max(SHINGLE_WORDS + MIN_SHINGLES - 1, -(-len(words) * 9 // 10))
    start = data.draw(st.integers(0, len(words) - kept))
    planted = " ".join(["before", *(f"W{n}!" for n in words[start : start + kept]), "after it"])
    item = HistoryItem("a", "LaMP_3", 0, planted, "4")
    found = LeakGuard([(item, frozenset({"dev"}))]).find(TASKS["LaMP_3"], "", text, "4")
    assert found is not None and found[0] == "near" and found[2] == {"dev"}


def test_questions_older_than_the_history_are_counted(lamp_folder, tmp_path, caplog):
    own = [{"id": "a", "text": "first", "score": "1", "date": "2020-01-01"}]
    questions = [lamp3("q1", "u", "second", own) | {"date": "2019-05-05"}]
    questions += [lamp3("q2", "v", "third", own) | {"date": "2021-05-05"}, lamp3("q3", "w", "fourth", own)]
    folder = lamp_folder(questions, [{"id": f"q{n}", "output": "5"} for n in (1, 2, 3)], split="dev", task="LaMP_3")
    assert run(folder, tmp_path / "out").manifest.num_before_history == 1
    assert "1 questions are older" in caplog.text


def test_some_training_users_are_set_apart_for_choices(lamp_folder, tmp_path):
    own = [{"id": "a", "text": "first", "score": "1"}]
    keys = [f"u{n}" for n in range(60)]
    golds = [{"id": key, "output": "5"} for key in keys]
    lamp_folder([lamp3(key, key, f"text of {key}", own) for key in keys], golds, task="LaMP_3")
    asked = [lamp3(f"d{key}", f"d{key}", "late", own) for key in keys]
    golds = [{"id": row["id"], "output": "5"} for row in asked]
    folder = lamp_folder(asked, golds, split="dev", task="LaMP_3")

    def splits(**config):
        users = run(folder, tmp_path / "out", **config).users()
        return {user.key: {query.split for query in user.queries} for user in users}

    found = splits(tune_share=0.3)
    tuned = {key for key, names in found.items() if names == {"tune"}}
    assert 8 <= len(tuned) <= 28 and all(key.startswith("u") for key in tuned)
    assert all(found[f"d{key}"] == {"dev"} for key in keys)
    assert {key for key, names in splits(tune_share=0.6).items() if names == {"tune"}} > tuned
    assert splits().keys() == found.keys() and {"tune"} not in splits().values()
