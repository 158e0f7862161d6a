"""Group experts as directories that plain PEFT loads: each adds what the level's expert adds at gate 1."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.errors import AdapterError
from proper_ds.model.base import find_targets
from proper_ds.model.config import FEED_FORWARD, LoraSettings
from proper_ds.model.expert_files import write_experts
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS, preset_of
from tests.fakes import tiny_llama

N = 3
SETTINGS = LoraSettings(r=2, lora_alpha=4.0, target_modules=FEED_FORWARD, layers=[1])


def level_of(preset, divide_by_experts=False):
    targets = find_targets(tiny_llama(), SETTINGS.target_modules, SETTINGS.layers)
    sizes = {"feature_size": 4, "user_vector_size": 3} if preset == "proper" else {"num_users": 2}
    chosen = preset_of(preset, "encoder", divide_by_experts)
    level = GroupLevel(LoraLayout.of(targets, SETTINGS), chosen, GroupSizes(N, **sizes), 0)
    generator = torch.Generator().manual_seed(3)
    for _, b_NEr in level.expert_weights():
        b_NEr.copy_(torch.randn(b_NEr.shape, generator=generator) * 0.3)
    return level


@pytest.mark.parametrize(("preset", "divided"), [*((name, False) for name in PRESETS), ("proper", True)])
def test_plain_peft_adds_what_the_expert_adds(preset, divided, tmp_path):
    level = level_of(preset, divided)
    assert write_experts(level, tmp_path, range(N), "some/base") == []
    ids = torch.arange(3, 20).unsqueeze(0)
    factor = 1 / N if divided or preset == "proper-released" else 1.0
    for number in range(N):
        by_hand = tiny_llama()
        with torch.no_grad():
            for shape, (a, b) in zip(level.layout.modules, level.expert_weights(), strict=True):
                by_hand.get_submodule(shape.name).weight += factor * 2.0 * b[number] @ a[number]
            wanted = by_hand(input_ids=ids).logits
            model = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"expert-{number:04d}").eval()
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert (found - tiny_llama()(input_ids=ids).logits).abs().max() > 1e-2


def test_what_has_no_effect_is_refused(tmp_path):
    level = level_of("proper")
    for a_NrD, b_NEr in level.expert_weights():
        a_NrD[0], b_NEr[1] = 0, 0
    assert write_experts(level, tmp_path, range(N), "some/base") == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["expert-0002"]
    with pytest.raises(AdapterError, match="no expert has any effect"):
        write_experts(level, tmp_path / "none", [0, 1], "some/base")
    level.expert_weights()[0][0][2, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match="expert 2 of 3 has weights that are not finite"):
        write_experts(level, tmp_path, range(N), "some/base")


def test_the_command_writes_those_that_are_named(tmp_path):
    run = tmp_path / "run"
    (run / "population/adapter").mkdir(parents=True)
    made_for = {"base_model_name_or_path": "some/base", "revision": "abc"}
    (run / "population/adapter/adapter_config.json").write_text(json.dumps(made_for))
    level_of("proper").save(run / "group/proper/level.safetensors", "group")

    def tell(*arguments):
        return CliRunner().invoke(app, ["experts", *map(str, arguments), "--run", str(run)])

    out = tmp_path / "out"
    assert "1 experts of" in tell(2, "--out", out).output
    assert json.loads((out / "expert-0002/adapter_config.json").read_text())["revision"] == "abc"
    assert [path.name for path in out.iterdir()] == ["expert-0002"]
    assert "there is no expert 3: proper has 0 to 2" in str(tell(3, "--out", out).exception)
    assert "it has proper" in str(tell("--preset", "propre", "--out", out).exception)
