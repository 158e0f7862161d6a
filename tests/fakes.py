"""Tiny models, tokenised examples and data sets that the tests share; nothing here needs a network or a file."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from proper_ds.data.tokens import HISTORY, Example

VOCAB = 97
UNUSED_TOKEN = VOCAB - 1
"""In no random example: a test may put it where it wants one user alone to meet it."""


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, num_layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of some thousand parameters whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    lm = LlamaForCausalLM(config)
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    lm.requires_grad_(False)
    if dtype is torch.float64:
        for module in lm.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(_norm_in_double, module)
    return lm.eval().to(dtype)


def _norm_in_double(module, x):
    """Hugging Face's norm goes through fp32 whatever the model's type, and so do its gradients: no test of 1e-9."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def random_examples(count: int, user: int, seed: int, longest: int = 24) -> list[Example]:
    """Examples of uneven length with answers of one to four tokens."""
    generator = np.random.default_rng([seed, user])
    found = []
    for position in range(count):
        num_prompt = int(generator.integers(3, longest))
        ids = generator.integers(3, UNUSED_TOKEN, num_prompt + int(generator.integers(1, 5)))
        found.append(Example(user, HISTORY, 0, position, num_prompt, ids.astype(np.int64)))
    return found


def write_json(path: Path, value: Any) -> Path:
    """JSON to a file, gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode("utf-8")))
    else:
        path.write_text(text, encoding="utf-8")
    return path
