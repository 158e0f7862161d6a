"""The learned start: users from it equal plain torch alone, its gradients are right, and learning it helps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.errors import AdapterError
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.user_start import UserStart, part_sizes
from proper_ds.training.config import StartConfig, UserConfig
from proper_ds.training.slots import UserTask, item_order, num_user_steps
from proper_ds.training.start import StartBatch, StartModule, question_gradients
from proper_ds.training.users import train_users
from tests.fakes import random_examples, tiny_llama

SEED, TARGETS = 7, ["q_proj", "down_proj"]
USER = UserConfig(
    lora=LoraSettings(r=2, lora_alpha=6, target_modules=TARGETS),
    learning_rate=5e-3,
    num_train_epochs=2,
    min_steps=3,
    per_device_train_batch_size=2,
    num_slots=3,
    num_tokens_per_batch=64,
)


def _model(dtype=torch.float32):
    lm = tiny_llama(dtype=dtype)
    targets = find_targets(lm, TARGETS)
    return PersonalModel(lm, targets), LoraLayout.of(targets, USER.lora)


def _start(layout, prior_items=1.5):
    generator = torch.Generator().manual_seed(1)
    row_P = layout.initial_row(5) + 0.05 * torch.randn(layout.num_parameters, generator=generator)
    factor_M = torch.rand(2 * len(layout.modules), generator=generator) + 0.5
    return UserStart(layout, row_P, factor_M, prior_items)


def _tasks():
    return [UserTask(f"u{n}", random_examples(count, n, seed=1)) for n, count in enumerate([1, 5, 2, 3, 8])]


def _loss(model, layout, parts, examples):
    """Mean loss over the examples' targets with plain LoRA terms hooked to the modules."""
    hooks = []
    for number, (name, adapted) in enumerate(model.adapted.items()):
        assert layout.modules[number].name == name

        def add(module, inputs, y, a=parts[2 * number], b=parts[2 * number + 1]):
            return y + layout.scaling * (inputs[0] @ a.T @ b.T)

        hooks.append(adapted.base.register_forward_hook(add))
    batch = collate(examples)
    losses_K = model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    for hook in hooks:
        hook.remove()
    return losses_K.mean()


def _parts(layout, row_P):
    return [part.clone() for _, a, b in layout.views(row_P.unsqueeze(0)) for part in (a[0], b[0])]


def _alone(model, layout, task, start):
    """One user by torch's own AdamW with a parameter group for each part."""
    parts = [part.requires_grad_() for part in _parts(layout, start.row_P.double())]
    rates = [{"params": [part], "lr": USER.learning_rate * float(f)} for part, f in zip(parts, start.factor_M)]  # noqa: B905
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
    num_steps = num_user_steps(len(task.examples), USER)
    orders = item_order(len(task.examples), num_steps, 2, seed_of(SEED, "user", task.key))
    for step, order in enumerate(orders):
        loss = _loss(model, layout, parts, [task.examples[i] for i in order])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        for group, factor in zip(optimizer.param_groups, start.factor_M, strict=True):
            group["lr"] = USER.learning_rate * float(factor) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.step()
    row_P = torch.cat([part.detach().flatten() for part in parts])
    kept = len(task.examples) / (len(task.examples) + start.prior_items)
    return start.row_P + kept * (row_P - start.row_P)


def test_each_user_from_the_start_equals_torch_alone():
    model, layout = _model(torch.float64)
    start = _start(layout)
    tasks = _tasks()
    results = train_users(model, layout, tasks, USER, SEED, start=start)
    for task, result in zip(tasks, results, strict=True):
        wanted_P = _alone(model, layout, task, start)
        assert (result.row_P - wanted_P).abs().max() < 1e-6
        assert (wanted_P - start.row_P).abs().max() > 1e-3, "the test must train something"
    (lonely,) = train_users(model, layout, tasks[1:2], USER, SEED, start=start)
    assert (lonely.row_P - results[1].row_P).abs().max() < 1e-9, "who else trains changes nothing"


def test_little_evidence_moves_little():
    _, layout = _model()
    start = _start(layout, prior_items=3.0)
    row_P = start.row_P + 1
    moved = [float((start.shrunk(row_P, n) - start.row_P).mean()) for n in (0, 1, 3, 300)]
    assert moved == pytest.approx([0, 0.25, 0.5, 300 / 303], abs=1e-5)


def test_question_gradients_equal_autograd():
    model, layout = _model(torch.float64)
    start = _start(layout)
    questions = [random_examples(count, 20 + n, seed=2) for n, count in enumerate([1, 3, 2])]
    rows_SP = torch.stack([start.row_P.double() * (1 + n) for n in range(3)])
    loss_S, grads_SP = question_gradients(model, layout, rows_SP, [None] * 3, questions, 64)
    for row_P, own, loss, grad_P in zip(rows_SP, questions, loss_S, grads_SP, strict=True):
        parts = [part.requires_grad_() for part in _parts(layout, row_P)]
        wanted = _loss(model, layout, parts, own)
        wanted.backward()
        assert float(loss) == pytest.approx(float(wanted.detach()), abs=1e-9)
        assert (grad_P - torch.cat([part.grad.flatten() for part in parts])).abs().max() < 1e-9


def _batch(tasks, questions, num_rows=None):
    count = num_rows or len(tasks)
    return StartBatch(collate([own[0] for own in questions]), 1.0, count, count, tasks=tasks, questions=questions)


def test_gradients_are_those_of_the_questions_at_the_trained_adapters():
    """By the start: the mean over users. By step sizes and shrinkage: finite differences with the way held fixed."""
    model, layout = _model()
    module = StartModule(model, layout, StartConfig(factor_learning_rate=6e-3), USER, SEED)  # two units
    with torch.no_grad():
        module.row_P.copy_(_start(layout).row_P)
    tasks, questions = _tasks()[:3], [random_examples(2, 30 + n, seed=3) for n in range(3)]
    loss, numbers = module(_batch(tasks, questions, num_rows=6))
    loss.backward()
    start = module.start()
    rows_SP = torch.stack([r.row_P for r in train_users(model, layout, tasks, USER, 0, start=start)])
    loss_S, grads_SP = question_gradients(model, layout, rows_SP, [None] * 3, questions, 64)
    assert float(loss) == pytest.approx(float(loss_S.sum()) / 6, rel=1e-5)
    assert float(numbers["ce"]) == pytest.approx(float(loss_S.sum()), rel=1e-5)
    assert (module.row_P.grad - grads_SP.sum(0) / 6).abs().max() < 1e-6

    way_SP = rows_SP - start.row_P
    counts = torch.tensor([1.0, 5, 2])
    by_factor_M = torch.stack([part.sum() for part in ((grads_SP * way_SP).sum(0) / 6).split(part_sizes(layout))])
    assert (module.log_factor_M.grad - 2 * by_factor_M).abs().max() < 1e-6, "d theta / d log factor is the way itself"
    by_prior = -((grads_SP * way_SP).sum(1) / (counts + 1)).sum() / 6  # share n/(n+p): d log share / d log p
    assert float(module.log_prior.grad) == pytest.approx(2 * float(by_prior), abs=1e-6)


def test_a_stand_in_trains_nothing_and_gives_every_parameter_a_gradient():
    model, layout = _model()
    module = StartModule(model, layout, StartConfig(), USER, SEED)
    made = replace(_batch(_tasks()[:1], [random_examples(1, 30, seed=3)]), weight=0.0, tasks=(), questions=())
    module(made)[0].backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 3
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def _people(num, seed):
    """Users who answer everything with one of four tokens of their own; (tasks with one item, questions)."""
    tasks, questions = [], []
    for n in range(num):
        every = random_examples(3, seed + n, seed=5)
        for example in every:
            example.ids[example.num_prompt :] = 3 + (n % 4)
        tasks.append(UserTask(f"{seed}-{n}", every[:1]))
        questions.append(every[1:])
    return tasks, questions


def test_learning_the_start_helps_new_users_with_a_single_item():
    model, layout = _model()
    user = USER.model_copy(update={"num_train_epochs": 1, "min_steps": 2, "num_slots": 16})
    module = StartModule(model, layout, StartConfig(learning_rate=0.01), user, SEED)
    tasks, questions = _people(16, seed=100)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for step in range(20):
        optimizer.zero_grad()
        module(replace(_batch(tasks, questions), seed=step))[0].backward()
        optimizer.step()
    new, asked = _people(8, seed=900)

    def after(start):
        results = train_users(model, layout, new, user, SEED, start=start)
        rows_SP = torch.stack([result.row_P for result in results])
        return float(question_gradients(model, layout, rows_SP, [None] * len(new), asked, 64)[0].mean())

    start = module.start()
    alone_SP = start.row_P.expand(len(new), -1)
    untrained = float(question_gradients(model, layout, alone_SP, [None] * len(new), asked, 64)[0].mean())
    assert after(start) < 0.7 * after(None), "two steps on one item"
    assert after(start) < 0.9 * untrained, "and it is the steps that do it, not the start alone"


def test_a_file_gives_the_start_back_and_holds_nothing_broken(tmp_path):
    _, layout = _model()
    start = _start(layout)
    start.save(tmp_path / "start.safetensors", "start")
    found = UserStart.load(tmp_path / "start.safetensors")
    assert found.layout == layout and found.prior_items == start.prior_items
    assert found.row_P.equal(start.row_P) and found.factor_M.equal(start.factor_M)
    broken = replace(start, row_P=start.row_P * math.nan)
    with pytest.raises(AdapterError, match="user start: weights are not finite"):
        broken.save(tmp_path / "broken.safetensors", "start")
