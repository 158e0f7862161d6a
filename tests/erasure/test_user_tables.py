"""A forgotten user's line in a group level's table becomes the unknown user's; everybody else's stays."""

from __future__ import annotations

import pytest
import torch

from proper_ds.erasure.rows import erase_table_lines, has_tables
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.model.plora import KIND, TABLE, PersonalLoras
from proper_ds.model.presets import PRESETS, preset_of
from proper_ds.model.weights_file import save_weights

LAYOUT = LoraLayout((ModuleShape("a", 6, 5), ModuleShape("b", 5, 4)), 2, 4.0)


@pytest.mark.parametrize("preset", [PRESETS["proper-released"], preset_of("proper", "table")])
def test_forgotten_users_have_the_unknown_users_line(tmp_path, preset):
    level = GroupLevel(LAYOUT, preset, GroupSizes(3, user_vector_size=4, num_users=5), seed=0)
    torch.nn.init.normal_(level.user_table.weight)
    path = tmp_path / "level.safetensors"
    level.save(path, "group")
    assert has_tables(tmp_path)
    taken = erase_table_lines(path, [1, 3, 77])
    assert taken.num_rows == 2
    table, before = GroupLevel.load(path).user_table.weight, level.user_table.weight
    assert torch.equal(table[[2, 4]], before[[0, 0]])
    assert torch.equal(table[[0, 1, 3, 5]], before[[0, 1, 3, 5]])
    assert erase_table_lines(path, [1, 3]).num_rows == 0


def test_levels_without_tables_are_left_alone(tmp_path):
    sizes = GroupSizes(3, feature_size=4, user_vector_size=4)
    GroupLevel(LAYOUT, PRESETS["proper"], sizes, seed=0).save(tmp_path / "level.safetensors", "group")
    assert not has_tables(tmp_path)
    assert erase_table_lines(tmp_path / "level.safetensors", [0]).num_rows == 0


def test_a_forgotten_users_vector_in_plora_is_the_generic_users(tmp_path):
    shared, table_LU = PersonalLoras(LAYOUT, 4, seed=0), torch.randn(6, 4)
    table_LU[0] = 0
    path = tmp_path / "level.safetensors"
    save_weights(path, shared.state_dict() | {TABLE: table_LU}, KIND, shared.description(), "plora")
    assert has_tables(tmp_path)
    assert erase_table_lines(path, [1]).num_rows == 1
    _, found_LU = PersonalLoras.load(path)
    assert not found_LU[2].any()
    assert torch.equal(found_LU[[1, 3, 4, 5]], table_LU[[1, 3, 4, 5]])
