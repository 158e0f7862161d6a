"""What a DeepSpeed file may say: nothing that DeepSpeed or the run would pass over, nothing that contradicts."""

from __future__ import annotations

import os

import pytest

from proper_ds.distributed import ds_keys
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.training.config import GroupConfig


def problems_of(raw, bf16=False, hidden_size=64):
    _, problems = resolve_ds(raw, "group", GroupConfig(), 2, bf16, hidden_size)
    return {problem.key.partition(":")[2]: str(problem) for problem in problems}


@pytest.mark.parametrize(
    ("raw", "key", "told"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping", "Did you mean `gradient_clipping`"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation", "Did you mean `zero_optimization`"),
        ({"zero_optimization": {"stage": 3, "stage3_max_life": 1}}, "zero_optimization.stage3_max_life", "no key"),
        ({"zero_optimization": 3}, "zero_optimization", "no section"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage", "0, 1, 2 or 3"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-3}}}, "optimizer.params.learning_rate", "lr"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer.params.lr", "section `group` makes it"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm", "section"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "Use AdamW"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "base.dtype makes it False"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "float32"),
        ({"fp16": {"enabled": True}}, "fp16", "base.dtype"),
        ({"train_batch_size": 7}, "train_batch_size", "makes it 16"),
        ({"activation_checkpointing": {}}, "activation_checkpointing", "gradient_checkpointing"),
        ({"elasticity": {}}, "elasticity", "last checkpoint"),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}},
            "zero_optimization.stage3_max_live_parameters",
            "no effect at ZeRO stage 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
            "use stage 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer",
            "no effect at ZeRO stage 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.nvme_path",
            "local NVMe disk",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            "zero_optimization.offload_param",
            "none, cpu and nvme",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size",
            "not supported",
        ),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "zero_optimization.sub_group_size", "nothing"),
    ],
)
def test_each_mistake_names_its_key(raw, key, told):
    found = problems_of(raw)
    assert list(found) == [key]
    assert told in found[key]


def test_bf16_needs_a_zero_stage_that_keeps_fp32_moments():
    assert "Use 1" in problems_of({}, bf16=True)["zero_optimization.stage"]
    assert not problems_of({"zero_optimization": {"stage": 1}}, bf16=True)
    assert not problems_of({"zero_optimization": {"stage": 0}})


def test_sizes_are_those_that_hugging_face_writes():
    zero = {"stage": 3} | dict.fromkeys(
        ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"], "auto"
    )
    found, problems = resolve_ds({"zero_optimization": zero}, "group", GroupConfig(), 2, False, 64)
    assert not problems
    assert found["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 4096,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
    }
    assert not problems_of({"zero_optimization": zero}, hidden_size=None), "before there is a base"


def test_the_tables_are_those_of_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    ours = ds_keys.ANY_STAGE | ds_keys.STAGE_3 | ds_keys.WITHOUT_EFFECT
    assert ours <= names
    others = names - ours
    outdated = {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "legacy_stage1"}
    inference = {"pipeline_loading_checkpoint", "override_module_apply", "save_muon_momentum_buffer_in_memory"}
    unused = {"compute_grad_norm", "parameter_alignment"}
    assert others <= set(ds_keys.REFUSED) | outdated | inference | unused
