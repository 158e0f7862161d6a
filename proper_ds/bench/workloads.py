"""What `bench users` trains: random models of four sizes and random users; `bench scaling` uses them, too.

Speed does not depend on what the weights say, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from proper_ds.data.tokens import HISTORY, Example
from proper_ds.model.config import LoraSettings
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import UserTask

FIRST_TOKEN = 3


@dataclass(frozen=True)
class Preset:
    """One workload.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, vocab_size: the Llama's shape.
        num_users: users that our engine and the ceiling train; rivals train the first `num_rival_users` of them.
        shortest, longest: tokens of an item, its prefix included, drawn evenly.
        num_prefix: tokens at the beginning of every item of a user that are the same; each user has its own.
        target_share: share of an item's tokens that are its answer.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    num_users: int
    num_rival_users: int
    shortest: int
    longest: int
    num_prefix: int
    num_items: int = 8
    num_epochs: int = 3
    target_share: float = 0.15
    r: int = 8
    num_tokens_per_batch: int = 1024


PRESETS = {
    "small": Preset(128, 344, 4, 4, 4, 1024, 64, 64, 16, 48, 0),
    "medium": Preset(384, 1024, 5, 6, 6, 4096, 32, 8, 79, 119, 64),
    "large": Preset(768, 2048, 8, 12, 12, 4096, 16, 3, 79, 119, 64),
    "1b": Preset(2048, 8192, 16, 32, 8, 128256, 512, 8, 64, 128, 48, num_tokens_per_batch=16384),
}


def random_llama(preset: Preset, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen Llama with random weights, the same for the same preset."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        lm = LlamaForCausalLM(config)
    lm.requires_grad_(False)
    return lm.eval().to(dtype)


def random_users(preset: Preset, num_items: Sequence[int]) -> list[UserTask]:
    """One user for each number of items; the first ones are the same however many follow."""
    found = []
    for user, count in enumerate(num_items):
        generator = np.random.default_rng([1, user])
        prefix = generator.integers(FIRST_TOKEN, preset.vocab_size, preset.num_prefix)
        examples = []
        for position in range(count):
            length = int(generator.integers(preset.shortest, preset.longest + 1))
            rest = generator.integers(FIRST_TOKEN, preset.vocab_size, length - preset.num_prefix)
            num_prompt = length - max(1, round(preset.target_share * length))
            ids = np.concatenate([prefix, rest]).astype(np.int64)
            examples.append(Example(user, HISTORY, 0, position, num_prompt, ids))
        found.append(UserTask(f"user-{user:05d}", examples))
    return found


def user_settings(preset: Preset, batch_size: int, **changes: Any) -> UserConfig:
    """OPPU's optimizer settings: clipping 0.3, linear schedule with warm-up; on `q_proj` and `v_proj`."""
    values: dict[str, Any] = {
        "lora": LoraSettings(r=preset.r, lora_alpha=preset.r, target_modules=["q_proj", "v_proj"]),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
        "num_train_epochs": preset.num_epochs,
        "per_device_train_batch_size": batch_size,
        "num_tokens_per_batch": preset.num_tokens_per_batch,
        "num_slots": preset.num_users,
    }
    return UserConfig(**(values | changes))
