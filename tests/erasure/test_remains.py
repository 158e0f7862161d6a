"""What a receipt says remains: by the stages that are there, in every lane, whatever the configuration says by now."""

from __future__ import annotations

import json

import torch

from proper_ds.config import validate
from proper_ds.data.background import Background
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import tokenize
from proper_ds.erasure.remains import how_to_remove, learned_from, still_in_sources
from proper_ds.model.config import CreateBase
from proper_ds.training.context import RunContext
from proper_ds.training.create_base import train_tokenizer

LANE = "bm25-4-lamp+built-in"
TRAIN = {"train_on": ["history", "queries"], "train_split": "train", "seed": 41}
STAGES = {
    "population": TRAIN,
    f"population@{LANE}": TRAIN | {"train_on": ["history"]},
    "pplug/base": TRAIN,
    "plora": TRAIN,
    "group/proper": TRAIN | {"users": "train", "user_vector": "encoder"},
    f"group/proper@{LANE}": TRAIN | {"users": "all", "user_vector": "encoder"},
    "group/proper-released": TRAIN,
    "start/proper": TRAIN | {"train_on": ["queries"]},
    "router/proper": TRAIN | {"train_on": ["queries"], "users": "train", "max_users": None},
    "store/proper-joint": TRAIN | {"users": "all", "max_users": None},
    "prior/proper": {"train_split": "train", "max_users": None},
    "predictions/merged": {"num_anchors": 1},
    "predictions/mix": {"num_anchors": 2},
    "predictions/proper": {"split": "dev"},
}
"""Stages that are there, with the settings that they were made with."""


def run_of(tmp_path, methods=("base",), **more):
    """A run's context: users a, with 3 items, and b, with 2, are in training; c and d are asked."""
    users = {"train": {"a": 3, "b": 2}, "dev": {"c": 4, "d": 1}}
    for split, counts in users.items():
        rows = [
            {
                "user": key,
                "history": [{"input": f"text {n} of {key}", "output": "yes"} for n in range(count)],
                "query": f"{split}?",
                "answer": "no",
            }
            for key, count in counts.items()
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    raw = {"output_dir": str(tmp_path / "run"), "data": {"path": [str(tmp_path)]}, "base": {"create": {}}}
    config = validate(raw | {"evaluation": {"methods": list(methods)}} | more, "t")
    context = RunContext(config, torch.device("cpu"))
    prepare(DataConfig(path=str(tmp_path)), context.folder.stage("prepared").path)
    tokenizer = train_tokenizer(["text of yes no? train? dev?"] * 9, CreateBase(vocab_size=300))
    for name in ("tokens", f"tokens@{LANE}"):
        place = context.folder.stage(name)
        tokenize(context.prepared, PromptEncoder(tokenizer, ":", 60), place.path, "train", 8)
        place.commit("x", {"train_split": "train"}, 1.0)
    Background.count(context.prepared.users(), "train").write(context.folder.stage(f"tokens@{LANE}").path)
    for name, settings in STAGES.items():
        place = context.folder.stage(name)
        place.path.mkdir(parents=True)
        place.commit("x", settings, 1.0)
    (context.folder.root / "profiles@other").mkdir()
    return context


def test_every_stage_that_learned_from_the_users_is_named(tmp_path):
    context = run_of(tmp_path)
    keys = context.keys

    def told(*users):
        found = learned_from(context, [keys.index(user) for user in users])
        return {
            name: [about.get(n) for n in ("num_users", "num_items", "num_questions")] for name, about in found.items()
        }

    assert told("a", "b") == {
        "population": [2, 5, 2],
        f"population@{LANE}": [2, 5, 0],
        "pplug/base": [2, 5, 2],
        "plora": [2, 5, 2],
        "group/proper": [2, 5, 2],
        f"group/proper@{LANE}": [2, 5, 2],
        "group/proper-released": [2, 5, 2],
        "start/proper": [2, 5, 2],
        "router/proper": [2, 0, 2],
        "store/proper-joint": [2, 5, 2],
        "prior/proper": [2, 5, 2],
        f"tokens@{LANE}": [2, 5, 0],
        "predictions/merged": [1, None, None],
        "predictions/mix": [2, None, None],
    }
    only_asked = told("d")
    assert {name for name, (num_users, *_) in only_asked.items() if num_users} == {
        "plora",
        f"group/proper@{LANE}",
        "group/proper-released",
        "store/proper-joint",
    }
    assert only_asked["plora"] == [1, 1, 0]
    notes = {name: about.get("note", "") for name, about in learned_from(context, [keys.index("a")]).items()}
    assert "background.json counts words" in notes[f"tokens@{LANE}"]
    assert "made from these users' adapters" in notes["predictions/merged"]


def test_the_folders_to_remove_are_those_that_are_there(tmp_path):
    context = run_of(tmp_path)
    told = how_to_remove(context.folder)
    folders = told.partition("remove the folders ")[2].partition(" from the run")[0].split(", ")
    stems = ["group", "plora", "population", "pplug", "predictions", "prior", "router", "start", "store", "tokens"]
    assert folders == sorted([*stems, f"population@{LANE}", f"tokens@{LANE}"])


def test_profiles_of_the_callers_are_named_where_the_users_stand_in_them(tmp_path):
    file = tmp_path / "profiles.json"
    file.write_text(json.dumps({"a": "likes films", "b": "likes books", "c": "likes both"}))
    recipes = {"mine": {"like": "PAG", "prompt": {"profile": "file", "profile_file": str(file)}}}
    config = run_of(tmp_path, ["population", "mine"], recipes=recipes).config
    assert f"{file}: profiles of 2 users" in still_in_sources(config, {"a", "c"})
    assert not [line for line in still_in_sources(config, {"d"}) if str(file) in line]
