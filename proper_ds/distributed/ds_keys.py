"""Which keys a DeepSpeed file may hold: those that DeepSpeed does not know it passes over, and typing errors with them.

Tables for `ds_config.py`; a test compares them with DeepSpeed's own. Anything else is refused by name.
"""

from __future__ import annotations

import difflib
from typing import Any

from proper_ds.errors import Problem

KEY = "distributed.deepspeed"

TOP = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "timers",
    "log_level",
    "tensorboard",
    "wandb",
    "csv_monitor",
}
BF16 = {"enabled", "immediate_grad_update", "check_grad_overflow"}
OPTIMIZER = {"type", "params"}
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "foreach", "fp32_optimizer_states"}
ANY_STAGE = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_optimizer",
    "sub_group_size",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "memory_efficient_linear",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
}
STAGE_3 = {
    "offload_param",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "leaf_module",
}
WITHOUT_EFFECT = {
    "elastic_checkpoint",
    "load_from_fp32_weights",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
}
"""They are about DeepSpeed's checkpoints, and stand in many files: allowed."""

REFUSED = {
    "scheduler": "The schedule comes from `lr_scheduler_type`; remove it from the DeepSpeed file.",
    "fp16": "Use `base.dtype: bfloat16` or `float32`; remove it from the DeepSpeed file.",
    "amp": "Use `base.dtype: bfloat16` or `float32`; remove it from the DeepSpeed file.",
    "torch_autocast": "Use `base.dtype: bfloat16` or `float32`; remove it from the DeepSpeed file.",
    "data_types": "Types come from `base.dtype`; remove it from the DeepSpeed file.",
    "curriculum_learning": "proper_ds orders the data itself; remove it from the DeepSpeed file.",
    "data_efficiency": "proper_ds orders the data itself; remove it from the DeepSpeed file.",
    "activation_checkpointing": "Use `gradient_checkpointing: true` in the stage's section instead.",
    "checkpoint": "proper_ds writes its own checkpoints; remove it from the DeepSpeed file.",
    "elasticity": "Remove it: a run goes on with other ranks from its last checkpoint.",
    "tensor_parallel": "Use ZeRO 3 for bases that no device can hold; remove it from the DeepSpeed file.",
    "expert_parallel": "Use `distributed.expert_parallel_size`; remove it from the DeepSpeed file.",
    "compile": "proper_ds does not compile the model; remove it from the DeepSpeed file.",
    "zero_hpz_partition_size": "The base is loaded straight into its shards, which knows one copy; remove it.",
    "zero_quantized_weights": "The base is loaded straight into its shards as it is; remove it.",
    "zero_quantized_nontrainable_weights": "The base is loaded straight into its shards as it is; remove it.",
    "zero_quantized_gradients": "Gradients are small here: only adapters train; remove it.",
    "zenflow": "Remove it: only adapters train.",
    "bf16_master_weights_and_grads": "What trains is kept in float32, whatever the base's type; remove it.",
    "bf16_optimizer_states": "What trains is kept in float32, whatever the base's type; remove it.",
    "max_grad_norm": "Use `max_grad_norm` of the stage's section; remove it from the DeepSpeed file.",
    "adam_w_mode": "Weight decay is AdamW's, as in every other stage; remove it.",
    "bias_correction": "Bias correction is AdamW's, as in every other stage; remove it.",
}


def unknown_keys(raw: dict[str, Any]) -> list[Problem]:
    """A problem for each key that nothing here reads, and each section that is none."""
    found = _check(raw, "", TOP)
    for section, legal in (("optimizer", OPTIMIZER), ("bf16", BF16)):
        found += _check(raw.get(section, {}), f"{section}.", legal)
    params = raw.get("optimizer", {}).get("params", {}) if isinstance(raw.get("optimizer", {}), dict) else {}
    found += _check(params, "optimizer.params.", OPTIMIZER_PARAMS)
    return found + _check(raw.get("zero_optimization", {}), "zero_optimization.", ANY_STAGE | STAGE_3 | WITHOUT_EFFECT)


def _check(section: Any, prefix: str, legal: set[str]) -> list[Problem]:
    if not isinstance(section, dict):
        return [Problem(f"{KEY}:{prefix.rstrip('.')}", f"is {section!r}, no section", "Write a JSON object there.")]
    found = []
    for key in sorted(set(section) - legal):
        if key in REFUSED:
            found.append(Problem(f"{KEY}:{prefix}{key}", "is not supported", REFUSED[key]))
            continue
        near = difflib.get_close_matches(key, legal, n=1)
        mend = f"Did you mean `{near[0]}`?" if near else f"Remove it. Legal keys here: {', '.join(sorted(legal))}."
        found.append(Problem(f"{KEY}:{prefix}{key}", "is no key that has an effect", mend))
    return found
