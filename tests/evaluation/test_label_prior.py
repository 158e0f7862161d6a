"""A user's own labels as a prior: what it is, how it is learned, whose questions it is learned from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import RunConfig
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.tokens import HISTORY, QUERY
from proper_ds.errors import DataError
from proper_ds.evaluation import prior_fit
from proper_ds.evaluation.answers import write_answers
from proper_ds.evaluation.label_prior import LabelPrior, counts_of, fit_prior, load_priors, log_ratio
from proper_ds.evaluation.methods import METHODS, needs_of_methods
from tests.evaluation.crafted import row, table
from tests.fakes import write_json

LABELS = ("a", "b", "c")
SHARE = np.array([0.5, 0.3, 0.2])


def prior(weight=1.0, prior_items=2.0):
    return LabelPrior(LABELS, tuple(SHARE), prior_items, weight, 1, 1.0, 1.0, 1.0)


def test_it_is_bayes_rule_with_the_mean_of_the_dirichlet_posterior():
    own = ["b", "b", "c"]
    rho = (np.array([0, 2, 1]) + 2.0 * SHARE) / (3 + 2.0)
    likelihood = np.array([0.7, 0.2, 0.1])  # p(y | question) of a model that knows everybody's shares
    wanted = likelihood * rho / SHARE
    found = np.exp(prior().weighed(np.log(likelihood).tolist(), own))
    assert found / found.sum() == pytest.approx(wanted / wanted.sum())


@given(scores=st.lists(st.floats(-20, 0), min_size=3, max_size=3), weight=st.floats(0, 1.5), items=st.floats(0.1, 100))
def test_nobodys_history_and_no_weight_change_nothing(scores, weight, items):
    assert prior(weight, items).weighed(scores, []) == pytest.approx(scores, abs=1e-9)
    assert prior(0.0, items).weighed(scores, ["a", "c"]) == pytest.approx(scores)


@given(st.lists(st.sampled_from(LABELS), max_size=30), st.floats(0.1, 50))
def test_shares_of_a_user_add_up_and_go_from_everybodys_to_the_own(own, items):
    counts = np.asarray([counts_of(own, LABELS)])
    rho = np.exp(log_ratio(counts, SHARE, items))[0] * SHARE
    assert rho.sum() == pytest.approx(1)
    free = counts[0] / max(1, len(own)) if own else SHARE
    assert (rho >= np.minimum(free, SHARE) - 1e-9).all() and (rho <= np.maximum(free, SHARE) + 1e-9).all()


def answered(num_users, concentration, seed=0, num_items=6):
    """Users with label shares of their own, drawn around SHARE, and a model that knows nothing of the question."""
    generator = np.random.default_rng(seed)
    own = generator.dirichlet(concentration * SHARE, num_users)
    counts = np.stack([generator.multinomial(num_items, share) for share in own])
    gold = np.array([generator.choice(3, p=share) for share in own])
    return np.tile(np.log(SHARE), (num_users, 1)), counts, gold


def test_it_finds_how_much_a_history_says():
    found = fit_prior(LABELS, SHARE, *answered(4000, concentration=3.0))
    assert found.nll_after < found.nll_before - 0.05
    assert 1.5 <= found.prior_items <= 6 and 0.7 <= found.weight <= 1.3, "the generating prior is worth three items"


@given(st.integers(0, 1000))
def test_it_never_fits_worse_than_without(seed):
    generator = np.random.default_rng(seed)
    scores, counts, gold = (
        generator.normal(size=(20, 3)),
        generator.integers(0, 4, (20, 3)),
        generator.integers(0, 3, 20),
    )
    found = fit_prior(LABELS, SHARE, scores, counts, gold)
    assert found.nll_after <= found.nll_before
    share = np.asarray(found.share)
    logits = scores + found.weight * log_ratio(counts, share, found.prior_items)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert -logp[np.arange(20), gold].mean() == pytest.approx(found.nll_after)


def test_a_level_that_has_not_learned_the_labels_is_told():
    scores, counts, gold = answered(200, concentration=3.0)
    assert not fit_prior(LABELS, SHARE, scores - 1e-9, counts, gold).is_level_worse
    wrong = fit_prior(LABELS, SHARE, np.tile(np.log([0.05, 0.05, 0.9]), (200, 1)), counts, gold)
    assert wrong.is_level_worse and "by everybody's shares alone" in str(wrong)


def test_labels_that_say_nothing_get_no_weight():
    scores, counts, gold = answered(4000, concentration=3.0)
    shuffled = np.random.default_rng(1).permutation(counts)
    assert fit_prior(LABELS, SHARE, scores, shuffled, gold).weight <= 0.1


def folder_of(path):
    """Two training users and a dev user in LaMP-2's form, who file everything under a label of their own."""

    def question(number, user, label):
        items = [{"id": f"{user}{n}", "text": f"t{user}{n}", "title": "t", "category": label} for n in range(3)]
        return {"id": str(number), "user_id": user, "input": f"article: of {user}", "profile": items}

    for split, users in (("train", {"u": "sports", "v": "travel"}), ("dev", {"w": "women"})):
        asked = [question(n, user, label) for n, (user, label) in enumerate(users.items())]
        golds = [{"id": str(n), "output": label} for n, label in enumerate(users.values())]
        write_json(path / f"{split}_questions.json", asked)
        write_json(path / f"{split}_outputs.json", {"task": "LaMP_2", "golds": golds})
    return path


def test_a_fit_counts_training_users_alone_and_keeps_nothing_of_one(tmp_path):
    prepare(DataConfig(path=[str(folder_of(tmp_path / "in"))]), tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    labels = prepared.manifest.tasks["LaMP_2N"].labels
    place = {user.key: index for index, user in enumerate(prepared.users())}
    rows = [
        row("group", place[user], 0, label, label, 3) | {"task": "LaMP_2N", "scores": [0.0] * len(labels)}
        for user, label in (("u", "sports"), ("v", "travel"))
    ]
    folders = [tmp_path / "prior", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        write_answers(folder, "unit", table(rows))
        np.save(folder / prior_fit.ASKED, np.array([key != "w" for key in place]))
    made = prior_fit.finish(prepared, folders, "train")
    assert [[path.name for path in folder.iterdir()] for folder in folders] == [["prior.json"]] * 2
    assert [load_priors(folder) for folder in folders] == made
    about = made[0]["LaMP_2N"]
    share = dict(zip(about.labels, np.asarray(about.share) * (6 + len(labels)), strict=True))
    assert share["sports"] == share["travel"] == pytest.approx(4), "three items each, and one more"
    assert share["women"] == pytest.approx(1), "a dev user's history is nobody's prior"
    assert about.num_questions == 2 and about.weight > 0 and about.nll_after < about.nll_before


def context_of(users, max_users, tasks=None):
    """Users as lists of (kind, split, task) of their examples, all questions answered."""
    rows = [(n, *example) for n, own in enumerate(users) for example in own]
    columns = dict(zip(("user", "kind", "split", "task"), np.asarray(rows).T, strict=True))
    columns["has_answer"] = np.ones(len(rows), dtype=bool)
    tokens = SimpleNamespace(
        num_users=len(users),
        blocks=lambda: [(0, len(rows))],
        column=lambda name, start, stop: columns[name][start:stop],
        split_code=["train", "dev"].index,
    )
    tasks = tasks or {"task": SimpleNamespace(labels=LABELS, lamp_id="LaMP_2")}
    config = RunConfig(output_dir="x", prior={"max_users": max_users}, evaluation={"methods": ["group+prior"]})
    prepared = SimpleNamespace(manifest=SimpleNamespace(tasks=tasks), users=lambda: [])
    return SimpleNamespace(tokens=tokens, config=config, prepared=prepared)


ITEM, ASKED_IN_TRAIN, ASKED_IN_DEV = (HISTORY, -1, 0), (QUERY, 0, 0), (QUERY, 1, 0)


def test_asked_are_training_users_with_history(tmp_path):
    users = [[ITEM, ASKED_IN_TRAIN], [ITEM, ASKED_IN_DEV], [ASKED_IN_TRAIN], [ITEM], *[[ITEM, ASKED_IN_TRAIN]] * 20]
    mask = prior_fit.choose_asked(context_of(users, None), tmp_path)
    assert np.flatnonzero(mask).tolist() == [0, *range(4, 24)]
    sample = prior_fit.choose_asked(context_of(users, 5), tmp_path)
    assert sample.sum() == 5 and not (sample & ~mask).any()
    assert np.array_equal(np.load(tmp_path / prior_fit.ASKED), sample)


def test_each_task_with_labels_has_a_sample_of_its_own(tmp_path):
    """Many users of a task with open answers, and some who only have items of it, leave the others' places alone."""
    tasks = {
        "open": SimpleNamespace(labels=None, lamp_id="LaMP_5"),
        "labelled": SimpleNamespace(labels=LABELS, lamp_id="LaMP_2"),
    }
    users = [[ITEM, ASKED_IN_TRAIN]] * 300 + [[ITEM, (QUERY, 0, 1)]] * 5 + [[(HISTORY, -1, 1), (QUERY, 0, 1)]] * 8
    mask = prior_fit.choose_asked(context_of(users, 6, tasks), tmp_path)
    assert mask.sum() == 6 and not mask[:305].any()
    with pytest.raises(DataError, match="of task labelled"):
        prior_fit.choose_asked(context_of(users[:305], 6, tasks), tmp_path)


@pytest.mark.parametrize(("labels", "lamp_id"), [(None, "LaMP_5"), (LABELS, "LaMP_1")])
def test_without_labels_in_histories_nobody_is_asked_and_nothing_answered(tmp_path, caplog, labels, lamp_id):
    context = context_of([[ITEM, ASKED_IN_TRAIN]], None, {"t": SimpleNamespace(labels=labels, lamp_id=lamp_id)})
    with caplog.at_level("WARNING", logger="proper_ds"):
        assert not prior_fit.choose_asked(context, tmp_path).any()
    assert "methods with a label prior (group+prior) answer nothing" in caplog.text
    assert prior_fit.finish(context.prepared, [tmp_path], "train") == [{}]
    assert load_priors(tmp_path) == {}


def test_nobody_to_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to learn from"):
        prior_fit.choose_asked(context_of([[ITEM, ASKED_IN_DEV], [ASKED_IN_TRAIN]], None), tmp_path)


def test_a_prior_needs_the_level_that_it_weighs():
    (lane,) = needs_of_methods([METHODS["group+prior"], METHODS["population+prior"]]).lanes
    stages = lane.stages("encoder")
    assert stages[-2:] == ["prior/proper", "prior/population"]
    assert {"population", "features", "group/proper"} <= set(stages)
    assert METHODS["group+prior"].stages[-1] == "prior/proper"
    assert METHODS["group+prior"].without_prior.stages == METHODS["group"].stages
