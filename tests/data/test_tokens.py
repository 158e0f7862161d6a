"""Text to tokens to batches: answers are never cut, evaluation prompts know no gold, orders are functions of seeds."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.data.batches import collate, length_batches
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import Known, prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import HISTORY, QUERY, TokenData, tokenize
from proper_ds.errors import DataError
from proper_ds.model.config import CreateBase
from proper_ds.training.create_base import train_tokenizer
from tests.fakes import random_examples, write_json

SUFFIX = "\n### Output:"


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        "What is the score of the review? review: good film, bad film" + SUFFIX + f" {n}" for n in range(1, 6)
    ] * 20
    return train_tokenizer(texts, CreateBase(vocab_size=300))


def test_prompt_suffix_and_answer_stand_whole_when_the_input_is_cut(tokenizer):
    encoder = PromptEncoder(tokenizer, SUFFIX, max_length=60)
    short, long = encoder.encode("good film", "4"), encoder.encode("good film " * 80, "4")
    assert short.num_cut == 0
    assert long.num_cut > 0
    assert len(long.ids) == 60
    assert tokenizer.decode(long.ids[long.num_prompt :]) == " 4</s>"
    assert tokenizer.decode(long.ids[: long.num_prompt]).endswith(SUFFIX)
    assert tokenizer.decode(long.ids[: long.num_prompt]).startswith("<s>good film"), "the head is kept"
    assert encoder.decode(long.ids[long.num_prompt :]) == "4"


@pytest.mark.parametrize("kind", ["history", "query"])
def test_cut_prompts_are_cut_alike_whatever_their_answer(tokenizer, tmp_path, kind):
    """Else a model could tell the label by the prompt's length, in training only."""
    labels, length = ["short", "a label that is a good deal longer than the other"], 80
    text = "good film " * 80
    rows = [
        {
            "user": f"u{n}",
            "history": [{"input": text + str(n), "output": label}],
            "query": f"{n} review of a bad score " * 40,
            "answer": label,
            "split": split,
        }
        for n, (label, split) in enumerate([(label, split) for label in labels for split in ("train", "dev")])
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_json(tmp_path / "info.json", {"labels": labels})
    config = DataConfig(path=str(tmp_path), task="generic")
    prepare(config, tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    tokenize(prepared, PromptEncoder(tokenizer, SUFFIX, length), tmp_path / "tokens", "train", None)
    data = TokenData(tmp_path / "tokens")
    found = data.examples_of(0, data.num_examples)
    wanted = [e for e in found if e.kind == (HISTORY if kind == "history" else QUERY)]
    assert len(wanted) == 4
    assert len({e.num_prompt for e in wanted}) == 1
    assert {e.num_prompt for e in wanted} == {e.num_prompt for e in found if e.kind == QUERY}


def test_an_answer_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"answers are never cut: raise base.max_length"):
        PromptEncoder(tokenizer, SUFFIX, max_length=40).encode("x", "good film " * 40)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.text(min_size=1, max_size=20), st.integers(120, 200))
def test_any_text_fits_and_keeps_its_answer(tokenizer, text, answer, max_length):
    encoder = PromptEncoder(tokenizer, SUFFIX, max_length)
    found = encoder.encode(text, answer)
    assert len(found.ids) <= max_length
    assert found.ids[found.num_prompt :] == encoder.answer_ids(answer)
    assert found.ids[-1] == encoder.eos


def test_labels_that_look_alike_to_the_tokenizer_are_refused(tokenizer):
    from proper_ds.data.manifest import TaskManifest
    from proper_ds.data.tasks import TASKS

    class Deaf:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [3 for _ in text.replace("[", "").replace("]", "")]}

    raw = TaskManifest.of(TASKS["LaMP_1"], "", False)
    with pytest.raises(DataError, match=r"'\[1\]' and '\[2\]' alike"):
        PromptEncoder(Deaf(), SUFFIX, 50).label_ids(raw)


def test_tokenised_data_holds_every_example_in_user_order(prepared, tokenizer, tmp_path):
    encoder = PromptEncoder(tokenizer, SUFFIX, 128)
    tokenize(prepared, encoder, tmp_path / "tokens", "train", None)
    data = TokenData(tmp_path / "tokens")
    assert data.num_users == 5
    kinds, users = data.column("kind"), data.column("user")
    for index, user in enumerate(prepared.users()):
        start, stop = data.range_of(index)
        assert (users[start:stop] == index).all()
        examples = data.examples_of(start, stop)
        history = [e for e in examples if e.kind == HISTORY]
        assert [tokenizer.decode(e.ids[e.num_prompt :]).strip() for e in history] == [
            f"{h.answer}</s>" for h in user.history
        ]
        for e in (e for e in examples if e.kind == QUERY):
            split = user.queries[e.position].split
            assert (e.num_targets > 0) == (split == "train"), "only training questions carry their gold"
    assert data.marker["num_examples"] == len(kinds) == 10 + 5
    assert data.labels("LaMP_3") == encoder.label_ids(prepared.manifest.tasks["LaMP_3"])
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["tasks"] == ["LaMP_3"]


def test_examples_are_found_in_any_order_over_many_files(prepared, tokenizer, tmp_path, monkeypatch):
    encoder = PromptEncoder(tokenizer, SUFFIX, 128)
    tokenize(prepared, encoder, tmp_path / "one", "train", None)
    monkeypatch.setattr("proper_ds.data.tokens.EXAMPLES_PER_FILE", 4)
    monkeypatch.setattr("proper_ds.data.tokens.ROWS_PER_BATCH", 2)
    tokenize(prepared, encoder, tmp_path / "many", "train", None)
    one, many = TokenData(tmp_path / "one"), TokenData(tmp_path / "many")
    assert len(many.marker["files"]) == 4
    for name in ("user", "kind", "split", "position", "num_tokens", "has_answer"):
        for start, stop in ((0, 15), (3, 9), (6, 6), (13, 15)):
            assert many.column(name, start, stop).tolist() == one.column(name)[start:stop].tolist()
            assert many.column(name, start, stop).dtype == one.column(name).dtype
    order = [14, 3, 3, 0, 8, 7, 11]
    for found in (many.examples(order), one.examples(order)):
        assert [(e.user, e.position, e.ids.tolist()) for e in found] == [
            (e.user, e.position, e.ids.tolist()) for n in order for e in one.examples_of(n, n + 1)
        ]
    assert [e.ids.tolist() for e in many.examples_of(2, 13)] == [e.ids.tolist() for e in one.examples(range(2, 13))]
    assert many.history_digests(0, 5) == one.history_digests(0, 5)
    (tmp_path / "many" / many.marker["files"][1]).write_bytes((tmp_path / "one" / one.marker["files"][0]).read_bytes())
    with pytest.raises(DataError, match="holds 15 rows where 4 were written"):
        TokenData(tmp_path / "many").column("kind", 4, 6)


def test_the_digest_of_a_history_is_that_of_its_tokens_wherever_they_stand(prepared, tokenizer, tmp_path, monkeypatch):
    tokenize(prepared, PromptEncoder(tokenizer, SUFFIX, 128), tmp_path / "one", "train", None)
    one = TokenData(tmp_path / "one").history_digests(0, 5)
    cold = [not user.history for user in prepared.users()]
    assert [not digest for digest in one] == cold
    assert len(set(one)) == 5
    monkeypatch.setattr("proper_ds.data.tokens.USERS_PER_DIGEST", 2)
    assert TokenData(tmp_path / "one").history_digests(1, 4) == one[1:4]

    known = Known(users=[user.key for user in prepared.users()][::-1])
    prepare(DataConfig(path=str(tmp_path / "in")), tmp_path / "turned", known=known)
    tokenize(PreparedData(tmp_path / "turned"), PromptEncoder(tokenizer, SUFFIX, 128), tmp_path / "two", "train", None)
    assert TokenData(tmp_path / "two").history_digests(0, 5) == one[::-1]
    tokenize(prepared, PromptEncoder(tokenizer, SUFFIX + "!", 128), tmp_path / "three", "train", None)
    other = TokenData(tmp_path / "three").history_digests(0, 5)
    assert all(a != b or not a for a, b in zip(one, other, strict=True))


def test_batches_point_at_the_answers():
    examples = random_examples(7, 1, seed=2)
    batch = collate(examples)
    for row, e in enumerate(examples):
        mine = batch.row_K == row
        assert batch.target_K[mine].tolist() == e.ids[e.num_prompt :].tolist()
        assert batch.position_K[mine].tolist() == list(range(e.num_prompt - 1, len(e.ids) - 1))
        assert batch.ids_RT[row, : len(e.ids)].tolist() == e.ids.tolist()
    assert batch.mask_RT.sum() == sum(len(e.ids) for e in examples)
    assert batch.ids_RT.dtype == torch.int64


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
def test_length_batches_hold_everyone_once_within_the_budget(lengths, budget):
    batches = length_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget
