"""Puts a profile text and retrieved items before a question, within what the base's length leaves.

Two ways: LaMP's (equal shares of tokens, what one item leaves goes to the next, a smaller share for the question where
the items do not fit) and OPPU's (`profile`, items, question, in lines). Where LaMP gives up, the least fitting item is
left out and the others are tried again; the bare question remains where not even one fits.
`prompt_maker.py` calls `assembled`; in numbers, `room` and `budget` are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from proper_ds.data.forms import Form
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.records import HistoryItem

TRAIN_WORDS, TEST_WORDS = 768, 368
"""OPPU's cuts: words of a field in training on history items, and for questions."""
_JOIN = ", and "
_FACTORS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


@dataclass(frozen=True)
class Pieces:
    """What a prompt is made of.

    Attributes:
        question: instruction and own text of a history item or question.
        instruction: the beginning of the question that is never cut.
        profile: text about the user, or "".
        items: retrieved, the most fitting first.
        max_words: words of an item's field that OPPU's lines show.
    """

    question: str
    instruction: str
    form: Form
    profile: str = ""
    items: Sequence[HistoryItem] = ()
    max_words: int = TEST_WORDS


class Assembled(NamedTuple):
    """A prompt's text, and how many of the items it shows."""

    text: str
    num_items: int = 0


@dataclass(frozen=True)
class Assembler:
    """Writes prompts for one tokenizer and length."""

    encoder: PromptEncoder
    assembly: str

    def assembled(self, pieces: Pieces, room: int) -> Assembled:
        """The prompt with as many of the items as fit, the first of them; the bare question where no room is left.

        Args:
            room: tokens for the whole prompt.
        """
        for num_items in range(len(pieces.items), -1, -1):
            fewer = replace(pieces, items=pieces.items[:num_items])
            if not fewer.items and not fewer.profile:
                break
            for budget in self._budgets(fewer, room):
                found = self._fitted(fewer, budget)
                if found is not None:
                    return found
        return Assembled(pieces.question)

    def _budgets(self, pieces: Pieces, room: int) -> Iterator[int]:
        """Tokens for what stands before: LaMP's `max_length - min(len(question), factor * max_length)`.

        Both lengths are without the instruction, so that the question alone is ever cut.
        """
        whole, into_title = self.encoder.count(pieces.question), pieces.form.into_title
        fixed = whole if into_title else min(self.encoder.count(pieces.instruction), whole)
        gives_way = pieces.items and self.assembly == "lamp" and not into_title
        tried = set()
        for factor in _FACTORS if gives_way else _FACTORS[:1]:
            budget = room - fixed - min(whole - fixed, int(factor * max(0, room - fixed)))
            if budget > 0 and budget not in tried:
                tried.add(budget)
                yield budget

    def _fitted(self, pieces: Pieces, budget: int) -> Assembled | None:
        """The prompt with no more than `budget` tokens added; None where that cannot be.

        Pieces are counted one by one. Where together they take more, they are fitted again into so much less.
        """
        whole, left = self.encoder.count(pieces.question), budget
        for _ in range(4):
            found = self._written(pieces, left)
            if found is None:
                return None
            excess = self.encoder.count(found.text) - whole - budget
            if excess <= 0:
                return found
            left -= excess
        return None

    def _written(self, pieces: Pieces, budget: int) -> Assembled | None:
        about = ""
        if pieces.profile:
            line_end = self.encoder.count("\n")
            about = self.encoder.cut(pieces.profile, (budget // 2 if pieces.items else budget) - line_end)
            if not about:
                return None
            budget -= self.encoder.count(about) + line_end
        if not pieces.items:
            shown: Assembled | None = Assembled(pieces.question)
        elif self.assembly == "oppu":
            shown = self._in_lines(pieces, budget)
        else:
            shown = self._in_sentences(pieces, budget)
        if shown is None:
            return None
        return shown._replace(text=f"{about}\n{shown.text}") if about else shown

    def _in_sentences(self, pieces: Pieces, budget: int) -> Assembled | None:
        """LaMP's assembly."""
        count, form, items = self.encoder.count, pieces.form, pieces.items
        budget -= count(form.closing) + (len(items) - 1) * count(_JOIN)
        needed = [count(form.sentence(item, "")) for item in items]
        shares = share_out(needed, [count(form.cut_field(item)) for item in items], budget)
        if shares is None:
            return None
        texts = [self.encoder.cut(form.cut_field(item), share) for item, share in zip(items, shares, strict=True)]
        joined = _JOIN.join(form.sentence(item, text) for item, text in zip(items, texts, strict=True))
        if not form.into_title:
            return Assembled(f"{joined}{form.closing}{pieces.question}", len(items))
        head, title, tail = pieces.question.partition("title")
        whole = f"{head}{title}{form.closing}{joined}{tail}" if title else f"{joined}. {pieces.question}"
        return Assembled(whole, len(items))

    def _in_lines(self, pieces: Pieces, budget: int) -> Assembled | None:
        """OPPU's assembly: whole lines, best first, while they fit; the best alone is cut to fit."""
        count, form, line_end = self.encoder.count, pieces.form, self.encoder.count("\n")
        budget -= line_end
        lines: list[str] = []
        for item in pieces.items:
            text = first_words(form.cut_field(item), pieces.max_words)
            line = form.line(item, text)
            if count(line) + line_end > budget:
                room = budget - line_end - count(form.line(item, ""))
                if lines or room < 1:
                    break
                line = form.line(item, self.encoder.cut(text, room))
            lines.append(f"{line}\n")
            budget -= count(line) + line_end
        return Assembled(f"{''.join(lines)}\n{pieces.question}", len(lines)) if lines else None


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
