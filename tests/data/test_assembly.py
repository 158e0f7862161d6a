"""LaMP's and OPPU's prompts, sentence by sentence, and what happens where room is short."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.assembly import Assembler, Pieces, first_words, share_out
from proper_ds.data.forms import FORMS
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.records import HistoryItem
from proper_ds.data.tasks import TASKS


class Words:
    """A tokenizer whose tokens are words with the space before them, or one character that is neither."""

    eos_token_id = 0

    def __init__(self):
        self.known = ["</s>"]

    def __call__(self, text, add_special_tokens=True):
        ids = []
        for piece in re.findall(r"\s?\w+|[^\w]", text):
            if piece not in self.known:
                self.known.append(piece)
            ids.append(self.known.index(piece))
        return {"input_ids": ids}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.known[n] for n in ids)


@pytest.fixture
def encoder():
    return PromptEncoder(Words(), "\nA:", 10_000)


def item(text, answer):
    return HistoryItem("", "t", 0, text, answer)


def put(encoder, assembly, question, items, form, room=500, profile="", instruction="", max_words=99):
    """The assembled prompt."""
    return assembled(encoder, assembly, question, items, form, room, profile, instruction, max_words).text


def assembled(encoder, assembly, question, items, form, room, profile="", instruction="", max_words=99):
    """The assembled prompt, and how many items it shows."""
    pieces = Pieces(question, instruction, FORMS[form], profile, items, max_words)
    return Assembler(encoder, assembly).assembled(pieces, room)


TWO = [item("one text", "A"), item("two text", "B")]
LAMP = {
    "LaMP_2M": 'the tag for the movie: "one text" is "A" , and the tag for the movie: "two text" is "B" . Q',
    "LaMP_2N": (
        'the category for the article: "one text" is "A" , and the category for the article: "two text" is "B" . Q'
    ),
    "LaMP_3": 'A is the score for "one text" , and B is the score for "two text" . Q',
    "LaMP_4": '"A" is the title for "one text" , and "B" is the title for "two text" . Q',
    "LaMP_5": '"A" is a title for "one text" , and "B" is a title for "two text" . Following the given patterns Q',
    "LaMP_6": '"A" is the title for "one text" , and "B" is the title for "two text" . Q',
    "LaMP_7": '"A" , and "B"  are written by a person. Following the given patterns Q',
    "generic": 'the answer for: "one text" is "A" , and the answer for: "two text" is "B" . Q',
}
OPPU = {
    "LaMP_1": "paper title: one text\npaper title: two text\n\nQ",
    "LaMP_2M": "description: one text tag: A\ndescription: two text tag: B\n\nQ",
    "LaMP_2N": "article: one text category: A\narticle: two text category: B\n\nQ",
    "LaMP_3": "review: one text score: A\nreview: two text score: B\n\nQ",
    "LaMP_4": "article: one text headline: A\narticle: two text headline: B\n\nQ",
    "LaMP_5": "abstract: one text title: A\nabstract: two text title: B\n\nQ",
    "LaMP_7": "tweet: A\ntweet: B\n\nQ",
}


@pytest.mark.parametrize("form", LAMP)
def test_lamp_has_these_sentences(encoder, form):
    assert put(encoder, "lamp", "Q", TWO, form) == LAMP[form]


@pytest.mark.parametrize("form", OPPU)
def test_oppu_has_these_lines(encoder, form):
    assert put(encoder, "oppu", "Q", TWO, form) == OPPU[form]


def test_lamp_1_names_the_titles_in_the_question(encoder):
    question = 'For an author who has written the paper with the title "X", which? [1]: "a title" [2]: "b"'
    wanted = (
        'For an author who has written the paper with the title, and "one text", and "two text" "X", which?'
        ' [1]: "a title" [2]: "b"'
    )
    assert put(encoder, "lamp", question, TWO, "LaMP_1") == wanted
    untitled = put(encoder, "lamp", "which?", TWO, "LaMP_1")
    assert untitled == '"one text", and "two text". which?'
    long = [item("word " * 200, "A")] * 2
    found = put(encoder, "lamp", question, long, "LaMP_1", 80)
    assert found.endswith('"X", which? [1]: "a title" [2]: "b"'), "the candidates stand at the question's end"
    assert encoder.count(found) <= 80


def test_every_task_has_a_form():
    assert set(FORMS) == set(TASKS)
    assert all(task.form == name for name, task in TASKS.items())


def test_a_profile_comes_first(encoder):
    for assembly, wanted in (("lamp", f"P\n{LAMP['LaMP_3']}"), ("oppu", f"P\n{OPPU['LaMP_3']}")):
        assert put(encoder, assembly, "Q", TWO, "LaMP_3", profile="P") == wanted
        assert put(encoder, assembly, "Q", (), "LaMP_3", profile="P") == "P\nQ"


def test_shares_are_equal_and_what_is_left_goes_to_the_next():
    assert share_out([2, 2, 2], [3, 50, 50], 30) == [3, 13, 8]
    assert share_out([2, 2, 2], [50, 50, 50], 30) == [8, 8, 8]
    assert share_out([10, 2], [5, 5], 20) is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6), st.integers(0, 150))
def test_shares_are_those_of_lamps_loop(pieces, room):
    needed, lengths = [n for n, _ in pieces], [length for _, length in pieces]
    per_p_max_length, saved_tokens, wanted = room // len(pieces), 0, []
    for needed_part_len, length in pieces:
        max_length = per_p_max_length + saved_tokens - needed_part_len
        if max_length < 1:
            wanted = None
            break
        wanted.append(min(length, max_length))
        saved_tokens += per_p_max_length - wanted[-1] - needed_part_len
    assert share_out(needed, lengths, room) == wanted
    if wanted is not None:
        assert sum(needed) + sum(wanted) <= room


@pytest.mark.parametrize("assembly", ["lamp", "oppu"])
@given(
    st.lists(st.integers(1, 60), max_size=5),
    st.integers(0, 30),
    st.integers(1, 80),
    st.integers(20, 200),
    st.booleans(),
)
def test_what_is_put_before_never_costs_the_question_more_than_the_rule_says(
    assembly, lengths, num_fixed, num_own, room, with_profile
):
    encoder = PromptEncoder(Words(), "\nA:", 10_000)
    fixed = "".join(f" f{n}" for n in range(num_fixed))
    question = fixed + "".join(f" q{n}" for n in range(num_own))
    items = [item(" ".join(f"h{n}" for n in range(length)), "5") for length in lengths]
    profile = " ".join(f"p{n}" for n in range(20)) if with_profile else ""
    found = put(encoder, assembly, question, items, "LaMP_3", room, profile, fixed)
    assert found.endswith(question), "text is put before it, and nothing else happens to it"
    if found == question:
        return
    kept = room - (encoder.count(found) - encoder.count(question))
    assert kept >= num_fixed, "the instruction stays whole"
    if assembly == "oppu" or not items:
        assert kept >= num_fixed + min(num_own, int(0.6 * (room - num_fixed)))


def test_lamp_gives_the_question_less_until_the_items_fit_and_gives_up_then(encoder):
    question = " q" * 60
    long_titles = [item("text", " ".join(f"t{n}" for n in range(25)))] * 2
    form = FORMS["LaMP_4"]
    needed = 2 * encoder.count(form.sentence(long_titles[0], "")) + encoder.count(", and ") + encoder.count(". ")
    found = put(encoder, "lamp", question, long_titles, "LaMP_4", 100)
    assert needed > 40, "0.6 of the room for the question leaves too little"
    assert found.count("is the title for") == 2
    one = assembled(encoder, "lamp", question, long_titles, "LaMP_4", needed - 1)
    assert one.num_items == one.text.count("is the title for") == 1, "the better one stays"
    assert assembled(encoder, "lamp", question, long_titles[:1], "LaMP_4", needed - 1) == one
    too_short = needed // 2 - 3
    assert assembled(encoder, "lamp", question, long_titles, "LaMP_4", too_short) == (question, 0)
    assert assembled(encoder, "lamp", question, long_titles, "LaMP_4", too_short, "P") == (f"P\n{question}", 0)


def test_oppu_shows_whole_lines_while_they_fit_and_cuts_the_best_alone(encoder):
    items = [item("a b c", "1"), item("d " * 50, "2"), item("e f", "3")]
    found = put(encoder, "oppu", "Q", items, "LaMP_3", 30)
    assert found == "review: a b c score: 1\n\nQ", "the order of fit is kept: nothing worse takes the place"
    alone = put(encoder, "oppu", "Q", items[1:2], "LaMP_3", 20)
    assert re.fullmatch(r"review: d( d)+ score: 2\n\nQ", alone)
    assert 18 <= encoder.count(alone) <= 20


def test_oppu_cuts_fields_by_words(encoder):
    found = put(encoder, "oppu", "Q", [item("one two three", "4")], "LaMP_3", max_words=2)
    assert found == "review: one two score: 4\n\nQ"
    assert first_words(" as  it is ", 3) == " as  it is "
