"""Personal tokens: negative ids are what a plain model makes of `inputs_embeds`, in all the ways we run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.batches import collate
from proper_ds.evaluation.predict import generate, score_labels
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.persona import PERSONAL, Persona, PersonaInputs, PersonaSizes, embedding_norm, unit
from proper_ds.model.routing import Rows
from proper_ds.training.persona_inputs import with_personal
from tests.fakes import VOCAB, random_examples, tiny_llama

NUM_ROWS, LABELS = 5, [[5, 2], [6, 7, 2], [6, 8, 9, 2], [10, 2]]


@pytest.fixture(scope="module")
def personal():
    """(model with personal tokens switched on, the same base untouched, tokens of each row)."""
    model = PersonalModel(tiny_llama(), {})
    model.attach_persona(True)
    prefix_RPD = torch.randn(NUM_ROWS, len(PERSONAL), 32, generator=torch.Generator().manual_seed(3)) * 0.4
    return model, tiny_llama(), prefix_RPD


def examples():
    return random_examples(NUM_ROWS, 3, seed=6)


def prompts():
    return [np.asarray([*PERSONAL, *e.ids[: e.num_prompt]]) for e in examples()]


def plain_logits(lm, prefix_PD, ids):
    """Of the tokens alone, by a call that knows nothing of negative ids."""
    embeds = torch.cat([prefix_PD, lm.get_input_embeddings()(torch.as_tensor(ids))])
    with torch.no_grad():
        return lm(inputs_embeds=embeds.unsqueeze(0)).logits[0]


def test_label_scores_equal_plain_embeddings(personal):
    model, lm, prefix_RPD = personal
    model.set_rows(Rows(prefix_RPD=prefix_RPD))
    found_RL = score_labels(model, prompts(), LABELS)
    for row, example in enumerate(examples()):
        prompt = example.ids[: example.num_prompt].tolist()
        for number, label in enumerate(LABELS):
            logp = plain_logits(lm, prefix_RPD[row], prompt + label).log_softmax(-1)
            first = len(PERSONAL) + len(prompt) - 1
            wanted = sum(float(logp[first + depth, token]) for depth, token in enumerate(label))
            assert float(found_RL[row, number]) == pytest.approx(wanted, abs=1e-5)
    assert found_RL.std(0).min() > 1e-3, "users differ"


def test_losses_of_right_padded_rows_equal_plain_embeddings(personal):
    model, lm, prefix_RPD = personal
    batch = collate([with_personal(example) for example in examples()])
    assert len(set(batch.length_R.tolist())) > 1, "rows must be padded"
    model.set_rows(Rows(prefix_RPD=prefix_RPD))
    losses_K = model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    for row, example in enumerate(examples()):
        logits = plain_logits(lm, prefix_RPD[row], example.ids)[len(PERSONAL) + example.num_prompt - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(
            logits, torch.as_tensor(example.ids[example.num_prompt :]), reduction="none"
        )
        torch.testing.assert_close(losses_K[batch.row_K == row], wanted, rtol=0, atol=1e-5)


def test_generation_from_left_padded_rows_equals_plain_embeddings(personal):
    model, lm, prefix_RPD = personal
    model.set_rows(Rows(prefix_RPD=prefix_RPD))
    for row, (example, together) in enumerate(zip(examples(), generate(model, prompts(), 6, eos=2), strict=True)):
        ids = example.ids[: example.num_prompt].tolist()
        for _ in range(6):
            ids.append(int(plain_logits(lm, prefix_RPD[row], ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        alone = ids[example.num_prompt :]
        assert together[: len(alone)] == alone


def test_a_user_in_a_batch_is_the_user_alone(personal):
    model, _, prefix_RPD = personal
    model.set_rows(Rows(prefix_RPD=prefix_RPD))
    together_RL = score_labels(model, prompts(), LABELS)
    for row, prompt in enumerate(prompts()):
        model.set_rows(Rows(prefix_RPD=prefix_RPD[row : row + 1]))
        torch.testing.assert_close(score_labels(model, [prompt], LABELS)[0], together_RL[row], rtol=0, atol=1e-5)


def test_switched_off_the_base_is_as_it_was():
    lm = tiny_llama()
    before = lm.get_input_embeddings()
    model = PersonalModel(lm, {})
    model.attach_persona(False)
    model.attach_persona(True)
    model.attach_persona(True)
    assert lm.get_input_embeddings() is not before
    model.attach_persona(False)
    assert lm.get_input_embeddings() is before
    assert lm.get_output_embeddings().weight is before.weight


def made_inputs(counts, size=6, seed=0):
    """Of rows with so many items, the rest padding that holds nonsense."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(counts), max(1, *counts), size)
    parts = [torch.randn(shape, generator=generator) for _ in range(2)]
    is_item_RI = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    return PersonaInputs(torch.randn(len(counts), size, generator=generator), *parts, is_item_RI)


def made_persona(norm=1.7):
    persona = Persona(PersonaSizes(6, 32, 0.5, norm), seed=4)
    torch.nn.init.normal_(persona.no_history)
    return persona


def test_the_equations_written_out():
    persona, inputs = made_persona(), made_inputs([3])
    found = persona(inputs)[0]
    q = persona.question @ inputs.question_RE[0]
    w = torch.stack([q @ inputs.keys_RIE[0, i] / 0.5 for i in range(3)]).softmax(0)
    user = sum(w[i] * persona.user(inputs.values_RIE[0, i]) for i in range(3))
    instruction = persona.instruction(persona.instruction_vector)
    for token, wanted in zip(found, (instruction, user), strict=True):
        torch.testing.assert_close(token, 1.7 * wanted / wanted.norm(), rtol=1e-5, atol=1e-6)


@given(counts=st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_rows_do_not_see_each_other_nor_padding(counts):
    persona, inputs = made_persona(), made_inputs(counts)
    together_RPD = persona(inputs)
    weights_RI = persona.weights(inputs)
    torch.testing.assert_close(weights_RI.sum(1), torch.tensor([float(count > 0) for count in counts]))
    for row, count in enumerate(counts):
        alone = PersonaInputs(
            inputs.question_RE[row : row + 1],
            inputs.keys_RIE[row : row + 1, : max(1, count)],
            inputs.values_RIE[row : row + 1, : max(1, count)],
            inputs.is_item_RI[row : row + 1, : max(1, count)],
        )
        torch.testing.assert_close(persona(alone)[0], together_RPD[row], rtol=1e-5, atol=1e-5)


def test_users_without_history_have_a_learned_token_that_trains():
    persona, inputs = made_persona(), made_inputs([0, 2])
    made_RPD = persona(inputs)
    torch.testing.assert_close(made_RPD[0, 1], persona(made_inputs([0, 0], seed=9))[1, 1])
    assert not torch.allclose(made_RPD[0, 1], made_RPD[1, 1], atol=1e-2)
    made_RPD[0, 1].sum().backward()
    assert persona.no_history.grad.abs().sum() > 0


def test_tokens_are_as_long_as_the_base_has_them():
    lm = tiny_llama()
    norm = embedding_norm(lm.get_input_embeddings(), VOCAB, "cpu")
    assert norm == pytest.approx(float(lm.get_input_embeddings().weight.norm(dim=-1).mean()), rel=1e-5)
    norms = made_persona(norm)(made_inputs([2, 0])).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, norm))


def test_what_all_embeddings_share_is_taken_out():
    rows = torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    torch.testing.assert_close(unit(rows, rows.mean(0)), torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
