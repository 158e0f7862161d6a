"""Puts a profile text and retrieved items before a question, within what the base's length leaves.

Two ways: LaMP's (equal shares of tokens, what one item leaves goes to the next, a smaller share for the question where
the items do not fit, the bare question where they never do) and OPPU's (`profile`, items, question, in lines).
`prompt_maker.py` calls `put_before`; in numbers, `room` and `budget` are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proper_ds.data.forms import Form
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.records import HistoryItem

TRAIN_WORDS, TEST_WORDS = 768, 368
"""OPPU's cuts: words of a field in training on history items, and for questions."""
_JOIN = ", and "
_FACTORS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


@dataclass(frozen=True)
class Asked:
    """What a prompt asks, before anything is put before it.

    Attributes:
        text: instruction and own text of a history item or question.
        instruction: its beginning that is never cut.
    """

    text: str
    instruction: str


@dataclass(frozen=True)
class Assembler:
    """Writes prompts for one tokenizer and length."""

    encoder: PromptEncoder
    assembly: str

    def put_before(
        self, asked: Asked, profile: str, items: Sequence[HistoryItem], form: Form, max_words: int, room: int
    ) -> str:
        """The prompt's text; the bare question where no room is left.

        Args:
            profile: text about the user, or "".
            items: retrieved, the most fitting first.
            max_words: words of an item's field that OPPU's lines show.
            room: tokens for the whole prompt.
        """
        for budget in self._budgets(asked, items, form, room):
            found = self._fitted(asked, profile, items, form, max_words, budget)
            if found is not None:
                return found
        if items and profile:
            return self.put_before(asked, profile, (), form, max_words, room)
        return asked.text

    def _budgets(self, asked: Asked, items: Sequence[HistoryItem], form: Form, room: int) -> Iterator[int]:
        """Tokens for what stands before: LaMP's `max_length - min(len(question), factor * max_length)`.

        Both lengths are without the instruction, so that the question alone is ever cut.
        """
        whole = self.encoder.count(asked.text)
        fixed = whole if form.into_title else min(self.encoder.count(asked.instruction), whole)
        smaller = items and self.assembly == "lamp" and not form.into_title
        tried = set()
        for factor in _FACTORS if smaller else _FACTORS[:1]:
            budget = room - fixed - min(whole - fixed, int(factor * max(0, room - fixed)))
            if budget > 0 and budget not in tried:
                tried.add(budget)
                yield budget

    def _fitted(
        self, asked: Asked, profile: str, items: Sequence[HistoryItem], form: Form, max_words: int, budget: int
    ) -> str | None:
        """The prompt with no more than `budget` tokens added; None where that cannot be.

        Pieces are counted one by one. Where together they take more, they are fitted again into so much less.
        """
        whole, left = self.encoder.count(asked.text), budget
        for _ in range(4):
            found = self._written(asked, profile, items, form, max_words, left)
            if found is None:
                return None
            excess = self.encoder.count(found) - whole - budget
            if excess <= 0:
                return found
            left -= excess
        return None

    def _written(
        self, asked: Asked, profile: str, items: Sequence[HistoryItem], form: Form, max_words: int, budget: int
    ) -> str | None:
        about = ""
        if profile:
            line_end = self.encoder.count("\n")
            about = self.encoder.cut(profile, (budget // 2 if items else budget) - line_end)
            if not about:
                return None
            budget -= self.encoder.count(about) + line_end
        if not items:
            shown: str | None = asked.text
        elif self.assembly == "oppu":
            shown = self._in_lines(asked, items, form, max_words, budget)
        else:
            shown = self._in_sentences(asked, items, form, budget)
        if shown is None:
            return None
        return f"{about}\n{shown}" if about else shown

    def _in_sentences(self, asked: Asked, items: Sequence[HistoryItem], form: Form, budget: int) -> str | None:
        """LaMP's assembly."""
        count = self.encoder.count
        budget -= count(form.closing) + (len(items) - 1) * count(_JOIN)
        needed = [count(form.sentence(item, "")) for item in items]
        shares = share_out(needed, [count(form.cut_field(item)) for item in items], budget)
        if shares is None:
            return None
        texts = [self.encoder.cut(form.cut_field(item), share) for item, share in zip(items, shares, strict=True)]
        joined = _JOIN.join(form.sentence(item, text) for item, text in zip(items, texts, strict=True))
        head, title, tail = asked.text.partition("title") if form.into_title else ("", "", asked.text)
        if title:
            return f"{head}{title}{form.closing}{joined}{tail}"
        return f"{joined}{form.closing if not form.into_title else '. '}{asked.text}"

    def _in_lines(
        self, asked: Asked, items: Sequence[HistoryItem], form: Form, max_words: int, budget: int
    ) -> str | None:
        """OPPU's assembly: whole lines, best first, while they fit; the best alone is cut to fit."""
        count, line_end = self.encoder.count, self.encoder.count("\n")
        budget -= line_end
        lines: list[str] = []
        for item in items:
            text = first_words(form.cut_field(item), max_words)
            line = form.line(item, text)
            if count(line) + line_end > budget:
                room = budget - line_end - count(form.line(item, ""))
                if lines or room < 1:
                    break
                line = form.line(item, self.encoder.cut(text, room))
            lines.append(f"{line}\n")
            budget -= count(line) + line_end
        return f"{''.join(lines)}\n{asked.text}" if lines else None


def share_out(needed: Sequence[int], lengths: Sequence[int], room: int) -> list[int] | None:
    """LaMP's budgets: tokens of each item's text, or None where one would get none.

    Each item has an equal share of `room`, of which `needed` goes to the words around its text; what it leaves goes
    to the items after it.
    """
    share, saved, found = room // len(needed), 0, []
    for need, length in zip(needed, lengths, strict=True):
        most = share + saved - need
        if most < 1:
            return None
        found.append(min(length, most))
        saved = most - found[-1]
    return found


def first_words(text: str, count: int) -> str:
    """The text itself, or its first `count` words where it has more."""
    words = text.split()
    return text if len(words) <= count else " ".join(words[:count])
