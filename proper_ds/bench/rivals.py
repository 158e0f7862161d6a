"""What others do for the same users: a plain PEFT loop, `transformers.Trainer` per user, and one shared LoRA.

`bench users` times them beside our engine. All start from our initial adapters, see the items in our order and use our
optimizer's settings, so that their losses must equal ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, get_scheduler

from proper_ds.data.batches import length_batches
from proper_ds.data.tokens import Example
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.lora import LoraLayout, SharedLora
from proper_ds.model.norms import fused_norms
from proper_ds.model.routing import Rows
from proper_ds.training.config import UserConfig
from proper_ds.training.rows import Row, pack
from proper_ds.training.slots import UserTask, item_order, num_user_steps

IGNORED = -100
"""The label that Hugging Face's loss leaves out."""
PAD_TO = 8


def _padded(examples: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as Hugging Face's collators make it: padded to a multiple of eight, prompt tokens without label."""
    width = -(-max(len(e.ids) for e in examples) // PAD_TO) * PAD_TO
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.from_numpy(example.ids)
        mask[row, :length] = 1
        labels[row, example.num_prompt : length] = ids[row, example.num_prompt : length]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _orders(task: UserTask, settings: UserConfig, seed: int) -> Iterator[list[Example]]:
    own, num_steps = seed_of(seed, "user", task.key), num_user_steps(len(task.examples), settings)
    for order in item_order(len(task.examples), num_steps, settings.per_device_train_batch_size, own):
        yield [task.examples[i] for i in order]


def _wrapped(lm: Any, settings: UserConfig) -> Any:
    lora = settings.lora
    about = LoraConfig(r=lora.r, lora_alpha=int(lora.lora_alpha), lora_dropout=0.0, target_modules=lora.target_modules)
    return get_peft_model(lm, about)


def _start(wrapped: Any, layout: LoraLayout, task: UserTask, seed: int) -> list[nn.Parameter]:
    """Put our initial adapter into PEFT's modules and return their parameters."""
    row_P = layout.initial_row(seed_of(seed, "user", task.key))
    modules = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    found = []
    with torch.no_grad():
        for name, a, b in layout.views(row_P.unsqueeze(0)):
            for side, value in ((modules[name].lora_A, a[0]), (modules[name].lora_B, b[0])):
                side["default"].weight.copy_(value)
                found.append(side["default"].weight)
    return found


def plain_loop(
    lm: Any, layout: LoraLayout, tasks: Sequence[UserTask], settings: UserConfig, seed: int
) -> list[list[float]]:
    """One user after another with PEFT and a loop of a dozen lines; losses by user and step."""
    wrapped, losses = _wrapped(lm, settings), []
    for task in tasks:
        parameters = _start(wrapped, layout, task, seed)
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        num_steps = num_user_steps(len(task.examples), settings)
        warmup = math.ceil(num_steps * settings.warmup_ratio)
        scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, num_steps)
        found = []
        for examples in _orders(task, settings, seed):
            loss = wrapped(**_padded(examples, lm.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            found.append(loss.detach())
        losses.append(torch.stack(found).tolist())
    wrapped.unload()
    return losses


class _UserTrainer(Trainer):
    """A Trainer that reads our batches in our order, and keeps its losses."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], **options: Any) -> None:
        super().__init__(**options)
        self._batches = batches
        self.losses: list[torch.Tensor] = []

    def get_train_dataloader(self) -> Any:
        return self._batches

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        found = super().compute_loss(*arguments, **options)
        self.losses.append((found[0] if isinstance(found, tuple) else found).detach())
        return found


def trainer(
    lm: Any,
    layout: LoraLayout,
    tasks: Sequence[UserTask],
    settings: UserConfig,
    seed: int,
    scratch: Path,
    as_oppu: bool = False,
) -> list[list[float]]:
    """A new `transformers.Trainer` for every user, as OPPU's released code; losses by user and step.

    Args:
        as_oppu: with its gradient checkpointing, and `save_pretrained` of every user into `scratch`.
    """
    losses = []
    for task in tasks:
        wrapped = _wrapped(lm, settings)
        _start(wrapped, layout, task, seed)
        if as_oppu:
            wrapped.enable_input_require_grads()
        batches = [_padded(examples, torch.device("cpu")) for examples in _orders(task, settings, seed)]
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=len(batches),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type=settings.lr_scheduler_type,
            warmup_steps=math.ceil(len(batches) * settings.warmup_ratio),
            gradient_checkpointing=as_oppu,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=lm.device.type == "cpu",
            bf16=lm.device.type == "cuda",
        )
        one = _UserTrainer(batches, model=wrapped, args=arguments)
        one.remove_callback(PrinterCallback)
        one.train()
        losses.append(torch.stack(one.losses).tolist())
        if as_oppu:
            wrapped.save_pretrained(scratch / task.key, save_embedding_layers=False)
        wrapped.unload()
        _restore(lm)
    return losses


def _restore(lm: Any) -> None:
    """Undo what PEFT and the Trainer leave behind on the base, or the next variant would pay for it."""
    lm.gradient_checkpointing_disable()
    lm.get_input_embeddings()._forward_hooks.clear()
    lm.requires_grad_(False)
    lm.eval()


def ceiling(
    model: PersonalModel, layout: LoraLayout, tasks: Sequence[UserTask], settings: UserConfig, seed: int
) -> None:
    """One shared LoRA on the same tokens, steps of all users together in large batches: what adapters cost nothing."""
    shared = {m.name: SharedLora(m.in_features, m.out_features, layout.r, layout.scaling, 0) for m in layout.modules}
    for lora in shared.values():
        lora.to(model.device)
    model.attach_shared(shared)
    parameters = [p for lora in shared.values() for p in lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    try:
        with fused_norms(model.lm):
            for step in zip(*(_orders(task, settings, seed) for task in tasks), strict=True):
                examples = [example for own in step for example in own]
                total = sum(e.num_targets for e in examples)
                for part in length_batches([len(e.ids) for e in examples], settings.num_tokens_per_batch):
                    batch = pack([Row(0, 0, (examples[i],)) for i in part], model.device)
                    at = batch.places
                    model.set_rows(Rows(places=at))
                    losses_K = model.target_losses(batch.ids_RT, at.row_K, at.column_K, batch.target_K)
                    (losses_K.sum() / total).backward()
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        model.attach_shared(None)
        model.set_rows(Rows())
