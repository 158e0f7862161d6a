"""What is told before anything is trained, from data and base together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from proper_ds.config import validate
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import TokenData, tokenize
from proper_ds.errors import ConfigError, DataError
from proper_ds.pipeline import plan
from proper_ds.pipeline.plan import check_inputs
from proper_ds.training.anchors import anchors_among, merge_anchors
from tests.fakes import tiny_llama
from tests.training.test_profiles import model_folder  # noqa: F401 - a fixture


@pytest.fixture
def prepared(tmp_path):
    """`prepared(users by split)`: data in which each user has as many items as their number."""

    def make(**splits):
        folder = tmp_path / "in"
        folder.mkdir()
        for split, users in splits.items():
            rows = [
                {
                    "user": f"u{n}",
                    "history": [{"input": f"text {k}", "output": f"answer {k}"} for k in range(n)],
                    "query": f"{split} question?",
                    "answer": "gold",
                }
                for n in users
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        prepare(DataConfig(path=str(folder)), tmp_path / "prepared")
        return PreparedData(tmp_path / "prepared")

    return make


def config_of(tmp_path, methods, **sections):
    tiny_llama().save_pretrained(tmp_path / "base")
    raw = {"output_dir": str(tmp_path / "run"), "data": {"prepared": str(tmp_path / "prepared")}}
    base = {"model": str(tmp_path / "base"), "max_length": 100}
    return validate(
        raw | {"base": base, "evaluation": {"methods": methods, "num_tokens_per_batch": 128}} | sections, "t"
    )


def test_users_to_merge_from_are_looked_for_in_the_prepared_data(prepared, tmp_path, model_folder):  # noqa: F811
    from transformers import AutoTokenizer

    data = prepared(train=[0, 3, 5, 2], dev=[3, 1, 4])
    config = config_of(tmp_path, ["population", "merged"], merge={"num_anchors": 2, "num_neighbours": 1})
    assert check_inputs(config, data)
    tokenize(data, PromptEncoder(AutoTokenizer.from_pretrained(model_folder), ":", 100), tmp_path / "t", "train", 8)
    wanted = merge_anchors(TokenData(tmp_path / "t"), config)
    found = anchors_among(*plan._history_and_splits(data, config), config)
    assert found.tolist() == wanted.tolist()
    assert {data.keys()[n] for n in found.nonzero()[0]} == {"u5", "u2"}


def test_nobody_to_merge_from_is_told(prepared, tmp_path):
    data = prepared(train=[0, 3, 5], dev=[3, 5])
    config = config_of(tmp_path, ["population", "merged"], merge={"num_anchors": 2, "num_neighbours": 1})
    with pytest.raises(DataError, match="nobody to merge from"):
        check_inputs(config, data)
    assert check_inputs(config_of(tmp_path, ["population", "OPPU"]), data), "nobody else merges"


def test_modules_that_plora_would_not_find_are_told(prepared, tmp_path):
    data, plora = prepared(train=[1], dev=[2]), {"lora": {"target_modules": ["q_proj", "nope"]}}
    with pytest.raises(ConfigError, match=r"plora\.lora.*nope"):
        check_inputs(config_of(tmp_path, ["population", "PLoRA"], plora=plora), data)


def test_a_base_without_room_for_personal_tokens_is_told(prepared, tmp_path):
    data = prepared(train=[1], dev=[2])
    base = {"model": str(tmp_path / "base"), "max_length": 127}
    with pytest.raises(ConfigError, match=r"PPlug puts 2 tokens .* lower it to 126"):
        check_inputs(config_of(tmp_path, ["base", "PPlug"], base=base), data)
    assert check_inputs(config_of(tmp_path, ["population"], base=base), data)


def test_a_missing_scikit_learn_is_told(prepared, tmp_path, monkeypatch):
    def missing():
        raise DataError("install scikit-learn")

    data = prepared(train=[1], dev=[2])
    monkeypatch.setattr(plan, "sklearn_parts", missing)
    assert check_inputs(config_of(tmp_path, ["base", "words"]), data), "texts are copied"
    task = next(iter(data.manifest.tasks.values()))
    ratings = replace(task, kind="ordinal", labels=("1", "2"))
    monkeypatch.setitem(data.manifest.tasks, task.name, ratings)
    with pytest.raises(DataError, match="scikit-learn"):
        check_inputs(config_of(tmp_path, ["base", "words"]), data)
    assert check_inputs(config_of(tmp_path, ["base", "own-habit"]), data), "it needs none"
