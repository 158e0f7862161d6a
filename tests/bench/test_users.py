"""`bench users` on a model of a few thousand parameters: what it writes, and that its variants train the same."""

from __future__ import annotations

import json

import pytest

from proper_ds.bench import users
from proper_ds.bench.workloads import PRESETS, Preset, random_users
from proper_ds.errors import UserError

VARIANTS = {"ours", "ours_prefix", "ours_prefix_bf16", "plain_loop", "trainer", "trainer_oppu", "ceiling"}


@pytest.fixture
def tiny(monkeypatch):
    preset = Preset(32, 48, 2, 4, 2, 64, 6, 2, 14, 24, 8, num_items=4, num_epochs=1, num_tokens_per_batch=128)
    monkeypatch.setitem(PRESETS, "small", preset)
    monkeypatch.setattr(users, "PARETO_USERS", 90)
    monkeypatch.setattr(users, "PARETO_MOST", 40)
    return preset


def test_all_variants_train_the_same_and_the_json_has_its_keys(tiny, tmp_path):
    users.bench_users("small", 2, 1, tmp_path / "users.json")
    found = json.loads((tmp_path / "users.json").read_text())
    assert set(found["users_per_s"]) == set(found["ratio"]) == VARIANTS
    assert found["ratio"]["trainer"] == 1
    assert found["max_loss_difference"] < 1e-5
    assert 1e-5 < found["max_loss_difference_bf16"] < 0.1
    assert found["slot_occupancy"] > 0.95
    assert 0 <= found["padding"] < 0.2
    assert set(found["model_flops_per_s"]) == {"ours", "ours_prefix", "ours_prefix_bf16"}


def test_speeds_of_unequal_trainings_are_refused(tiny, monkeypatch):
    right = users.rivals.plain_loop
    monkeypatch.setattr(users.rivals, "plain_loop", lambda *given: [[x + 0.01 for x in row] for row in right(*given)])
    with pytest.raises(UserError, match="do not train the same"):
        users.bench_users("small", 2, 1, None)


def test_more_users_leave_the_first_ones_as_they_are(tiny):
    few, many = random_users(tiny, [3, 4]), random_users(tiny, [3, 4, 5])
    for one, other in zip(few, many, strict=False):
        assert all((a.ids == b.ids).all() for a, b in zip(one.examples, other.examples, strict=True))
    heads = [task.examples[0].ids[: tiny.num_prefix].tolist() for task in many]
    assert len({tuple(head) for head in heads}) == 3


def test_unknown_presets_are_refused():
    with pytest.raises(UserError, match="legal are small, medium, large, 1b"):
        users.bench_users("tiny", 4, 1, None)


def test_a_rival_leaves_the_base_as_it_was(tiny, tmp_path):
    bench = users._Bench(tiny, 2, tmp_path)
    calls = bench.variants()
    calls["trainer_oppu"][1]()
    assert not bench.lm.training
    assert not any(module.training for module in bench.lm.modules())
    assert not bench.lm.is_gradient_checkpointing
    assert not bench.lm.get_input_embeddings()._forward_hooks
    assert not any(hasattr(module, "lora_A") for module in bench.lm.modules())
