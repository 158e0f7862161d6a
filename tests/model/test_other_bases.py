"""Bases other than Llama: what rows of several items need is checked, and refused where it does not hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, Qwen2Config, Qwen3Config

from proper_ds.errors import AdapterError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import attention_window, check_masks, find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.places import find_top
from proper_ds.training.config import UserConfig
from proper_ds.training.users import train_users
from tests.fakes import VOCAB
from tests.training.test_users_options import tasks_for

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def made(config):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return lm


def losses_of(lm, **changes):
    lora = LoraSettings(r=2, target_modules=["q_proj", "v_proj"], layers=changes.pop("layers", None))
    settings = UserConfig(lora=lora, num_train_epochs=2, num_slots=2, num_tokens_per_batch=128, **changes)
    layout = LoraLayout.of(find_targets(lm, lora.target_modules, lora.layers), lora)
    model = PersonalModel(lm, find_targets(lm, lora.target_modules))
    return [x for result in train_users(model, layout, tasks_for([5, 3]), settings, 1) for x in result.losses]


@pytest.mark.parametrize("config", [Qwen2Config(**SMALL), Qwen3Config(**SMALL, head_dim=8), MistralConfig(**SMALL)])
def test_sharing_is_exact_on_other_bases(config):
    lm = made(config)
    if attention_window(lm.config) is not None:
        lm.config.sliding_window = None
    check_masks(lm, "user.share_prefix")
    assert losses_of(made(config)) == pytest.approx(losses_of(made(config), share_prefix=False), abs=1e-5)


def test_a_window_is_told():
    assert attention_window(MistralConfig(**SMALL, sliding_window=8)) == 8
    assert attention_window(Qwen2Config(**SMALL, sliding_window=8)) is None
    assert attention_window(Qwen2Config(**SMALL, sliding_window=8, use_sliding_window=True)) == 8
    assert attention_window(Qwen3Config(**SMALL)) is None


def test_kept_states_with_layers_of_several_kinds():
    config = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    plain = losses_of(made(config), share_prefix=False, layers=[3], cache_bytes=0)
    kept = losses_of(made(config), share_prefix=False, layers=[3])
    assert kept == pytest.approx(plain, abs=1e-5)


def test_a_base_without_masks_is_refused():
    lm = made(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(AdapterError, match="share_prefix=false"):
        check_masks(lm, "user.share_prefix")


def test_only_plain_feed_forward_layers_run_at_places():
    layer = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    layer.self_attn.o_proj, layer.mlp.experts = nn.Linear(2, 2), nn.Linear(2, 2)
    base = nn.Module()
    base.layers = nn.ModuleList([layer])
    assert find_top(base) == [layer.self_attn.o_proj]
    layer.mlp.down_proj = nn.Linear(2, 2)
    assert find_top(base) == [layer.self_attn.o_proj]
    del layer.mlp.experts
    assert find_top(base) == [layer.self_attn.o_proj, layer.mlp]
