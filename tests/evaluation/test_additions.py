"""Personal tokens, PLoRA's vectors and merged adapters: made of a user's own data, whoever else is in the batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proper_ds.config import RunConfig
from proper_ds.data.tokens import QUERY, Example
from proper_ds.errors import AdapterError
from proper_ds.evaluation.additions import MergedAnswers, PloraAnswers, PplugAnswers
from proper_ds.model import persona as persona_file
from proper_ds.model import plora as plora_file
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.persona import PERSONAL, Persona, PersonaSizes
from proper_ds.model.plora import PersonalLoras
from proper_ds.model.weights_file import save_weights
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store
from proper_ds.training.embeddings import UserEmbeddings, write_embeddings
from proper_ds.training.features import write_features
from proper_ds.training.persona_inputs import check_room
from tests.fakes import tiny_llama
from tests.store.stores import put
from tests.training.test_anchors import tokens_of

USERS = [(2, ["train"]), (0, ["dev"]), (1, ["dev"]), (3, ["train"]), (2, ["dev"]), (1, ["train"])]
"""History items and splits of questions; 0, 3 and 5 are training users, 1 is evaluated without history."""
SIZE, TARGETS = 6, ["q_proj", "down_proj"]


def layout_of(lm):
    return LoraLayout.of(find_targets(lm, TARGETS), LoraSettings(r=2, lora_alpha=4, target_modules=TARGETS))


@pytest.fixture
def context(tmp_path):
    merge, base = {"num_anchors": 3, "num_neighbours": 2}, {"max_length": 126}
    config = RunConfig.model_validate({"output_dir": str(tmp_path), "merge": merge, "base": base})
    return SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        tokens=tokens_of(USERS),
        keys=[f"user {n}" for n in range(len(USERS))],
        stage=RunFolder(tmp_path).stage,
    )


def asked(*users):
    return [Example(user, QUERY, 0, 0, 3, np.asarray([5, 6, 7])) for user in users]


def write_pplug(context, seeds):
    """Embeddings of every user from a seed of their own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = [
        UserEmbeddings(*(torch.randn(n, SIZE, generator=generator) for n in (items, items, len(splits))))
        for (items, splits), generator in zip(USERS, generators, strict=True)
    ]
    write_embeddings(context.stage("embeddings").path, 0, made)
    persona = Persona(PersonaSizes(SIZE, 32, 0.3, 1.5), seed=2)
    path = context.stage("pplug/base").path / "persona.safetensors"
    save_weights(path, persona.state_dict(), persona_file.KIND, persona.description(), "pplug")


def test_personal_tokens_are_made_of_the_users_own_items(context):
    write_pplug(context, range(6))
    rows, personal = PplugAnswers(context, with_population=False).rows(asked(4, 1, 2, 4))
    assert personal == [True, False, True, True]
    assert torch.equal(rows.prefix_RPD[0], rows.prefix_RPD[3])
    write_pplug(context, [90, 91, 92, 93, 4, 95])  # everybody else has another history
    others, _ = PplugAnswers(context, with_population=False).rows(asked(4, 2))
    assert torch.equal(others.prefix_RPD[0], rows.prefix_RPD[0])
    assert not torch.allclose(others.prefix_RPD[1], rows.prefix_RPD[2], atol=1e-3)


def test_personal_tokens_stand_before_prompts_while_attached(context):
    write_pplug(context, range(6))
    answers, model = PplugAnswers(context, with_population=False), PersonalModel(tiny_llama(), {})
    before = model.lm.get_input_embeddings()
    prompt = answers.prompt(np.asarray([5, 6]))
    assert prompt.tolist() == [*PERSONAL, 5, 6]
    assert prompt.dtype == np.int64
    answers.attach(model)
    assert model.lm.get_input_embeddings() is not before
    answers.detach(model)
    assert model.lm.get_input_embeddings() is before


def test_a_base_without_room_for_personal_tokens_is_refused():
    check_room(tiny_llama(), max_length=126)
    with pytest.raises(AdapterError, match=r"base\.max_length 127 .*lower it to 126"):
        check_room(tiny_llama(), max_length=127)


def test_users_whom_plora_does_not_know_are_the_generic_one(context):
    lm = tiny_llama()
    shared, table_LU = PersonalLoras(layout_of(lm), 4, seed=1), torch.randn(6, 4)  # user 5 came later
    table_LU[0] = 0
    tensors = shared.state_dict() | {plora_file.TABLE: table_LU}
    path = context.stage("plora").path / "level.safetensors"
    save_weights(path, tensors, plora_file.KIND, shared.description(), "plora")
    answers, model = PloraAnswers(context), PersonalModel(lm, find_targets(lm, TARGETS))
    rows, personal = answers.rows(asked(4, 1, 5))
    assert personal == [True, False, False]
    assert torch.equal(rows.user_RU, torch.stack([table_LU[5], torch.zeros(4), torch.zeros(4)]))
    answers.attach(model)
    assert all(module.shared is not None for module in model.adapted.values())
    answers.detach(model)
    assert all(module.shared is None for module in model.adapted.values())


def write_merge(context, layout, seeds):
    """Features and adapters of every user from a seed of their own."""
    items = [
        torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
        for (count, _), seed in zip(USERS, seeds, strict=True)
    ]
    counts = [count for count, _ in USERS]
    write_features(context.stage("features").path, 0, counts, torch.cat(items), [""] * len(USERS))
    adapters = {
        context.keys[user]: torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(50 + seed))
        for user, seed in enumerate(seeds)
        if counts[user]
    }
    put(open_store(context.stage("store/OPPU").path), "unit-0", adapters, layout=layout)
    return adapters


def added(answers, model, user):
    """What each module adds for a user."""
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(9))
    rows, _ = answers.rows(asked(user))
    model.set_rows(rows)
    return {name: module.user(x[..., : module.base.in_features], rows.slot_R) for name, module in model.adapted.items()}


def test_merges_are_of_training_users_only(context, tmp_path):
    lm = tiny_llama()
    layout, model = layout_of(lm), PersonalModel(lm, find_targets(lm, TARGETS))
    write_merge(context, layout, range(6))
    answers = MergedAnswers(context)
    answers.attach(model)
    before, cold = added(answers, model, 4), added(answers, model, 1)
    _, personal = answers.rows(asked(4, 1, 2, 4))
    assert personal == [True, False, True, True]
    assert all(value.abs().max() > 0.1 for value in before.values())
    assert all(not value.any() for value in cold.values()), "without history the population answers"
    elsewhere = SimpleNamespace(**vars(context) | {"stage": RunFolder(tmp_path / "other").stage})
    write_merge(elsewhere, layout, [0, 1, 72, 3, 4, 5])  # another evaluated user has another history and adapter
    answers = MergedAnswers(elsewhere)
    answers.attach(model)
    for name, value in added(answers, model, 4).items():
        assert torch.equal(value, before[name])


def test_a_merge_is_the_weighted_sum_of_the_nearest(context):
    lm = tiny_llama()
    layout, model = layout_of(lm), PersonalModel(lm, find_targets(lm, TARGETS))
    adapters = write_merge(context, layout, range(6))
    answers = MergedAnswers(context)
    answers.attach(model)
    positions_k, weight_k = answers._nearest(2)
    assert len(positions_k) == 2
    found = added(answers, model, 2)
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(9))
    for name, value in found.items():
        wanted = 0
        for weight, position in zip(weight_k, positions_k.tolist(), strict=True):
            row_P = adapters[context.keys[[0, 3, 5][position]]]
            a_rD, b_Er = next((a[0], b[0]) for n, a, b in layout.views(row_P.unsqueeze(0)) if n == name)
            wanted = wanted + weight * layout.scaling * x[..., : a_rD.shape[1]] @ a_rD.T @ b_Er.T
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
