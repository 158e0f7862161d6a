"""Gradient checkpointing changes neither losses nor weights, at any ZeRO stage, and runs every layer twice."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MambaConfig

from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.expert_parallel import ExpertGroups
from proper_ds.distributed.ranks import current_ranks
from proper_ds.distributed.sharded_base import holding
from proper_ds.errors import AdapterError
from proper_ds.model.checkpointing import checkpoint_layers
from proper_ds.training.group import group_apart
from tests.distributed.gang import run_ranks
from tests.distributed.test_sharded_base import OFFLOAD, context_of, make_run
from tests.distributed.test_zero import NUM_PARTS, SETTINGS, make_batch, make_module
from tests.fakes import VOCAB, tiny_llama

STAGES = [
    {"stage": 0},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "stage3_param_persistence_threshold": 0},
    {"stage": 3} | OFFLOAD,
]


def train(kind, raw_run, zero, checkpointed, num_steps=3):
    """(losses, calls of the first layer's feed-forward in a micro-batch, state)."""
    ranks, accumulation = current_ranks(1), NUM_PARTS // dist.get_world_size()
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": accumulation})
    ds_config, problems = resolve_ds({"zero_optimization": zero}, "group", settings, ranks.num_ranks, bf16=False)
    assert not problems
    lm = context_of(raw_run).load_lm(False, ds_config if zero["stage"] == 3 else None)
    if checkpointed:
        assert checkpoint_layers(lm, holding) == 2
        assert not any(module.training for module in lm.modules())
    calls = []
    lm.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    module, level = make_module(kind, lm)
    apart = [] if level is None else group_apart(level, ExpertGroups.make(ranks, 1), ds_config, 0)[0]
    engine = RankEngine(module, ds_config, ranks, apart)
    losses = []
    for step in range(num_steps):
        batches = [make_batch(step, a * ranks.num_ranks + ranks.rank) for a in range(accumulation)]
        losses.append(ranks.sum([engine.step(batches, SETTINGS.learning_rate)["ce"]])[0])
    state = engine.state() | {shard.name: shard.tensor for shard in engine.shards()}
    engine.close()
    return losses, len(calls) / num_steps / accumulation, state


def train_all(kind, raw_run, stages):
    return [(train(kind, raw_run, zero, False), train(kind, raw_run, zero, True)) for zero in stages]


@pytest.mark.parametrize(("kind", "stages"), [("population", STAGES[2:4]), ("proper", STAGES)])
def test_nothing_changes_but_the_work(tmp_path, kind, stages):
    raw_run = make_run(tmp_path, "float32")
    for results in run_ranks(train_all, 2, kind, raw_run, stages):
        for (losses, once, state), (found_losses, twice, found) in results:
            assert (once, twice) == (1, 2)
            assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
            assert found_losses == pytest.approx(losses, rel=1e-6)
            for name, value in state.items():
                assert torch.allclose(found[name], value, atol=1e-6), name


def test_a_base_without_such_layers_is_refused():
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    lm = AutoModelForCausalLM.from_config(config)
    type(lm).supports_gradient_checkpointing, kept = False, type(lm).supports_gradient_checkpointing
    try:
        with pytest.raises(AdapterError, match="does not support gradient checkpointing"):
            checkpoint_layers(lm)
    finally:
        type(lm).supports_gradient_checkpointing = kept


def test_forward_passes_without_gradients_run_once():
    lm = tiny_llama()
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        wanted = lm(ids).logits
        checkpoint_layers(lm)
        calls = []
        lm.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(lm(ids).logits, wanted)
    assert len(calls) == 1
