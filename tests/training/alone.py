"""One user, one process, one example at a time: PEFT's LoRA under torch's own AdamW, clipping and schedules."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from proper_ds.files import seed_of
from proper_ds.training.slots import item_order, num_user_steps

SEED = 7


def peft_of(lm, settings, r=None, targets=None):
    lora = settings.lora
    return get_peft_model(
        lm,
        LoraConfig(
            r=r or lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=0.0,
            target_modules=targets or lora.target_modules,
            layers_to_transform=lora.layers,
        ),
    )


def _start(wrapped, layout, row_P, r):
    loras = {}
    for name, a, b in layout.with_rank(r).views(layout.narrowed(row_P, r).unsqueeze(0)):
        module = next(m for n, m in wrapped.named_modules() if n.endswith(name) and hasattr(m, "lora_A"))
        module.lora_A["default"].weight.data = a[0].clone()
        module.lora_B["default"].weight.data = b[0].clone()
        loras[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return loras


def train_alone(lm, wrapped, layout, task, settings, r=None, num_steps=None):
    """(losses, row): the schedule is that of all the user's steps, the training ends after `num_steps`."""
    r = r or layout.r
    seed = seed_of(SEED, "user", task.key)
    loras = _start(wrapped, layout, layout.first_row(seed, r).to(lm.dtype), r)
    parameters = [p for pair in loras.values() for p in pair]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    planned = num_user_steps(len(task.examples), settings)
    warmup = math.ceil(planned * settings.warmup_ratio)
    scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, planned)
    losses = []
    orders = item_order(len(task.examples), planned, settings.per_device_train_batch_size, seed)
    for _, order in zip(range(num_steps or planned), orders, strict=False):
        examples = [task.examples[i] for i in order]
        total = sum(e.num_targets for e in examples)
        loss = torch.zeros((), dtype=lm.dtype)
        for e in examples:
            ids = torch.from_numpy(e.ids).unsqueeze(0)
            logits = lm(input_ids=ids).logits[0, e.num_prompt - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, e.num_prompt :], reduction="sum") / total
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    row = torch.cat([torch.cat([a.flatten(), b.flatten()]) for a, b in loras.values()]).detach()
    return losses, row
