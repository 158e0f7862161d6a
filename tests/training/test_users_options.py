"""Every option of the user stage keeps its promise: each user equals that user alone, by PEFT and plain AdamW."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from proper_ds.data.tokens import HISTORY, Example
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import UserTask
from proper_ds.training.users import Counters, train_users
from tests.fakes import UNUSED_TOKEN, random_examples, tiny_llama
from tests.training.alone import SEED, peft_of, train_alone

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]
PREFIXES = [9, 14]
"""Shared first tokens of the two tasks."""


def settings_for(targets=FEED_FORWARD, **changes):
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets} | changes.pop("lora", {})
    values = {
        "lora": LoraSettings(**lora),
        "learning_rate": 5e-3,
        "warmup_ratio": 0.2,
        "weight_decay": 0.05,
        "max_grad_norm": 0.7,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "num_slots": 3,
        "num_tokens_per_batch": 80,
    }
    return UserConfig(**(values | changes))


def instructed(count, user):
    """Items of two tasks, each beginning with its instruction; some prompts end right behind it."""
    generator = np.random.default_rng([5, user])
    instructions = [
        np.random.default_rng([6, n]).integers(3, UNUSED_TOKEN, length) for n, length in enumerate(PREFIXES)
    ]
    found = []
    for position in range(count):
        task = int(generator.integers(0, 2))
        own = generator.integers(3, UNUSED_TOKEN, int(generator.integers(1, 12)))
        answer = generator.integers(3, UNUSED_TOKEN, int(generator.integers(1, 5)))
        ids = np.concatenate([instructions[task], own, answer]).astype(np.int64)
        found.append(Example(user, HISTORY, task, position, len(ids) - len(answer), ids))
    return found


def tasks_for(counts=(1, 2, 3, 5, 8, 13, 4)):
    return [UserTask(f"user-{n}", instructed(count, n)) for n, count in enumerate(counts)]


def together(settings, tasks, dtype=torch.float64, counters=None, num_layers=2):
    lm = tiny_llama(dtype=dtype, num_layers=num_layers)
    lora = settings.lora
    layout = LoraLayout.of(find_targets(lm, lora.target_modules, lora.layers), lora)
    model = PersonalModel(lm, find_targets(lm, lora.target_modules))
    return layout, train_users(model, layout, tasks, settings, SEED, counters)


def check_alone(settings, tasks, layout, results, dtype=torch.float64, num_layers=2, tolerance=1e-9):
    for task, result in zip(tasks, results, strict=True):
        r = settings.rank_of(len(task.examples))
        lm = tiny_llama(dtype=dtype, num_layers=num_layers)
        wrapped = peft_of(lm, settings, r)
        losses, row_P = train_alone(lm, wrapped, layout, task, settings, r=r, num_steps=len(result.losses))
        assert result.losses == pytest.approx(losses, abs=tolerance), task.key
        if dtype is torch.float64:
            assert (result.row_P - row_P).abs().max() < 1e-9, task.key


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD], ids=["attention", "feed-forward"])
def test_a_shared_prefix_is_exact(targets):
    settings, tasks = settings_for(targets), tasks_for()
    shared, apart = Counters(), Counters()
    layout, results = together(settings, tasks, counters=shared)
    _, others = together(settings.model_copy(update={"share_prefix": False}), tasks, counters=apart)
    assert shared.whole.num_tokens < 0.8 * apart.whole.num_tokens, "the test must share something"
    check_alone(settings, tasks, layout, results)
    for one, other in zip(results, others, strict=True):
        assert (one.row_P - other.row_P).abs().max() < 1e-9


def test_a_shared_prefix_is_exact_in_fp32():
    settings, tasks = settings_for(), tasks_for()
    layout, results = together(settings, tasks, torch.float32)
    check_alone(settings, tasks, layout, results, torch.float32, tolerance=1e-5)


def test_ranks_by_history():
    settings, tasks = settings_for(rank_by_history={1: 1, 3: 2, 6: 4}), tasks_for()
    layout, results = together(settings, tasks)
    sizes = [result.row_P.numel() // (layout.num_parameters // 4) for result in results]
    assert sizes == [1, 1, 2, 2, 4, 4, 2]
    check_alone(settings, tasks, layout, results)


def test_an_adapter_of_lower_rank_is_the_same_function_in_the_wide_layout():
    settings = settings_for(rank_by_history={1: 2, 99: 4})
    layout, results = together(settings, tasks_for([5]))
    narrow = layout.with_rank(2)
    wide_P = layout.widened(results[0].row_P, 2)
    own = {name: narrow.scaling * b[0] @ a[0] for name, a, b in narrow.views(results[0].row_P.unsqueeze(0))}
    for name, a, b in layout.views(wide_P.unsqueeze(0)):
        assert torch.allclose(layout.scaling * b[0] @ a[0], own[name], atol=1e-12)


def test_early_stopping_ends_a_user_and_changes_nothing_before():
    settings = settings_for(learning_rate=0.05, num_train_epochs=12, max_grad_norm=0, lr_scheduler_type="constant")
    settings = settings.model_copy(update={"warmup_ratio": 0.0})
    stopping = settings.model_copy(update={"early_stopping_patience": 2, "early_stopping_threshold": 0.05})
    tasks = tasks_for()
    _, whole = together(settings, tasks)
    layout, results = together(stopping, tasks)
    ended = [len(one.losses) < len(all_.losses) for one, all_ in zip(results, whole, strict=True)]
    assert any(ended), "the test must stop somebody"
    for one, all_ in zip(results, whole, strict=True):
        assert one.losses == pytest.approx(all_.losses[: len(one.losses)], abs=1e-9)
    check_alone(stopping, tasks, layout, results)
    for task, result in zip(tasks, results, strict=True):
        per_epoch = -(-len(task.examples) // 4)
        epochs = np.asarray(result.losses).reshape(-1, per_epoch).mean(1)
        stale = len(epochs) - 1 - max(n for n in range(len(epochs)) if n == 0 or epochs[n] < epochs[:n].min() - 0.05)
        assert stale == 2 or len(epochs) == 12


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 20], ids=["off", "a few users", "all users"])
def test_adapting_the_top_layers_only_with_states_kept_or_not(cache_bytes):
    settings = settings_for(FEED_FORWARD, lora={"layers": [2, 3]}, cache_bytes=cache_bytes)
    tasks = tasks_for()
    layout, results = together(settings, tasks, num_layers=4)
    assert layout.layers == [2, 3]
    check_alone(settings, tasks, layout, results, num_layers=4)


def test_kept_states_run_the_lower_layers_once():
    tasks, calls = tasks_for([8, 8]), []
    for cache_bytes in (0, 1 << 20):
        settings = settings_for(ATTENTION, lora={"layers": [3]}, cache_bytes=cache_bytes, num_slots=2)
        lm = tiny_llama(dtype=torch.float64, num_layers=4)
        layout = LoraLayout.of(find_targets(lm, ATTENTION, [3]), settings.lora)
        model = PersonalModel(lm, find_targets(lm, ATTENTION))
        tokens = []
        lm.model.layers[0].register_forward_hook(lambda module, given, out, tokens=tokens: tokens.append(out.shape[1]))
        train_users(model, layout, tasks, settings, SEED)
        calls.append(sum(tokens))
    assert calls[1] < calls[0] / 2


def test_an_earlier_adapter_is_gone_on_from():
    settings, tasks = settings_for(), tasks_for([4, 6])
    _, first = together(settings, tasks)
    again = [UserTask(t.key, t.examples, initial_row_P=r.row_P) for t, r in zip(tasks, first, strict=True)]
    _, second = together(settings, again)
    for one, other in zip(first, second, strict=True):
        assert other.losses[0] < one.losses[0] - 0.05
        assert other.losses[0] < one.losses[-1] + 0.05


def test_an_earlier_adapter_of_lower_rank_keeps_its_function_and_can_use_the_new_ranks():
    narrow, wide = settings_for(rank_by_history={1: 2, 9: 4}), settings_for(rank_by_history={1: 2, 4: 4})
    layout, first = together(narrow, tasks_for([6]))
    earlier_P = layout.widened(first[0].row_P, 2)
    start_P = layout.first_row(3, 4, earlier_P)
    for (_, a, b), (_, old_a, old_b) in zip(
        layout.views(start_P.unsqueeze(0)), layout.views(earlier_P.unsqueeze(0)), strict=True
    ):
        assert torch.allclose(b @ a, (old_b @ old_a).to(b), atol=1e-6)
        assert a[0].any(-1).all()
    task = tasks_for([6])[0]
    _, second = together(wide, [UserTask(task.key, task.examples, initial_row_P=earlier_P)])
    for _, _, b in layout.views(second[0].row_P.unsqueeze(0)):
        assert b[0].any(0).all(), "the new ranks must learn"


def test_changing_one_user_changes_no_other_with_shared_prefixes():
    settings, tasks = settings_for(), tasks_for()
    _, results = together(settings, tasks)
    changed = [UserTask(t.key, instructed(9, 50)) if t.key == "user-3" else t for t in tasks]
    _, again = together(settings, changed)
    for before, after in zip(results, again, strict=True):
        difference = (before.row_P - after.row_P).abs().max()
        assert (difference > 1e-3) if before.key == "user-3" else (difference < 1e-12)


def test_dropout_with_a_shared_prefix_is_the_users_own():
    tasks = tasks_for()
    rows = []
    for num_slots in (7, 1):
        settings = settings_for(lora={"lora_dropout": 0.3}, num_slots=num_slots)
        rows.append([result.row_P for result in together(settings, tasks)[1]])
    plain = [result.row_P for result in together(settings_for(), tasks)[1]]
    for many, one, without in zip(*rows, plain, strict=True):
        assert (many - one).abs().max() < 1e-12
        assert (many - without).abs().max() > 1e-3


def test_slots_stay_taken_and_little_is_padding_on_heavy_tailed_histories():
    generator = np.random.default_rng(1)
    counts = np.minimum(200, 1 + generator.pareto(0.9, 400)).astype(int)
    tasks = [UserTask(f"user-{n}", random_examples(count, n, seed=2)) for n, count in enumerate(counts)]
    settings = settings_for(ATTENTION, num_train_epochs=1, num_slots=32, num_tokens_per_batch=256)
    counters = Counters()
    together(settings, tasks, torch.float32, counters)
    assert counters.waiting.num_ticks > 3
    assert counters.waiting.occupancy > 0.95
    assert counters.whole.occupancy < 0.9, "there is a tail"
    assert counters.whole.padding < 0.05


def test_bf16_base_with_fp32_adapters_stays_close():
    settings, tasks = settings_for(), tasks_for()
    _, exact = together(settings, tasks, torch.float32)
    _, halved = together(settings, tasks, torch.bfloat16)
    for one, other in zip(exact, halved, strict=True):
        assert other.row_P.dtype is torch.float32
        assert other.losses == pytest.approx(one.losses, abs=0.1)
        assert other.losses != one.losses


def test_peft_reads_the_layers(tmp_path):
    from proper_ds.model.adapter_file import peft_config

    settings = settings_for(lora={"layers": [1]})
    layout, _ = together(settings, tasks_for([4]))
    about = peft_config(layout, FEED_FORWARD, 0.0, "somewhere", None)
    known = {k: v for k, v in about.items() if k in ("r", "lora_alpha", "target_modules", "layers_to_transform")}
    wrapped = get_peft_model(tiny_llama(), LoraConfig(**known))
    adapted = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in wrapped.named_parameters() if "lora_A" in n
    }
    assert adapted == {module.name for module in layout.modules}


def test_short_items_beside_a_long_one_with_kept_states():
    """Steps share what is not worth sharing over the whole history."""
    generator = np.random.default_rng(3)
    head = generator.integers(3, UNUSED_TOKEN, 6)
    examples = []
    for position, own in enumerate([4, 4, 4, 104, 104, 104]):
        ids = np.concatenate([head, generator.integers(3, UNUSED_TOKEN, own)]).astype(np.int64)
        examples.append(Example(0, HISTORY, 0, position, len(ids) - 2, ids))
    tasks = [UserTask("ann", examples)]
    settings = settings_for(ATTENTION, lora={"layers": [1]}, per_device_train_batch_size=2, num_train_epochs=4)
    layout, results = together(settings, tasks)
    check_alone(settings, tasks, layout, results)


def test_without_sharing_no_row_needs_a_mask(monkeypatch):
    from proper_ds.training import rows

    monkeypatch.setattr(rows.Packed, "mask", lambda packed, dtype: None)
    masked = []
    before = rows.pack
    monkeypatch.setattr(
        "proper_ds.training.slots.pack",
        lambda *given: masked.append((made := before(*given)).part_RT is not None) or made,
    )
    together(settings_for(share_prefix=False), tasks_for([8, 1]))
    assert masked
    assert not any(masked)


def test_an_update_with_less_history_keeps_the_rank_it_learned():
    settings = settings_for(rank_by_history={1: 2, 6: 4})
    layout, first = together(settings, tasks_for([6]))
    task = tasks_for([3])[0]
    _, second = together(settings, [UserTask(task.key, task.examples, initial_row_P=first[0].row_P)])
    assert second[0].row_P.numel() == layout.num_parameters


def test_some_states_are_kept_and_some_are_not_within_a_small_budget(monkeypatch):
    from proper_ds.training.lower import LowerStates

    kept, before = [], LowerStates.keep
    monkeypatch.setattr(LowerStates, "keep", lambda *given: kept.append(before(*given)) or kept[-1])
    settings = settings_for(FEED_FORWARD, lora={"layers": [2, 3]}, cache_bytes=20_000)
    together(settings, tasks_for(), num_layers=4)
    assert set(kept) == {True, False}


def test_slots_by_themselves_change_no_result():
    tasks = tasks_for()
    _, chosen = together(settings_for(num_slots="auto"), tasks)
    _, given = together(settings_for(num_slots=2), tasks)
    for one, other in zip(chosen, given, strict=True):
        assert (one.row_P - other.row_P).abs().max() < 1e-12
