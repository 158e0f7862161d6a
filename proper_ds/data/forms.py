"""How a history item is written down in a prompt, task by task: LaMP's sentences and OPPU's lines.

Facts from LaMP (github LaMP-Benchmark/LaMP at de78cdb: LaMP/prompts/prompts.py) and OPPU (github TamSiuhin/OPPU at
d2128d7: prompt/prompt.json). `assembly.py` fills them in; `profile_text.py` uses their words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proper_ds.data.records import HistoryItem


@dataclass(frozen=True)
class Form:
    """How items of one task are written down.

    Attributes:
        lamp: LaMP's sentence, with `{text}` and `{answer}`.
        oppu: OPPU's line, likewise.
        what: the plural of what people answer, for profiles.
        request: what a model that writes profiles is asked, given a list of items.
        closing: what LaMP puts between the last sentence and the question.
        cut: the field that is cut where room is short; the other one stays whole.
        into_title: LaMP-1 only: the items follow the word "title" in the question, whose candidates stand at its end.
    """

    lamp: str
    oppu: str
    what: str
    request: str
    closing: str = ". "
    cut: Literal["text", "answer"] = "text"
    into_title: bool = False

    def sentence(self, item: HistoryItem, cut_to: str | None = None) -> str:
        """LaMP's sentence of an item."""
        return self._filled(self.lamp, item, cut_to)

    def line(self, item: HistoryItem, cut_to: str | None = None) -> str:
        """OPPU's line of an item, without a line end."""
        return self._filled(self.oppu, item, cut_to)

    def cut_field(self, item: HistoryItem) -> str:
        """The field of an item that may be cut."""
        return item.text if self.cut == "text" else item.answer

    def _filled(self, template: str, item: HistoryItem, cut_to: str | None) -> str:
        values = {"text": item.text, "answer": item.answer}
        if cut_to is not None:
            values[self.cut] = cut_to
        return template.format(**values)


_PATTERNS = "Following the given patterns "
_HABITS = "Say in one or two sentences what this person mostly answers, and for which kinds of text."
_TITLES = (
    "Describe in a few sentences how this person words {what}: length, tone, punctuation, favourite patterns and"
    " topics. Be specific, so that the next one could be guessed from its text."
)

FORMS = {
    "LaMP_1": Form(
        '"{text}"',
        "paper title: {text}",
        "papers",
        "Summarise in a few sentences the research interests of the author of these papers.",
        closing=", and ",
        into_title=True,
    ),
    "LaMP_2M": Form(
        'the tag for the movie: "{text}" is "{answer}" ', "description: {text} tag: {answer}", "tags", _HABITS
    ),
    "LaMP_2N": Form(
        'the category for the article: "{text}" is "{answer}" ',
        "article: {text} category: {answer}",
        "categories",
        _HABITS,
    ),
    "LaMP_3": Form(
        '{answer} is the score for "{text}" ',
        "review: {text} score: {answer}",
        "scores",
        "Say in one or two sentences which scores this person usually gives, and what earns high and low ones.",
    ),
    "LaMP_4": Form(
        '"{answer}" is the title for "{text}" ',
        "article: {text} headline: {answer}",
        "headlines",
        _TITLES.format(what="headlines"),
    ),
    "LaMP_5": Form(
        '"{answer}" is a title for "{text}" ',
        "abstract: {text} title: {answer}",
        "titles",
        _TITLES.format(what="titles of papers"),
        closing=f". {_PATTERNS}",
    ),
    "LaMP_6": Form(
        '"{answer}" is the title for "{text}" ',
        "email: {text} subject: {answer}",
        "subjects",
        _TITLES.format(what="subjects of e-mails"),
    ),
    "LaMP_7": Form(
        '"{answer}" ',
        "tweet: {answer}",
        "texts",
        _TITLES.format(what="short texts"),
        closing=f" are written by a person. {_PATTERNS}",
        cut="answer",
    ),
    **{
        f"LongLaMP_{kind}": Form(
            f'the {kind} for: "{{text}}" is "{{answer}}" ',
            f"input: {{text}} {kind}: {{answer}}",
            what,
            _TITLES.format(what=what),
            cut="answer",
        )
        for kind, what in (("abstract", "abstracts of papers"), ("topic", "posts"), ("review", "reviews"))
    },
    "generic": Form(
        'the answer for: "{text}" is "{answer}" ',
        "input: {text} output: {answer}",
        "answers",
        "Describe in a few sentences how this person answers, so that the next answer could be guessed.",
    ),
}
"""By `TaskManifest.form`. LaMP-6 of OPPU, and both of `generic` and LongLaMP, are ours: neither work has them."""
