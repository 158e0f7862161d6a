"""The promise of the user stage: many users side by side give what each user alone gives, by PEFT and plain AdamW."""

from __future__ import annotations

import math

import pytest
import torch

from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import UserTask
from proper_ds.training.users import train_users
from tests.fakes import UNUSED_TOKEN, random_examples, tiny_llama
from tests.training.alone import SEED, peft_of, train_alone

HISTORIES = [1, 2, 3, 5, 8, 13, 4, 4]


def _settings(targets, **changes):
    lora = LoraSettings(r=3, lora_alpha=6, target_modules=targets)
    values = {
        "lora": lora,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.05,
        "max_grad_norm": 0.7,
        "num_train_epochs": 3,
        "min_steps": 4,
        "per_device_train_batch_size": 2,
        "num_slots": 3,
        "num_tokens_per_batch": 64,
    }
    return UserConfig(**(values | changes))


def _tasks():
    return [UserTask(f"user-{n}", random_examples(count, n, seed=1)) for n, count in enumerate(HISTORIES)]


def _layout(lm, settings):
    return LoraLayout.of(find_targets(lm, settings.lora.target_modules), settings.lora)


def _random_group(settings, preset):
    probe = tiny_llama(dtype=torch.float64)
    sizes = {"feature_size": 4, "user_vector_size": 6} if preset == "proper" else {"num_users": len(HISTORIES)}
    group = GroupLevel(_layout(probe, settings), PRESETS[preset], GroupSizes(3, **sizes), seed=2)
    generator = torch.Generator().manual_seed(9)
    for p in group.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return group.requires_grad_(False)


def _train_together(dtype, settings, group=None, group_dropout=0.0):
    lm = tiny_llama(dtype=dtype)
    layout = _layout(lm, settings)
    model = PersonalModel(lm, find_targets(lm, settings.lora.target_modules))
    if group is not None:
        model.attach_groups(group.to(dtype).by_module(), group_dropout)
    tasks = _tasks()
    if group is not None:
        vectors = torch.randn(len(tasks), 6, generator=torch.Generator().manual_seed(5)).to(dtype)
        if group.user_table is not None:
            vectors = group.user_table.weight[1:]
        tasks = [UserTask(t.key, t.examples, vectors[n]) for n, t in enumerate(tasks)]
    return layout, tasks, train_users(model, layout, tasks, settings, SEED)


TARGETS = [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]]


@pytest.mark.parametrize("targets", TARGETS, ids=["attention", "feed-forward"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_each_user_equals_peft_alone_in_fp64(targets, schedule):
    settings = _settings(targets, lr_scheduler_type=schedule)
    layout, tasks, results = _train_together(torch.float64, settings)
    lm = tiny_llama(dtype=torch.float64)
    wrapped = peft_of(lm, settings)
    for task, result in zip(tasks, results, strict=True):
        losses, row = train_alone(lm, wrapped, layout, task, settings)
        assert result.losses == pytest.approx(losses, abs=1e-9)
        assert (result.row_P - row).abs().max() < 1e-9
        assert len(set(losses)) > 1, "the test must train something"


@pytest.mark.parametrize("targets", TARGETS, ids=["attention", "feed-forward"])
def test_losses_equal_peft_alone_in_fp32(targets):
    settings = _settings(targets)
    layout, tasks, results = _train_together(torch.float32, settings)
    lm = tiny_llama()
    wrapped = peft_of(lm, settings)
    for task, result in zip(tasks, results, strict=True):
        losses, _ = train_alone(lm, wrapped, layout, task, settings)
        assert result.losses == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("preset", ["proper", "proper-released"])
def test_each_user_equals_peft_alone_on_frozen_groups(preset):
    """PEFT wraps the linear inside our module, so the group term is ours and the user term is PEFT's."""
    settings = _settings(["gate_proj", "up_proj", "down_proj"])
    group = _random_group(settings, preset)
    layout, tasks, results = _train_together(torch.float64, settings, group)

    lm = tiny_llama(dtype=torch.float64)
    model = PersonalModel(lm, find_targets(lm, settings.lora.target_modules))
    model.attach_groups(group.double().by_module())
    for adapted in model.adapted.values():
        adapted.base.requires_grad_(False)
    inner = [f"{name}.base" for name in model.adapted]
    wrapped = peft_of(lm, settings, targets=inner)
    for p in group.parameters():
        p.requires_grad_(False)
    for task, result in zip(tasks, results, strict=True):
        model.rows.user_RU = task.user_vector_U.unsqueeze(0)
        inner_layout = LoraLayout(
            tuple(type(m)(f"{m.name}.base", m.in_features, m.out_features) for m in layout.modules), 3, 6
        )
        losses, row = train_alone(lm, wrapped, inner_layout, task, settings)
        assert result.losses == pytest.approx(losses, abs=1e-9)
        assert (result.row_P - row).abs().max() < 1e-9


def test_a_user_does_not_depend_on_the_others():
    settings = _settings(["gate_proj", "up_proj", "down_proj"])
    _, tasks, results = _train_together(torch.float64, settings)
    changed = [UserTask(t.key, random_examples(9, 50, seed=3)) if t.key == "user-3" else t for t in tasks]
    lm = tiny_llama(dtype=torch.float64)
    layout = _layout(lm, settings)
    model = PersonalModel(lm, find_targets(lm, settings.lora.target_modules))
    again = train_users(model, layout, changed, settings, SEED)
    for before, after in zip(results, again, strict=True):
        difference = (before.row_P - after.row_P).abs().max()
        assert (difference > 1e-3) if before.key == "user-3" else (difference < 1e-12)


def test_same_call_gives_the_same_bits_and_slots_leave_no_trace():
    settings = _settings(["q_proj", "v_proj"])
    _, _, first = _train_together(torch.float32, settings)
    _, _, second = _train_together(torch.float32, settings)
    assert all(torch.equal(a.row_P, b.row_P) for a, b in zip(first, second, strict=True))
    _, _, wide = _train_together(torch.float64, _settings(["q_proj", "v_proj"], num_slots=8))
    _, _, one = _train_together(torch.float64, _settings(["q_proj", "v_proj"], num_slots=1))
    assert all((a.row_P - b.row_P).abs().max() < 1e-12 for a, b in zip(wide, one, strict=True))


def test_dropout_is_the_users_own():
    def train(num_slots):
        targets = ["gate_proj", "up_proj", "down_proj"]
        lora = LoraSettings(r=3, lora_alpha=6, lora_dropout=0.3, target_modules=targets)
        return _train_together(torch.float64, _settings(targets, lora=lora, num_slots=num_slots))[2]

    many, one = train(8), train(1)
    plain = _train_together(torch.float64, _settings(["gate_proj", "up_proj", "down_proj"]))[2]
    for a, b, c in zip(many, one, plain, strict=True):
        assert (a.row_P - b.row_P).abs().max() < 1e-12
        assert (a.row_P - c.row_P).abs().max() > 1e-3


def test_the_groups_own_dropout_is_on_where_users_have_none():
    settings = _settings(["gate_proj", "up_proj", "down_proj"])

    def train(group_dropout, num_slots=3):
        changed = settings.model_copy(update={"num_slots": num_slots})
        return _train_together(torch.float64, changed, _random_group(settings, "proper"), group_dropout)[2]

    plain, dropped, alone = train(0.0), train(0.5), train(0.5, num_slots=1)
    for a, b, c in zip(plain, dropped, alone, strict=True):
        assert (a.row_P - b.row_P).abs().max() > 1e-3
        assert (b.row_P - c.row_P).abs().max() < 1e-12


def test_a_bad_user_is_given_up_alone():
    settings = _settings(["q_proj", "v_proj"])
    lm = tiny_llama(dtype=torch.float64)
    layout = _layout(lm, settings)
    model = PersonalModel(lm, find_targets(lm, settings.lora.target_modules))
    tasks = [*_tasks(), UserTask("cold", [])]
    good = {r.key: r for r in train_users(model, layout, tasks, settings, SEED)}
    assert good["cold"].row_P is None
    assert good["cold"].reason == "no history"

    tasks[4].examples[0].ids[0] = UNUSED_TOKEN
    lm.get_input_embeddings().weight.data = lm.get_input_embeddings().weight.data.clone()
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.data.clone(), requires_grad=False)
    lm.get_input_embeddings().weight.data[UNUSED_TOKEN] = math.nan
    found = {r.key: r for r in train_users(model, layout, tasks, settings, SEED)}
    assert found["user-4"].row_P is None
    assert "loss is nan" in found["user-4"].reason
    for key, result in found.items():
        if key not in ("user-4", "cold"):
            assert (result.row_P - good[key].row_P).abs().max() < 1e-12
