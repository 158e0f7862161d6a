"""A base loaded straight into its ZeRO-3 shards is the base: bit for bit, in training, and merged with a LoRA."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file

from proper_ds.config import validate
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import current_ranks
from proper_ds.errors import AdapterError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.adapter_file import peft_config, save_peft
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.training.context import RunContext
from proper_ds.training.population import PopulationModule, PopulationStage, population_row
from tests.conftest import REPO
from tests.distributed.gang import run_ranks
from tests.distributed.test_zero import FEED_FORWARD, NUM_PARTS, SETTINGS, make_batch
from tests.fakes import tiny_llama


def make_run(tmp_path, dtype, tied=True):
    """A run's folder with a base in several files and a population adapter; returns its raw configuration."""
    lm = tiny_llama()
    if not tied:
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(torch.randn_like(lm.lm_head.weight) * 0.2)
    lm.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    settings = LoraSettings(r=3, lora_alpha=5.0, target_modules=FEED_FORWARD)
    layout = LoraLayout.of(find_targets(lm, FEED_FORWARD), settings)
    row_P = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(5)) * 0.1
    about = peft_config(layout, FEED_FORWARD, 0.0, "base", None)
    save_peft(tmp_path / "run" / "population" / "adapter", row_P, layout, about)
    return {
        "output_dir": str(tmp_path / "run"),
        "base": {"model": str(tmp_path / "base"), "dtype": dtype},
        "data": {"path": str(tmp_path)},
        "distributed": {"deepspeed": str(REPO / "ds_configs" / "zero3.json"), "num_ranks": 2},
    }


def context_of(raw):
    return RunContext(validate(raw, "test"), torch.device("cpu"))


def zero3(more, accumulation=1, bf16=False):
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": accumulation})
    raw = {"zero_optimization": {"stage": 3} | more}
    found, problems = resolve_ds(raw, "group", settings, dist.get_world_size(), bf16)
    assert not problems
    return found


def compare_shards(raw, more):
    """On a rank: (bytes held by this rank, of the whole base), after all was compared."""
    context = context_of(raw)
    bf16 = context.dtype == torch.bfloat16
    held = whole_bytes = 0
    for merged in (False, True):
        whole = context.load_lm(merged)
        sharded = context.load_lm(merged, zero3(more, bf16=bf16))
        assert (sharded.lm_head.weight is sharded.model.embed_tokens.weight) == whole.config.tie_word_embeddings
        pairs = zip(whole.named_parameters(), sharded.named_parameters(), strict=True)
        held = whole_bytes = 0
        for (name, wanted), (same_name, found) in pairs:
            assert name == same_name
            size = math.ceil(wanted.numel() / dist.get_world_size())
            start = size * dist.get_rank()
            part = wanted.flatten()[start : start + size]
            assert found.numel() == 0, "nothing is whole"
            assert found.ds_tensor.numel() == size
            assert found.ds_tensor.dtype == wanted.dtype == context.dtype
            assert torch.equal(found.ds_tensor[: len(part)], part), name
            held, whole_bytes = held + found.ds_tensor.nbytes, whole_bytes + wanted.nbytes
        for (name, wanted), (_, found) in zip(whole.named_buffers(), sharded.named_buffers(), strict=True):
            assert torch.equal(wanted, found), name
            assert wanted.dtype == found.dtype
    return held, whole_bytes


@pytest.mark.parametrize(("dtype", "num_ranks", "tied"), [("float32", 2, True), ("bfloat16", 3, False)])
def test_shards_are_slices_of_the_whole_base(tmp_path, dtype, num_ranks, tied):
    raw = make_run(tmp_path, dtype, tied)
    for held, whole in run_ranks(compare_shards, num_ranks, raw, {"stage3_param_persistence_threshold": 0}):
        assert held < whole / num_ranks + 4 * 64  # padding of each parameter


def train(raw, sharded, more, num_steps=3):
    context, ranks = context_of(raw), current_ranks(1)
    bf16 = context.dtype == torch.bfloat16
    accumulation = NUM_PARTS // ranks.num_ranks
    ds_config = zero3(more, accumulation, bf16)
    lm = context.load_lm(True, ds_config if sharded else None)
    targets = find_targets(lm, FEED_FORWARD)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=FEED_FORWARD))
    engine = RankEngine(PopulationModule(PersonalModel(lm, targets), layout, 0.0, seed=3), ds_config, ranks)
    losses = []
    for step in range(num_steps):
        batches = [make_batch(step, a * ranks.num_ranks + ranks.rank) for a in range(accumulation)]
        losses.append(ranks.sum([engine.step(batches, SETTINGS.learning_rate)["ce"]])[0])
    state = engine.state()
    engine.close()
    return losses, state


def train_both(raw, settings):
    return [(train(raw, False, more), train(raw, True, more)) for more in settings]


OFFLOAD = {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", [{}, {"stage3_param_persistence_threshold": 0}, OFFLOAD]), ("bfloat16", [{}])],
)
def test_training_on_shards_is_training_on_the_whole_base(tmp_path, dtype, settings):
    raw = make_run(tmp_path, dtype)
    for results in run_ranks(train_both, 2, raw, settings):
        for (losses, state), (found_losses, found) in results:
            assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
            assert found_losses == pytest.approx(losses, rel=1e-6)
            assert state.keys() == found.keys()
            for name, value in state.items():
                assert torch.allclose(found[name], value, atol=1e-6), name


def refusal(raw):
    with pytest.raises(AdapterError) as caught:
        context_of(raw).load_lm(False, zero3({}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}), "shape"),
    ],
)
def test_a_base_that_is_not_in_its_files_is_refused(tmp_path, change, told):
    raw = make_run(tmp_path, "float32")
    folder = tmp_path / "base"
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (message,) = run_ranks(refusal, 1, raw)
    assert told in message


def test_a_base_without_safetensors_is_refused(tmp_path):
    raw = make_run(tmp_path, "float32")
    folder = tmp_path / "base"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        (folder / name).unlink()
    (message,) = run_ranks(refusal, 1, raw)
    assert "not there" in message
    (folder / "model.safetensors.index.json").unlink()
    (message,) = run_ranks(refusal, 1, raw)
    assert "ZeRO 0, 1 or 2" in message


class _Stage:
    """Just enough of a population stage to ask it about its result."""

    def __init__(self, module):
        self.module = module


def ask(raw, more, change):
    """What the population stage says of an adapter trained under ZeRO 3, after `change` of its weights."""
    context, ranks = context_of(raw), current_ranks(1)
    lm = context.load_lm(False, zero3(more))
    targets = find_targets(lm, FEED_FORWARD)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=FEED_FORWARD))
    module = PopulationModule(PersonalModel(lm, targets), layout, 0.0, seed=3)
    if change == "not finite":
        module.loras[0].lora_A.data.fill_(math.inf)
    engine = RankEngine(module, zero3(more), ranks)
    rate = 0.0 if change == "without effect" else SETTINGS.learning_rate
    for step in range(0 if change == "not finite" else 2):
        engine.step([make_batch(step, ranks.rank)], rate)
    message, losses = "", []
    try:
        PopulationStage.check_result(_Stage(module), make_batch(5, ranks.rank), ranks)
    except AdapterError as error:
        message = str(error)
    if not change:  # training goes on as if nobody had asked
        losses = [engine.step([make_batch(9, ranks.rank)], rate)["ce"]]
    state = engine.state() if not change else {}
    weights = {name.removeprefix("weight/"): value for name, value in state.items() if name.startswith("weight/")}
    engine.close()
    return message, weights, layout, losses


@pytest.mark.parametrize(
    ("change", "told"), [("", ""), ("without effect", "changes no logit"), ("not finite", "not finite")]
)
def test_an_adapter_trained_under_zero_3_is_probed_on_every_rank(tmp_path, change, told):
    raw = make_run(tmp_path, "float32")
    results = run_ranks(ask, 2, raw, {"stage3_param_persistence_threshold": 0}, change)
    for message, _, _, losses in results:
        assert (told in message) if told else not message
        assert all(math.isfinite(loss) for loss in losses)
    if change:
        return
    _, weights, layout, _ = results[0]
    about = peft_config(layout, FEED_FORWARD, 0.0, str(tmp_path / "base"), None)
    save_peft(tmp_path / "out", population_row(weights, layout), layout, about)
    lm = context_of(raw).load_lm(False)
    ids = torch.arange(3, 13).unsqueeze(0)
    before = lm(input_ids=ids).logits
    with torch.no_grad():
        merged = PeftModel.from_pretrained(lm, tmp_path / "out")(input_ids=ids).logits
    assert (merged - before).abs().max() > 1e-4
    for name, value in weights.items():
        assert value.numel() > 0, name
        assert bool(value.any()), name
