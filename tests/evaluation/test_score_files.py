"""`proper-ds evaluate`: crafted answer files score as in LaMP's evaluator, and files that do not match are refused."""

from __future__ import annotations

import gzip
import json
import math
import zipfile

import pytest
from rouge_score import rouge_scorer
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.data.tasks import CATEGORIES_2N
from proper_ds.errors import DataError
from proper_ds.evaluation.meteor import meteor, words_of
from proper_ds.evaluation.score_files import as_json, score_files
from tests.fakes import write_json

RATINGS = {  # id: (gold, prediction, error): what float() cannot read is the rating farther from the gold
    "1": ("3", "3", 0), "2": ("1", "no idea", 4), "3": ("5", "", -4), "4": ("4", "10", 6), "5": ("4", " 3.5\n", -0.5),
    "6": ("3", "three", 2), "7": ("2", 2, 0),
}  # fmt: skip
NEWS = {  # most labels are in neither column: each counts as an F1 of 0
    "a": ("sports", " sports "), "b": ("sports", "Sports"), "c": ("women", "politics"), "d": ("women", "women"),
    "e": ("crime", "no such label"),
}  # fmt: skip
TITLES = {"x": ("Running the dogs", "run dog"), "y": ("A b c d", " a b d c ")}


def lamp(path, task, pairs, column):
    golds = [{"id": key, "output": row[column]} for key, row in pairs.items()]
    whole = {"golds": golds} if task is None else {"task": task, "golds": golds}
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(whole).encode()))
    else:
        write_json(path, whole)
    return path


def files(folder, task, pairs, ending=".json"):
    folder.mkdir(exist_ok=True)
    return lamp(folder / f"preds{ending}", task, pairs, 1), lamp(folder / f"dev_outputs{ending}", task, pairs, 0)


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_ratings(tmp_path, ending):
    (score,) = score_files(*files(tmp_path, "LaMP_3", RATINGS, ending))
    errors = [row[2] for row in RATINGS.values()]
    assert score.values["mae"] == pytest.approx(sum(map(abs, errors)) / 7)
    assert score.values["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 7))
    assert (score.num_questions, score.num_users, score.user_means) == (7, None, {})


def test_news_labels_are_known_from_the_golds_and_absent_ones_count(tmp_path):
    (score,) = score_files(*files(tmp_path, "LaMP_2", NEWS))
    number = {label: n for n, label in enumerate(CATEGORIES_2N)}
    golds = [number[gold] for gold, _ in NEWS.values()]
    given = [number.get(answer.strip(), -1) for _, answer in NEWS.values()]
    wanted = f1_score(golds, given, labels=list(range(15)), average="macro", zero_division=0)
    assert score.task == "LaMP_2N"
    assert score.values == {"accuracy": pytest.approx(2 / 5), "f1_macro": pytest.approx(wanted)}


def test_titles_are_scored_by_rouge_score_itself(tmp_path):
    (score,) = score_files(*files(tmp_path, "LaMP_5", TITLES))
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name, kind in (("rouge-1", "rouge1"), ("rouge-L", "rougeL")):
        values = [scorer.score(gold.strip(), given.strip())[kind].fmeasure for gold, given in TITLES.values()]
        assert score.values[name] == pytest.approx(sum(values) / 2)


def test_a_leaderboard_zip_against_a_folder(tmp_path):
    golds = tmp_path / "golds"
    golds.mkdir()
    lamp(golds / "movies.json.gz", "LaMP_3", RATINGS, 0)
    lamp(golds / "titles.json", "LaMP_5", TITLES, 0)
    write_json(golds / "dev_questions.json", [])
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as file:
        for name, task, pairs in (("LaMP_3", "LaMP_3", RATINGS), ("LaMP_5", "LaMP_5", TITLES)):
            file.write(lamp(tmp_path / "one.json", task, pairs, 1), f"results/{name}.json")
    scores = score_files(tmp_path / "mine.zip", golds)
    assert [score.task for score in scores] == ["LaMP_3", "LaMP_5"]
    assert set(as_json(scores)["tasks"]["LaMP_3"]["metrics"]) == {"mae", "rmse"}
    (alone,) = score_files(tmp_path / "mine.zip", golds, task="LaMP_5")
    assert alone.values == scores[1].values


def test_users_are_averaged_where_the_questions_say_who_asked(tmp_path):
    given, golds = files(tmp_path, "LaMP_2", NEWS)
    people = {"a": "ann", "b": "ann", "c": "ann", "d": "bob", "e": "cas"}
    asked = [{"id": key, "user_id": user, "input": "?", "profile": []} for key, user in people.items()]
    write_json(tmp_path / "dev_questions.json", asked)
    (score,) = score_files(given, golds)
    assert score.num_users == 3
    assert score.user_means["accuracy"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert score.values["accuracy"] == pytest.approx(2 / 5)


def test_labels_of_the_info_file_and_of_the_command(tmp_path):
    pairs = {"1": ("yes", "yes"), "2": ("no", "maybe")}
    given, golds = files(tmp_path, "LaMP_2", pairs)
    with pytest.raises(DataError, match="golds no, yes are no labels of LaMP_2M"):
        score_files(given, golds)
    (score,) = score_files(given, golds, labels=["yes", "no"])
    assert score.values == {"accuracy": 0.5, "f1_macro": 0.5}
    write_json(tmp_path / "info.json", {"name": "mine", "labels": ["yes", "no", "other"]})
    (score,) = score_files(given, golds)
    assert (score.task, score.values["f1_macro"]) == ("mine", pytest.approx(1 / 3))


def test_the_command_says_which_task_it_is_where_the_files_do_not(tmp_path):
    given, golds = files(tmp_path, "mytask", TITLES)
    with pytest.raises(DataError, match="unknown task 'mytask'; say which it is with --task: LaMP_1, LaMP_2, LaMP_2M"):
        score_files(given, golds)
    (known,) = score_files(given, golds, task="LaMP_5")
    lamp(given, None, TITLES, 1), lamp(golds, None, TITLES, 0)
    with pytest.raises(DataError, match="names no task; say which it is with --task"):
        score_files(given, golds)
    (silent,) = score_files(given, golds, task="LaMP_5")
    lamp(golds, "LaMP_5", TITLES, 0)
    (half,) = score_files(given, golds)
    assert known.task == silent.task == half.task == "LaMP_5"
    assert known.values == silent.values == half.values
    with pytest.raises(DataError, match="--task 'LaMP_9' is not known; legal are LaMP_1, LaMP_2, LaMP_2M"):
        score_files(given, golds, task="LaMP_9")
    with pytest.raises(DataError, match="holds no answers of task LaMP_4; its `task` says LaMP_5"):
        score_files(given, golds, task="LaMP_4")


def test_the_two_names_of_a_task_are_one(tmp_path):
    movies = {"1": ("comedy", "comedy"), "2": ("action", "comedy")}
    given, golds = files(tmp_path, "LaMP_2", movies)
    lamp(given, "LaMP_2M", movies, 1)
    (score,) = score_files(given, golds)
    assert (score.task, score.values["accuracy"]) == ("LaMP_2M", 0.5)
    for task in ("LaMP_2", "LaMP_2M"):
        assert score_files(given, golds, task=task) == [score]
    lamp(golds, "LaMP_2N", movies, 0)
    with pytest.raises(DataError, match=r"answers task 'LaMP_2M', but the golds of .* are of LaMP_2N"):
        score_files(given, golds)


def test_of_a_folder_of_golds_those_are_taken_whose_ids_are_answered(tmp_path):
    given, dev = files(tmp_path, "LaMP_5", TITLES)
    train = lamp(tmp_path / "train_outputs.json", "LaMP_5", {"t": ("other", "")}, 0)
    folder = tmp_path / "golds"
    folder.mkdir()
    for path in (train, dev):
        path.rename(folder / path.name)
    (score,) = score_files(given, folder)
    assert score.golds == str(folder / "dev_outputs.json")
    lamp(given, "LaMP_5", {"x": TITLES["x"]}, 1)
    with pytest.raises(DataError, match=r"1 question \('y'\) of .*dev_outputs.json without an answer"):
        score_files(given, folder)
    lamp(folder / "test_outputs.json", "LaMP_5", {"x": TITLES["x"]}, 0)
    (score,) = score_files(given, folder)
    assert score.golds == str(folder / "test_outputs.json"), "the one with exactly these ids"
    lamp(folder / "test_outputs.json", "LaMP_5", TITLES, 0)
    with pytest.raises(DataError, match=r"several files: .*dev_outputs.json \(1 ids in common\), .*test_outputs.json"):
        score_files(given, folder)
    lamp(given, "LaMP_5", {"q": TITLES["x"]}, 1)
    with pytest.raises(DataError, match=r"answers no question of .*dev_outputs\.json"):
        score_files(given, folder)


def test_predictions_of_one_task_in_two_files_are_refused(tmp_path):
    given, golds = files(tmp_path, "LaMP_5", TITLES)
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("one.json", "two.json"):
        (folder / name).write_bytes(given.read_bytes())
    with pytest.raises(DataError, match=r"2 files hold answers of task 'LaMP_5' \(.*one.json, .*two.json\)"):
        score_files(folder, golds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "dev_outputs.json is empty"),
        ('{"user": "ann", "query": "?"}\n{"user": "bob", "query": "?"}\n', "holds lines of JSON"),
        ('{"task": ', "is no JSON"),
        ('{"task": 3, "golds": []}', "not in LaMP's form"),
    ],
)
def test_what_is_no_file_of_outputs_is_told_what_one_looks_like(tmp_path, text, message):
    given, golds = files(tmp_path, "LaMP_5", TITLES)
    golds.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        score_files(given, golds)
    assert '{"task": "LaMP_3", "golds": [{"id": "310", "output": "4"}, ...]}' in str(caught.value)


def test_answers_that_cannot_be_read_are_counted(tmp_path):
    pairs = {str(n): ("3", text) for n, text in enumerate(["three stars", " nan", "700", "3.5", "4", "", "nan"])}
    (score,) = score_files(*files(tmp_path / "ratings", "LaMP_3", pairs))
    found = [(odd.what, odd.num, odd.num_predictions, odd.examples) for odd in score.odd]
    assert found == [("no number", 4, 7, ("three stars", "nan", "")), ("outside 1 to 5", 1, 7, ("700",))]
    (score,) = score_files(*files(tmp_path / "news", "LaMP_2", NEWS))
    assert [str(odd) for odd in score.odd] == [
        "2 of 5 predictions are outside the label set, counted as wrong: 'Sports', 'no such label'"
    ]
    written = as_json([score])["tasks"]["LaMP_2N"]["odd_predictions"]
    assert written["outside the label set"]["num"] == 2
    (score,) = score_files(*files(tmp_path / "titles", "LaMP_5", TITLES))
    assert score.odd == []


def test_what_does_not_match_is_named(tmp_path):
    given, golds = files(tmp_path, "LaMP_5", TITLES)
    lamp(given, "LaMP_5", {"x": TITLES["x"], "z": TITLES["y"]}, 1)
    with pytest.raises(DataError, match=r"1 question \('y'\) of .* without an answer and 1 answer \('z'\) to no"):
        score_files(given, golds)
    lamp(given, "LaMP_4", TITLES, 1)
    with pytest.raises(DataError, match=r"answers task 'LaMP_4', but the golds of .* are of LaMP_5"):
        score_files(given, golds)
    twice = {"task": "LaMP_5", "golds": [{"id": "x", "output": "a"}, {"id": "x", "output": "b"}]}
    write_json(given, twice)
    with pytest.raises(DataError, match=r"1 id \('x'\) more than once"):
        score_files(given, golds)
    write_json(given, [])
    with pytest.raises(DataError, match="not in LaMP's form"):
        score_files(given, golds)


def test_the_command_prints_and_writes(tmp_path):
    given, golds = files(tmp_path, "LaMP_3", RATINGS)
    asked = ["evaluate", "--predictions", given, "--golds", golds, "--json", tmp_path / "scores.json"]
    result = CliRunner().invoke(app, list(map(str, asked)))
    assert result.exit_code == 0 and "LaMP_3: 3 of 7 predictions are no number" in result.output
    written = json.loads((tmp_path / "scores.json").read_text())["tasks"]["LaMP_3"]
    assert written["num_questions"] == 7 and f"{written['metrics']['mae']['value']:.4f}" in result.output
    result = CliRunner().invoke(app, list(map(str, [*asked, "--task", "LaMP_5"])))
    assert isinstance(result.exception, DataError) and "holds no answers of task LaMP_5" in str(result.exception)


def test_meteor_by_hand():
    """Exact and stem matches; F = 10PR/(R+9P) and a penalty of half the cube of chunks over matches."""
    assert meteor("the cat sat", "the cat sat") == pytest.approx(1 - 0.5 * (1 / 3) ** 3)
    assert meteor("dogs running", "the dog runs") == pytest.approx((1 - 0.5 * (1 / 2) ** 3) * 10 * (2 / 3) / (1 + 6))
    assert meteor("forever", "always") == 0
    assert meteor("", "") == 0


def test_meteor_parts_every_sentence_from_its_full_stop():
    """As nltk's own word_tokenize does, which splits sentences first."""
    text = 'We propose results. They hold up "now." (Fine work.) Smith et al. Wrote it.\nSo did Dr. May'
    wanted = "We propose results . They hold up `` now . '' ( Fine work . ) Smith et al. Wrote it . So did Dr. May"
    assert words_of(text) == wanted.split()
    text = "We propose results. They hold up. Fine work."
    assert meteor(text, text.replace(".", " .")) == pytest.approx(1 - 0.5 / 11**3)
