"""The base: target names, target-only logits, merging; adapters as PEFT directories that PEFT itself reads."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from proper_ds.data.batches import collate
from proper_ds.errors import AdapterError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.adapter_file import load_peft, peft_config, save_peft
from proper_ds.model.base import base_fingerprint, check_head, find_targets, load_base
from proper_ds.model.config import LoraSettings
from proper_ds.model.dropout import row_dropout
from proper_ds.model.lora import LoraLayout, SharedLora
from proper_ds.training.context import PopulationSwitch
from tests.fakes import random_examples, tiny_llama

TARGETS = ["q_proj", "down_proj"]


def random_row(layout, seed=0):
    return torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_targets_that_match_nothing_are_named_with_what_would():
    with pytest.raises(AdapterError, match=r"target_modules query match no linear module.*down_proj.*q_proj"):
        find_targets(tiny_llama(), ["q_proj", "query"])


def test_a_missing_base_says_what_to_do(tmp_path):
    with pytest.raises(AdapterError, match=r"base.model.*base.create"):
        load_base(str(tmp_path / "none"), None, torch.float32)


def test_a_head_that_does_more_is_refused():
    lm = tiny_llama()
    check_head(lm)
    head = lm.lm_head
    original = lm.forward
    lm.forward = lambda **k: type("Out", (), {"logits": torch.tanh(original(**k).logits)})()
    with pytest.raises(AdapterError, match="more to its logits"):
        check_head(lm)
    assert head is lm.lm_head


def test_target_losses_are_those_of_the_whole_model():
    lm = tiny_llama(dtype=torch.float64)
    examples = random_examples(6, 0, seed=4)
    batch = collate(examples)
    found = PersonalModel(lm, {}).target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    wanted = []
    for e in examples:
        logits = lm(input_ids=torch.from_numpy(e.ids).unsqueeze(0)).logits[0, e.num_prompt - 1 : -1]
        wanted += torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(e.ids[e.num_prompt :]), reduction="none"
        ).tolist()
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_logits_are_computed_at_target_positions_only():
    lm = tiny_llama()
    seen = []
    lm.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    batch = collate(random_examples(6, 0, seed=4))
    PersonalModel(lm, {}).target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    assert seen == [(len(batch.target_K), lm.config.vocab_size)]


def test_peft_reads_what_we_write_and_we_read_it_back(tmp_path):
    lm = tiny_llama()
    settings = LoraSettings(r=3, lora_alpha=5, target_modules=TARGETS)
    layout = LoraLayout.of(find_targets(lm, TARGETS), settings)
    row = random_row(layout)
    save_peft(tmp_path / "adapter", row, layout, peft_config(layout, TARGETS, 0.0, "somewhere", None))
    again, found = load_peft(tmp_path / "adapter")
    assert (found.r, found.lora_alpha, set(found.modules)) == (layout.r, layout.lora_alpha, set(layout.modules))
    wanted = {name: (a, b) for name, a, b in layout.views(row.unsqueeze(0))}
    for name, a, b in found.views(again.unsqueeze(0)):
        assert torch.equal(a, wanted[name][0])
        assert torch.equal(b, wanted[name][1])

    ids = torch.arange(3, 15).unsqueeze(0)
    model = PersonalModel(tiny_llama(), {})
    base_logits = model.lm(input_ids=ids).logits
    ours = tiny_llama()
    targets = find_targets(ours, TARGETS)
    loras = {name: (a[0], b[0]) for name, a, b in layout.views(row.unsqueeze(0))}
    switch = PopulationSwitch(targets, loras, layout.scaling)
    switch.set(True)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        merged, wanted = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        assert (merged - wanted).abs().max() < 1e-5
        assert (merged - base_logits).abs().max() > 0.1
        switch.set(False)
        assert torch.equal(ours(input_ids=ids).logits, base_logits), "the original weights come back bit for bit"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row * float("nan"), "not finite"),
        (lambda row: row[:-1], "where its layout needs"),
        (lambda row: row * 0, "no effect"),
    ],
)
def test_useless_adapters_are_not_written(tmp_path, spoil, message):
    layout = LoraLayout.of(find_targets(tiny_llama(), TARGETS), LoraSettings(r=3, target_modules=TARGETS))
    with pytest.raises(AdapterError, match=message):
        save_peft(tmp_path / "a", spoil(random_row(layout)), layout, {})
    assert not (tmp_path / "a").exists()


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no PEFT directory"):
        load_peft(tmp_path)


def test_shared_lora_starts_without_effect():
    lm = tiny_llama()
    targets = find_targets(lm, TARGETS)
    ids = torch.arange(3, 15).unsqueeze(0)
    before = lm(input_ids=ids).logits
    model = PersonalModel(lm, targets)
    model.attach_shared({name: SharedLora(m.in_features, m.out_features, 2, 1.0, 0) for name, m in targets.items()})
    assert torch.equal(model.lm(input_ids=ids).logits, before)


def test_dropout_depends_on_nothing_but_its_key():
    x = torch.ones(3, 50, 40)
    key = torch.tensor([11, 2**62, -5])
    wide = row_dropout(x, key, 4, 0.3)
    assert torch.equal(row_dropout(x[1:2, :20], key[1:2], 4, 0.3), wide[1:2, :20])
    assert not torch.equal(row_dropout(x, key, 5, 0.3), wide)
    assert float((wide == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(wide.mean()) == pytest.approx(1, abs=0.02)
    columns = (wide[0] == 0).float()
    assert columns.mean(0).std() < 0.12, "no channel is dropped always"
    assert columns.mean(1).std() < 0.12, "no token is dropped always"


def test_fingerprint_changes_with_the_weights(tmp_path):
    tiny_llama(seed=0).save_pretrained(tmp_path / "a")
    tiny_llama(seed=1).save_pretrained(tmp_path / "b")
    assert base_fingerprint(str(tmp_path / "a"), None) != base_fingerprint(str(tmp_path / "b"), None)
    assert base_fingerprint("org/name", None) != base_fingerprint("org/name", "v2")
