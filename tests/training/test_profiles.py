"""Profiles by a model: a request sees one user's items, fits the model, and a unit's texts are found again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proper_ds.config import validate
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.profiles import Profiles, unit_path
from proper_ds.data.recipe import PromptRecipe
from proper_ds.errors import AdapterError
from proper_ds.model.config import CreateBase
from proper_ds.training.create_base import train_tokenizer
from proper_ds.training.profiles import ProfilesJob, ProfileWriter, drawn_items, request
from tests.fakes import write_json

CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}|reply|{% endif %}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["This person gives 5 to drama. review: score:"] * 9, CreateBase(vocab_size=300))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def config(tmp_path):
    def question(n):
        profile = [{"id": f"h{n}{k}", "text": f"film{n}x{k}", "score": str(1 + k % 5)} for k in range(3 * n)]
        return {"id": f"q{n}", "user_id": f"u{n}", "input": f"review: new{n}", "profile": profile}

    write_json(tmp_path / "in" / "train_questions.json", [question(n) for n in range(4)])
    golds = [{"id": f"q{n}", "output": "3"} for n in range(4)]
    write_json(tmp_path / "in" / "train_outputs.json", {"task": "LaMP_3", "golds": golds})
    prepare(DataConfig(path=str(tmp_path / "in")), tmp_path / "prepared")
    raw = {
        "output_dir": str(tmp_path / "run"),
        "data": {"prepared": str(tmp_path / "prepared")},
        "base": {"create": {}},
        "evaluation": {"methods": ["base"], "split": "dev"},
    }
    return validate(raw, "test")


@dataclass
class OneUnit:
    first: int
    stop: int
    part: str
    name: str


def test_a_request_holds_drawn_items_of_one_user_in_order(config):
    prepared = PreparedData(config.output_path.parent / "prepared")
    users, task = list(prepared.users()), prepared.manifest.tasks["LaMP_3"]
    largest = max(users, key=lambda user: len(user.history))
    drawn = drawn_items(largest, task, 4, seed=1)
    assert drawn == drawn_items(largest, task, 4, seed=1)
    assert drawn != drawn_items(largest, task, 4, seed=2)
    places = [largest.history.index(item) for item in drawn]
    assert places == sorted(set(places))
    assert len(places) == 4
    assert drawn_items(largest, task, 99, seed=1) == largest.history
    asked = request(task, drawn)
    assert [f"- review: {item.text} score: {item.answer}" for item in drawn] == asked.splitlines()[2:]
    long = [replace(drawn[0], text="word " * 300)]
    assert request(task, long).count("word") == 200


def test_a_unit_is_written_for_users_with_history_and_read_again(config, model_folder):
    recipe = PromptRecipe(profile="model", profile_model=str(model_folder), profile_max_new_tokens=6)
    job = ProfilesJob(config, torch.device("cpu"), {recipe.lane: recipe.model_dump()})
    unit = OneUnit(0, 4, f"profiles@{recipe.lane}", "unit-a")
    report = job.run(unit)
    folder = config.output_path / f"profiles@{recipe.lane}" / "units"
    assert (report["num_texts"], report["num_users"]) == (3, 4)
    prepared = PreparedData(config.output_path.parent / "prepared")
    found = Profiles.from_units(folder, prepared.keys())
    found.check(recipe, prepared.users())
    texts = {user.key: found.of(user.key, "LaMP_3") for user in prepared.users()}
    assert sorted(key for key, text in texts.items() if text is None) == ["u0"], "a cold user has no profile"
    before = unit_path(folder, unit.name).read_bytes()
    job.run(unit)
    assert unit_path(folder, unit.name).read_bytes() == before, "greedy"
    writer = ProfileWriter(recipe, torch.float32, torch.device("cpu"))
    for user in prepared.users():
        if user.history:
            prompt = writer.ids(
                prepared.manifest.tasks["LaMP_3"], drawn_items(user, prepared.manifest.tasks["LaMP_3"], 10, 41)
            )
            assert writer.write([prompt], 10_000) == [texts[user.key]], "alone as among others"


def test_a_request_takes_the_chat_form_and_fits_the_model(config, model_folder):
    prepared = PreparedData(config.output_path.parent / "prepared")
    task = prepared.manifest.tasks["LaMP_3"]
    items = max((user.history for user in prepared.users()), key=len)
    recipe = PromptRecipe(profile="model", profile_model=str(model_folder), profile_max_new_tokens=50)
    writer = ProfileWriter(recipe, torch.float32, torch.device("cpu"))
    plain = writer._tokenizer.decode(writer.ids(task, items[:1]))
    assert plain.endswith(f"score: {items[0].answer}\n\nAnswer:")
    writer._tokenizer.chat_template = CHAT
    chat = writer._tokenizer.decode(writer.ids(task, items[:1]))
    assert chat.endswith(f"score: {items[0].answer}|reply|")
    assert chat.startswith("<s>Say in one or two sentences")
    assert chat.count("<s>") == 1
    long = [replace(item, text="drama " * 150) for item in items]
    assert len(writer.ids(task, long)) <= 350
    tight = ProfileWriter(recipe.model_copy(update={"profile_max_new_tokens": 390}), torch.float32, torch.device("cpu"))
    with pytest.raises(AdapterError, match="too few for one item"):
        tight.ids(task, items)


def test_a_model_that_is_not_there_is_named(tmp_path):
    recipe = PromptRecipe(profile="model", profile_model=str(tmp_path / "nothing"))
    with pytest.raises(AdapterError, match=r"profile_model .*nothing.*Give a folder"):
        ProfileWriter(recipe, torch.float32, torch.device("cpu"))


def test_files_of_recipes_are_found_from_any_folder(config, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "texts.json", {})
    raw = config.model_dump()
    raw["evaluation"] |= {"methods": ["mine", "other", "hub"]}
    raw["recipes"] = {
        "mine": {"like": "PAG", "prompt": {"profile": "file", "profile_file": "texts.json"}},
        "other": {"like": "PAG", "prompt": {"profile": "model", "profile_model": "model"}},
        "hub": {"like": "PAG", "prompt": {"profile": "model", "profile_model": "someone/instruct"}},
    }
    monkeypatch.chdir(tmp_path)
    recipes = validate(raw, "test").recipes
    assert recipes["mine"].prompt["profile_file"] == str(tmp_path / "texts.json")
    assert recipes["other"].prompt["profile_model"] == str(tmp_path / "model")
    assert recipes["hub"].prompt["profile_model"] == "someone/instruct"
