"""Prompts by recipe know what they may and nothing else; the plain recipe changes no token."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.data.background import Background
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.profiles import Profiles, unit_path, write_unit
from proper_ds.data.prompt_maker import PromptMaker, maker_for
from proper_ds.data.prompts import PromptEncoder, history_prompt
from proper_ds.data.recipe import PromptRecipe, recipe_problems
from proper_ds.data.records import HistoryItem, Query, User
from proper_ds.data.tasks import TASKS
from proper_ds.data.tokens import HISTORY, TokenData, tokenize
from proper_ds.errors import DataError
from proper_ds.model.config import CreateBase
from proper_ds.training.create_base import train_tokenizer
from tests.fakes import write_json

SUFFIX = "\n### Output:"
SPECS = (
    {"retriever": "bm25"},
    {"retriever": "bm25", "assembly": "oppu", "num_retrieved": 2},
    {"retriever": "recency"},
    {"retriever": "random", "num_retrieved": 3},
    {"profile": "built-in"},
    {"retriever": "bm25", "profile": "built-in"},
)
NAMES = ("LaMP_1", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_7", "generic")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        f"What is the score of the review? review: h{n} x{n} good film is the score for, and{SUFFIX} {n}"
        for n in range(20)
    ]
    return train_tokenizer(texts, CreateBase(vocab_size=400))


def encoder_of(tokenizer, max_length=1000):
    return PromptEncoder(tokenizer, SUFFIX, max_length)


def manifest_of(name):
    return TaskManifest.of(TASKS[name], TASKS[name].instruction, False)


def user_of(name, number, count, key="u"):
    """A user whose items and questions have words of their own, and others that they share."""
    task = TASKS[name]
    history, queries = [], []
    for n in range(count + 1):
        answer = task.labels[n % len(task.labels)] if task.labels and name != "LaMP_1" else f"answer{key}{number}x{n}"
        text = f"text{key}{number}x{n} film w{n % 3}"
        history.append(
            HistoryItem(
                str(n), name, len(task.pairs) - 1, text, answer, "", f"more{key}{number}x{n} w{(n + 1) % 3} {text}"
            )
        )
    queries = [
        Query(f"q{n}", "train", name, f"{task.instruction}ask{key}{number}x{n} film w{n}", f"gold{key}{number}x{n}")
        for n in range(2)
    ]
    return User(f"{key}{number}", history[:-1], queries), history[-1]


def maker_of(spec, name, tokenizer, others=(), max_length=1000):
    recipe = PromptRecipe(**spec)
    background = Background.count(others, "train") if recipe.needs_background else None
    return PromptMaker(recipe, {name: manifest_of(name)}, encoder_of(tokenizer, max_length), background, None, 7)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: PromptRecipe(**spec).lane)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(count=st.integers(1, 7), order=st.randoms())
def test_a_prompt_knows_nothing_of_its_answer_what_follows_or_anybody_else(tokenizer, spec, name, count, order):
    user, _ = user_of(name, 1, count)
    other, _ = user_of(name, 2, count, key="other")
    maker = maker_of(spec, name, tokenizer, [user, other])
    calls = [("history", n) for n in range(count)] + [("query", n) for n in range(2)]
    order.shuffle(calls)
    for kind, position in calls:
        maker.history(other, 0, 5)  # somebody else in between
        found = getattr(maker, kind)(user, position, 5)
        assert "other2" not in found, "nobody else's words"
        assert "gold" not in found
        later = range(position if kind == "history" else count, count)
        for n in later:
            assert f"answeru1x{n}" not in found
            assert f"moreu1x{n}" not in found
            assert n == position or f"textu1x{n}" not in found
        shorter = replace_history(user, position) if kind == "history" else replace_golds(user)
        assert getattr(maker_of(spec, name, tokenizer, [user, other]), kind)(shorter, position, 5) == found, (
            "the same prompt whatever the answer is and whatever comes later"
        )


def replace_history(user, position):
    """The user with another answer to one item and nothing after it."""
    changed = replace(user.history[position], answer="5", retrieval="changed")
    return User(user.key, [*user.history[:position], changed], [])


def replace_golds(user):
    return User(user.key, user.history, [replace(query, answer="other gold") for query in user.queries])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: PromptRecipe(**spec).lane)
def test_a_recipe_shows_what_it_promises(tokenizer, spec):
    user, _ = user_of("LaMP_3", 1, 6)
    found = maker_of(spec, "LaMP_3", tokenizer, [user]).query(user, 0, 5)
    recipe = PromptRecipe(**spec)
    assert found.endswith(user.queries[0].input)
    shown = [n for n in range(6) if f"textu1x{n}" in found]
    assert len(shown) == (recipe.num_retrieved if recipe.retriever else 0)
    assert found.startswith("About this person: ") == (recipe.profile == "built-in")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: PromptRecipe(**spec).lane)
@given(max_length=st.integers(110, 400))
@settings(max_examples=15)
def test_the_instruction_and_the_answer_stay_whole_however_short_the_base_is(tokenizer, spec, max_length):
    user, _ = user_of("LaMP_3", 1, 6)
    encoder = encoder_of(tokenizer, max_length)
    maker = maker_of(spec, "LaMP_3", tokenizer, [user], max_length)
    for position, item in enumerate(user.history):
        answer = encoder.answer_ids(item.answer)
        found = encoder.encode(maker.history(user, position, len(answer)), item.answer)
        assert found.ids[found.num_prompt :] == answer
        text = tokenizer.decode(found.ids[: found.num_prompt])
        assert text.endswith(SUFFIX)
        assert TASKS["LaMP_3"].instruction.strip() in text
        plain = encoder.encode(history_prompt(manifest_of("LaMP_3"), item), item.answer)
        assert (found.num_cut > 0) >= (plain.num_cut > 0)


def test_prompts_without_room_are_counted(tokenizer):
    user, _ = user_of("LaMP_4", 1, 6)
    user.history[:] = [replace(item, answer="long title " * 40) for item in user.history]
    maker = maker_of({"retriever": "bm25"}, "LaMP_4", tokenizer, max_length=150)
    assert maker.query(user, 0, 5) == user.queries[0].input
    assert maker.history(user, 0, 5) == history_prompt(manifest_of("LaMP_4"), user.history[0])
    assert maker.shortage == "", "the first item has nothing before it, which is no lack of room"
    maker.query(user, 0, 5)
    assert maker.shortage == "bare"
    user.history[:] = [replace(item, answer="long title " * 2) for item in user.history]
    maker = maker_of({"retriever": "bm25"}, "LaMP_4", tokenizer, max_length=150)
    found = maker.query(user, 0, 5)
    assert 0 < found.count("is the title for") < 4
    assert maker.shortage == "fewer_items"


def test_items_without_room_beside_a_profile_are_counted(tokenizer):
    user, _ = user_of("LaMP_4", 1, 6)
    user.history[:] = [replace(item, answer="long title " * 40) for item in user.history]
    maker = maker_of({"retriever": "bm25", "profile": "built-in"}, "LaMP_4", tokenizer, [user], max_length=200)
    found = maker.query(user, 0, 5)
    assert found.startswith("About this person: ")
    assert "is the title for" not in found
    assert maker.shortage == "no_items"


def test_plain_prompts_are_the_items_and_questions_as_they_stand(prepared, tokenizer, tmp_path):
    encoder = encoder_of(tokenizer, 128)
    maker = maker_for(PromptRecipe(), prepared, encoder, tmp_path / "plain", tmp_path, "train", 1)
    tokenize(prepared, encoder, tmp_path / "plain", "train", None, maker=maker)
    tokenize(prepared, encoder, tmp_path / "default", "train", None)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "default" / file.name).read_bytes()
    data = TokenData(tmp_path / "plain")
    task = prepared.manifest.tasks["LaMP_3"]
    longest = max(len(ids) for ids in data.labels("LaMP_3"))
    for index, user in enumerate(prepared.users()):
        for e in data.examples_of(*data.range_of(index)):
            if e.kind == HISTORY:
                item = user.history[e.position]
                assert e.ids.tolist() == encoder.encode(history_prompt(task, item), item.answer).ids
            else:
                query = user.queries[e.position]
                known = query.split == "train"
                wanted = encoder.encode(query.input, query.answer) if known else encoder.question(query.input, longest)
                assert e.ids.tolist() == wanted.ids


def test_the_lanes_tokens_hold_the_background_of_training_users_alone(prepared, tokenizer, tmp_path):
    encoder, recipe = encoder_of(tokenizer, 256), PromptRecipe(profile="built-in", retriever="bm25")
    maker = maker_for(recipe, prepared, encoder, tmp_path / "tokens", tmp_path, "train", 1)
    tokenize(prepared, encoder, tmp_path / "tokens", "train", None, maker=maker)
    background = Background.read(tmp_path / "tokens")
    assert background.of("LaMP_3").num_items_with == {"film": 1 + 2 + 3}, "six items of u1 to u3, none of u4"
    assert background.of("LaMP_3").total == 6
    prompts = TokenData(tmp_path / "tokens").marker["prompts"]
    assert {part: counted["num_prompts"] for part, counted in prompts.items()} == {
        "history items": 10,
        "train": 3,
        "dev": 2,
    }
    for counted in prompts.values():
        assert counted["num_bare"] == counted["num_no_items"] == counted["num_cut"] == 0


def test_what_a_short_base_leaves_out_of_questions_is_counted_by_split(prepared, tokenizer, tmp_path):
    encoder, recipe = encoder_of(tokenizer, 24), PromptRecipe(retriever="bm25")
    maker = maker_for(recipe, prepared, encoder, tmp_path / "tokens", tmp_path, "train", 1)
    tokenize(prepared, encoder, tmp_path / "tokens", "train", None, maker=maker)
    plain = PromptMaker(PromptRecipe(), prepared.manifest.tasks, encoder)
    wanted = {"train": [0, 0, 0], "dev": [0, 0, 0]}
    users = list(prepared.users())
    for user in users:
        for n, query in enumerate(user.queries):
            room = max(len(encoder.answer_ids(label)) for label in prepared.manifest.tasks["LaMP_3"].labels)
            made = maker.query(user, n, room)
            cut = encoder.question(made, room).num_cut
            bare = bool(user.history) and made == plain.query(user, n, room)
            wanted[query.split] = [a + b for a, b in zip(wanted[query.split], (cut > 0, cut, bare), strict=True)]
    prompts = TokenData(tmp_path / "tokens").marker["prompts"]
    found = {s: [prompts[s][name] for name in ("num_cut", "num_tokens_cut", "num_bare")] for s in wanted}
    assert found == wanted
    assert any(sum(numbers) for numbers in wanted.values()), "the base is short enough to show it"

    with pytest.raises(DataError, match="no built-in profiles"):
        Background.read(tmp_path)


def test_profiles_are_read_from_a_file_and_missing_users_are_counted(prepared, tokenizer, tmp_path):
    encoder, path = encoder_of(tokenizer, 256), tmp_path / "profiles.json"
    write_json(path, {f"u{n}": f"likes  {n}" for n in (1, 2, 3, 4)})
    users = {user.key: user for user in prepared.users()}

    def maker(**more):
        recipe = PromptRecipe(profile="file", profile_file=str(path), **more)
        return maker_for(recipe, prepared, encoder, tmp_path / "tokens", tmp_path, "train", 1)

    assert maker().query(users["u4"], 0, 5) == "likes 4\nscale 1 to 5? review: new 4"
    assert maker().history(users["u2"], 0, 5).startswith("likes 2\n")
    assert maker().query(users["u0"], 0, 5) == "scale 1 to 5? review: new 0", "nothing is known of a cold user"
    write_json(path, {"u1": "likes 1"})
    with pytest.raises(DataError, match=r"3 of 4 users with history have no profile.*'u2'"):
        maker()
    assert maker(profile_missing="empty").query(users["u4"], 0, 5) == "scale 1 to 5? review: new 4"
    counted = maker(profile_missing="built-in")
    assert counted.query(users["u4"], 0, 5).startswith("About this person: median of scores")
    assert counted.query(users["u1"], 0, 5).startswith("likes 1\n")


def test_profile_files_are_checked(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"user": "a", "profile": "x"}\n\n{"user": "b", "profile": "y"}\n')
    assert Profiles.from_file(rows).of("b", "any") == "y"
    for text, why in (
        ('{"user": "a"}\n', 'row 1 is no {"user"'),
        ('{"user": "a", "profile": 3}\n', "not a text"),
        ('{"user": "a", "profile": "x"}\n{"user": "a", "profile": "y"}\n', "two profiles"),
    ):
        rows.write_text(text)
        with pytest.raises(DataError, match=why):
            Profiles.from_file(rows)
    path = write_json(tmp_path / "list.json", [{"output": "x"}])
    with pytest.raises(DataError, match="a list says nothing of whose text is which"):
        Profiles.from_file(path)
    path.write_text('{"a": "x", "a": "y"}')
    with pytest.raises(DataError, match="two profiles"):
        Profiles.from_file(path)


def test_what_a_model_wrote_is_found_by_user_and_task(prepared, tokenizer, tmp_path):
    keys = prepared.keys()
    rows = [{"user": n, "task": "LaMP_3", "text": f"wrote of {key}"} for n, key in enumerate(keys)]
    write_unit(tmp_path, "unit-0", rows[:2])
    write_unit(tmp_path, "unit-1", rows[2:])
    recipe, encoder = PromptRecipe(profile="model", profile_model="m"), encoder_of(tokenizer, 256)
    maker = maker_for(recipe, prepared, encoder, tmp_path / "tokens", tmp_path, "train", 1)
    for user in prepared.users():
        if user.history:
            assert maker.query(user, 0, 5).startswith(f"wrote of {user.key}\n")
    unit_path(tmp_path, "unit-0").unlink()
    with pytest.raises(DataError, match="the profiles stage was not done"):
        maker_for(recipe, prepared, encoder, tmp_path / "tokens", tmp_path, "train", 1)


def test_lanes_tell_recipes_apart():
    model = {"profile": "model", "profile_model": "m"}
    recipes = [
        {}, *SPECS, {"retriever": "bm25", "num_retrieved": 5}, model, model | {"profile_num_items": 3},
        model | {"retriever": "bm25"}, {"profile": "file", "profile_file": "a"},
        {"profile": "file", "profile_file": "b"},
    ]  # fmt: skip
    lanes = [PromptRecipe(**spec).lane for spec in recipes]
    assert len(set(lanes)) == len(lanes)
    assert lanes[:2] == ["", "bm25-4-lamp"]
    assert PromptRecipe(retriever="bm25", profile="built-in").lane == "bm25-4-lamp+built-in"


def test_a_stage_depends_on_the_recipe_and_on_the_text_of_the_file(tmp_path):
    path = write_json(tmp_path / "p.json", {"a": "x"})
    recipe = PromptRecipe(profile="file", profile_file=str(path))
    before = recipe.settings(1)
    assert before == PromptRecipe(profile="file", profile_file=str(path)).settings(2), "nothing is drawn"
    assert json.loads(json.dumps(before)) == before
    write_json(path, {"a": "y"})
    assert recipe.settings(1) != before
    assert PromptRecipe().settings(1) == {}, "earlier runs keep their fingerprints"
    drawn = PromptRecipe(retriever="random")
    assert drawn.settings(1) != drawn.settings(2)


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        ({}, []),
        ({"retriever": "bm25", "num_retrieved": 2, "assembly": "oppu"}, []),
        ({"num_retrieved": 2}, ["num_retrieved"]),
        ({"assembly": "oppu", "profile": "built-in"}, ["assembly"]),
        ({"profile": "file"}, ["profile_file"]),
        ({"profile": "file", "profile_file": "/nowhere"}, ["profile_file"]),
        ({"profile_file": "x", "profile_missing": "empty"}, ["profile_file", "profile_missing"]),
        ({"profile": "model"}, ["profile_model"]),
        ({"profile": "built-in", "profile_num_items": 3}, ["profile_num_items"]),
        ({"profile_model": "m", "profile_max_new_tokens": 9}, ["profile_model", "profile_max_new_tokens"]),
    ],
)
def test_options_without_effect_are_problems(spec, keys):
    found = recipe_problems(PromptRecipe(**spec), "recipes.mine")
    assert [problem.key for problem in found] == [f"recipes.mine.{key}" for key in keys]


def test_data_of_earlier_versions_is_prepared_again(tokenizer):
    old = replace(manifest_of("LaMP_3"), form="")
    PromptMaker(PromptRecipe(), {"LaMP_3": old}, encoder_of(tokenizer))
    with pytest.raises(DataError, match="prepare the data again"):
        PromptMaker(PromptRecipe(retriever="bm25"), {"LaMP_3": old}, encoder_of(tokenizer))


def test_items_of_another_task_are_not_shown(tokenizer):
    one, _ = user_of("LaMP_3", 1, 3)
    two, _ = user_of("LaMP_4", 2, 3)
    both = User("u", [*one.history, *two.history], [*one.queries, *two.queries])
    tasks = {name: manifest_of(name) for name in ("LaMP_3", "LaMP_4")}
    maker = PromptMaker(PromptRecipe(retriever="recency", num_retrieved=9), tasks, encoder_of(tokenizer))
    found = maker.query(both, 2, 5)
    assert "textu2x2" in found
    assert "textu1" not in found
    assert "u1" not in maker.history(both, 4, 5)
