"""Ranks under DeepSpeed equal one plain process, at every ZeRO stage, and go on from each other's checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.distributed.checkpoint import Checkpoints
from proper_ds.distributed.ds_config import read_ds_file, resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.expert_parallel import ExpertGroups
from proper_ds.distributed.ranks import current_ranks
from proper_ds.errors import FleetError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS
from proper_ds.model.routing import Rows
from proper_ds.training.config import GroupConfig
from proper_ds.training.group import group_apart
from proper_ds.training.group_module import GroupModule
from proper_ds.training.population import PopulationModule
from proper_ds.training.rank_batch import RankBatch
from proper_ds.training.rank_stage import load_trained
from tests.conftest import REPO
from tests.distributed.gang import run_ranks
from tests.fakes import random_examples, tiny_llama

NUM_STEPS, NUM_PARTS, PER_PART = 6, 4, 2
SETTINGS = GroupConfig(learning_rate=5e-3, max_grad_norm=0.5, weight_decay=0.1, per_device_train_batch_size=PER_PART)
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def make_module(kind, lm=None):
    lm = lm if lm is not None else tiny_llama()
    targets = find_targets(lm, FEED_FORWARD)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=FEED_FORWARD))
    model = PersonalModel(lm, targets)
    if kind == "population":
        return PopulationModule(model, layout, 0.0, seed=3), None
    sizes = {"feature_size": 7, "user_vector_size": 5}
    level = GroupLevel(layout, PRESETS[kind], GroupSizes(3, **sizes), 1)
    return GroupModule(model, level, 0.0, 0.05, 0.05), level


def make_batch(step, part):
    """Part `part` of step `step`; the last part of every third step has no example, as at an epoch's end."""
    parts = [random_examples(PER_PART, 100 * step + p, seed=8) for p in range(NUM_PARTS)]
    if step % 3 == 2:
        parts[-1] = []
    num_rows = sum(len(p) for p in parts)
    num_targets = sum(e.num_targets for p in parts for e in p)
    weight = 1.0 if parts[part] else 0.0
    batch = collate(parts[part] or parts[0][:1])
    generator = torch.Generator().manual_seed(step * 10 + part)
    features = torch.randn(len(batch.examples), 7, generator=generator)
    known = torch.arange(len(batch.examples)) % 2 == 0
    return RankBatch(batch, weight, num_targets, num_rows, Rows(), features, known)


def train_plain(kind):
    """One process, torch's AdamW and clipping: (cross-entropy by step, weights)."""
    module, level = make_module(kind)
    named = dict((module if level is None else level).named_parameters())
    optimizer = torch.optim.AdamW(
        [p for p in named.values() if p.requires_grad], lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay
    )
    losses = []
    for step in range(NUM_STEPS):
        ce = 0.0
        for part in range(NUM_PARTS):
            loss, numbers = module(make_batch(step, part))
            loss.backward()
            ce += float(numbers["ce"])
        torch.nn.utils.clip_grad_norm_(named.values(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ce)
    return losses, {n: p.detach().clone() for n, p in named.items() if p.requires_grad}


def train_ranks(kind, zero, start, stop, folder):
    """On the running ranks: steps `start` to `stop`, from a checkpoint where there is one; leaves one.

    Returns (cross-entropy by step, weights afterwards).
    """
    ranks = current_ranks(1)
    accumulation = NUM_PARTS // ranks.num_ranks
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": accumulation})
    if isinstance(zero, str):
        raw = read_ds_file(zero)
    else:
        raw = {"zero_optimization": {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})}
    ds_config, problems = resolve_ds(raw, "group", settings, ranks.num_ranks, bf16=False, hidden_size=32)
    assert not problems
    module, level = make_module(kind)
    checkpoints = Checkpoints(Path(folder), "inputs", 1)
    checkpoint = checkpoints.latest(ranks) if start else None
    if checkpoint is not None:
        load_trained(module, checkpoint.tensors)
    apart = [] if level is None else group_apart(level, ExpertGroups.make(ranks, 1), ds_config, 0)[0]
    engine = RankEngine(module, ds_config, ranks, apart)
    losses = []
    for step in range(start, stop):
        batches = [make_batch(step, a * ranks.num_ranks + ranks.rank) for a in range(accumulation)]
        if step == start and checkpoint is not None:
            engine.restore(checkpoint, batches[0])
        numbers = engine.step(batches, SETTINGS.learning_rate)
        losses.append(ranks.sum([numbers["ce"]])[0])
    state = engine.state()
    assert bool(state) == ranks.is_first, "only the first rank writes them"
    checkpoints.save(stop, state, engine.shards(), {}, ranks)
    if stop == NUM_STEPS:
        refuse_what_is_not_finite(engine, batches, ranks)
    engine.close()
    return losses, checkpoints.latest(ranks).weights()


def refuse_what_is_not_finite(engine, batches, ranks):
    """One rank's last micro-batch is broken; no rank goes on, and nothing is trained apart by it."""
    before = engine.shards()
    if ranks.rank == ranks.num_ranks - 1:
        batches[-1].weight = math.inf
    with pytest.raises(FleetError, match=r"not finite .*grad_norm"):
        engine.step(batches, SETTINGS.learning_rate)
    for old, new in zip(before, engine.shards(), strict=True):
        assert old.name == "recent_shares" or torch.equal(old.tensor, new.tensor), old.name


def all_stages(kind, stages, folder):
    """Each ZeRO stage from scratch, then one checkpoint of each opened by the next stage."""
    whole = {zero: train_ranks(kind, zero, 0, NUM_STEPS, f"{folder}/whole-{zero}") for zero in stages}
    resumed = {}
    half = NUM_STEPS // 2
    for zero, following in zip(stages, [*stages[1:], stages[0]], strict=True):
        first, _ = train_ranks(kind, zero, 0, half, f"{folder}/{zero}")
        second, last = train_ranks(kind, following, half, NUM_STEPS, f"{folder}/{zero}")
        resumed[zero, following] = (first + second, last)
    return whole, resumed


def compare(found, wanted_losses, wanted_weights, tolerance=1e-5):
    losses, weights = found
    assert losses == pytest.approx(wanted_losses, abs=1e-4)
    assert weights.keys() == wanted_weights.keys()
    for name, weight in wanted_weights.items():
        assert weights[name].shape == weight.shape
        assert (weights[name] - weight).abs().max() < tolerance, name


@pytest.mark.parametrize(
    ("kind", "num_ranks", "stages"),
    [("population", 2, [0, 1, 2, 3]), ("proper", 2, [0, 2, 3]), ("proper", 1, [1, 3])],
)
def test_ranks_equal_one_process_and_resume_across_zero_stages(kind, num_ranks, stages, tmp_path):
    losses, weights = train_plain(kind)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2), "the test must train something"
    results = run_ranks(all_stages, num_ranks, kind, stages, str(tmp_path))
    for whole, resumed in results:
        for zero in stages:
            compare(whole[zero], losses, weights)
        for found in resumed.values():
            compare(found, losses, weights)


def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path):
    losses, weights = train_plain("proper")
    (first, _), _ = run_ranks(train_ranks, 2, "proper", 3, 0, NUM_STEPS // 2, str(tmp_path))
    ((second, last),) = run_ranks(train_ranks, 1, "proper", 2, NUM_STEPS // 2, NUM_STEPS, str(tmp_path))
    compare((first + second, last), losses, weights)


def each_file(kind, paths, folder):
    return [train_ranks(kind, path, 0, NUM_STEPS, f"{folder}/{n}") for n, path in enumerate(paths)]


def test_the_shipped_deepspeed_files_train_what_one_process_does(tmp_path):
    paths = sorted(str(path) for path in (REPO / "ds_configs").glob("*.json"))
    assert len(paths) == 4
    losses, weights = train_plain("proper")
    for found in run_ranks(each_file, 2, "proper", paths, str(tmp_path)):
        for one in found:
            compare(one, losses, weights)
