"""Embeddings: read back by user over units, equal to each text alone, and nothing of an answer is in a question's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proper_ds.data.tokens import HISTORY, QUERY, Example
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.persona import PERSONAL, Persona, PersonaSizes
from proper_ds.training.embeddings import EmbeddingData, UserEmbeddings, write_embeddings
from proper_ds.training.embeddings_job import base_embeddings
from proper_ds.training.persona_inputs import PplugInputs, with_personal
from tests.fakes import random_examples, tiny_llama

SIZE = 5
COUNTS = [[(2, 1), (0, 2)], [(3, 0), (1, 1)]]
"""By unit and user: items, questions."""


@pytest.fixture
def written(tmp_path):
    """(reader, each user's embeddings)."""
    generator, users, first = torch.Generator().manual_seed(1), [], 0
    for unit in COUNTS:
        made = [
            UserEmbeddings(*(torch.randn(n, SIZE, generator=generator) for n in (items, items, questions)))
            for items, questions in unit
        ]
        write_embeddings(tmp_path, first, made)
        users += made
        first += len(made)
    return EmbeddingData(tmp_path), users


def test_users_are_found_across_units(written):
    data, users = written
    assert data.embedding_size == SIZE
    for number, wanted in enumerate(users):
        found = data.user(number)
        for name in ("keys_IE", "values_IE", "queries_QE"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert [data.has(user) for user in range(5)] == [True] * 4 + [False]


def test_means_are_of_the_chosen_users_items(written):
    data, users = written
    key_mean, value_mean = data.means(np.asarray([True, True, False, True]))
    torch.testing.assert_close(key_mean, torch.cat([users[0].keys_IE, users[3].keys_IE]).mean(0))
    torch.testing.assert_close(value_mean, torch.cat([users[0].values_IE, users[3].values_IE]).mean(0))


def inputs_of(data):
    return PplugInputs(data, Persona(PersonaSizes(SIZE, 8, 1.0, 1.0), seed=0), torch.device("cpu"))


def example(user, kind, position):
    return Example(user, kind, 0, position, 3, np.asarray([5, 6, 7, 8]))


def test_an_item_sees_the_items_before_it_only_and_a_question_all(written):
    data, users = written
    asked = [example(2, HISTORY, 1), example(2, HISTORY, 0), example(0, QUERY, 0), example(1, QUERY, 1)]
    found = inputs_of(data).of(asked)
    assert found.is_item_RI.sum(1).tolist() == [1, 0, 2, 0]
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(found.question_RE[0], normal(users[2].keys_IE[1], dim=0))
    torch.testing.assert_close(found.keys_RIE[0, 0], normal(users[2].keys_IE[0], dim=0))
    torch.testing.assert_close(found.values_RIE[2, 1], normal(users[0].values_IE[1], dim=0))
    torch.testing.assert_close(found.question_RE[3], normal(users[1].queries_QE[1], dim=0))


def test_history_dropout_is_a_function_of_the_seed(written):
    data, _ = written
    asked, kept = [example(0, QUERY, 0)], set()
    for seed in range(40):
        first, again = (inputs_of(data).of(asked, 0.9, [seed]) for _ in range(2))
        assert torch.equal(first.is_item_RI, again.is_item_RI)
        kept.add(int(first.is_item_RI.sum()))
    assert kept == {0, 1, 2}


def test_base_embeddings_equal_each_text_alone():
    model = PersonalModel(tiny_llama(), {})
    examples = random_examples(7, 1, seed=2)
    examples.append(Example(1, QUERY, 0, 0, 4, np.asarray([5, 6, 7, 8])))
    prompts_ND, answers_ND = base_embeddings(model, examples, num_tokens=60)
    for row, made in enumerate(examples):
        alone = model.hidden(torch.from_numpy(made.ids[None, : made.num_prompt]))[0]
        torch.testing.assert_close(prompts_ND[row], alone.mean(0), rtol=1e-4, atol=1e-5)
        whole = model.hidden(torch.from_numpy(made.ids[None]))[0, made.num_prompt :]
        wanted = whole.mean(0) if len(whole) else torch.zeros(32)
        torch.testing.assert_close(answers_ND[row], wanted, rtol=1e-4, atol=1e-5)


def test_personal_tokens_stand_before_the_prompt():
    made = with_personal(example(0, HISTORY, 0))
    assert made.ids.tolist() == [*PERSONAL, 5, 6, 7, 8]
    assert (made.num_prompt, made.num_targets) == (5, 1)
