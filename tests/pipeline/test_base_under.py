"""Which base an exported adapter goes on: that of the population adapter in its own lane."""

from __future__ import annotations

import pytest

from proper_ds.errors import UserError
from proper_ds.files import write_json_atomic
from proper_ds.run_folder import base_under


def test_a_lanes_adapters_go_on_that_lanes_population(tmp_path):
    for lane, base in (("", "org/plain"), ("@bm25-4-lamp", "org/retrieval")):
        adapter = tmp_path / f"population{lane}" / "adapter"
        adapter.mkdir(parents=True)
        write_json_atomic(adapter / "adapter_config.json", {"base_model_name_or_path": base, "revision": "r1"})
    assert base_under(tmp_path, "OPPU") == ("org/plain", "r1")
    assert base_under(tmp_path, "OPPU@bm25-4-lamp") == ("org/retrieval", "r1")
    with pytest.raises(UserError, match="population@built-in/adapter, on which proper@built-in was trained"):
        base_under(tmp_path, "proper@built-in")


def test_a_base_that_the_run_made_is_named(tmp_path):
    adapter = tmp_path / "population" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "base").mkdir()
    made = {"base_model_name_or_path": "/where/the/run/was/base", "revision": None}
    write_json_atomic(adapter / "adapter_config.json", made)
    assert base_under(tmp_path, "proper") == (str(tmp_path / "base"), None)
    write_json_atomic(adapter / "adapter_config.json", made | {"base_model_name_or_path": "org/other"})
    assert base_under(tmp_path, "proper") == ("org/other", None), "trained for another after `base` was made"
