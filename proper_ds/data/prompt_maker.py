"""Prompts by recipe: the one place where a user's own data becomes the text before a history item or a question.

`tokens.py` asks for every example's prompt. A maker sees one user at a time, and of a user only what may be seen: for
training on a history item the items before it, for a question the whole history, never an answer to be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from proper_ds.data.assembly import TEST_WORDS, TRAIN_WORDS, Assembler, Pieces
from proper_ds.data.background import Background
from proper_ds.data.forms import FORMS
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.profile_text import Summary
from proper_ds.data.profiles import Profiles
from proper_ds.data.prompts import PromptEncoder, history_prompt
from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import HistoryItem, User
from proper_ds.data.retrieval import Searcher
from proper_ds.data.tasks import TASKS, query_text
from proper_ds.errors import DataError
from proper_ds.files import seed_of

Shortage = Literal["", "bare", "no_items", "fewer_items"]
"""What a prompt lacks for want of room: nothing; all that its recipe puts there; the items, though not the profile;
some of the items."""


class _OneUser:
    """One user's items by task, and what was counted over them so far."""

    def __init__(
        self, user: User, recipe: PromptRecipe, tasks: Mapping[str, TaskManifest], background: Background | None
    ) -> None:
        self.user = user
        items: dict[str, list[HistoryItem]] = {}
        self.num_before: list[int] = []  # items of the same task before each
        for item in user.history:
            alike = items.setdefault(item.task, [])
            self.num_before.append(len(alike))
            alike.append(item)
        self.num_items = {task: len(held) for task, held in items.items()}
        self.searchers = {task: Searcher(recipe, held) for task, held in items.items()}
        self.summaries: dict[str, Summary] = {}
        if background is not None:
            self.summaries = {task: Summary(tasks[task], held, background.of(task)) for task, held in items.items()}


class PromptMaker:
    """Makes prompts by one recipe for one tokenizer; the same arguments make the same prompt, in any order of calls.

    Attributes:
        shortage: what the prompt made last had no room for.
    """

    def __init__(
        self,
        recipe: PromptRecipe,
        tasks: Mapping[str, TaskManifest],
        encoder: PromptEncoder,
        background: Background | None = None,
        profiles: Profiles | None = None,
        seed: int = 0,
    ) -> None:
        """Takes what the recipe needs: `background` for built-in profiles, `profiles` for all others.

        Raises:
            DataError: where the data was prepared by a version that did not write down what items look like.
        """
        assert (background is not None) == recipe.needs_background, "the background belongs to built-in profiles"
        assert (profiles is not None) == (recipe.profile in ("file", "model")), (
            "these profiles are read, others are not"
        )
        for task in tasks.values():
            if not recipe.is_plain and task.form not in FORMS:
                raise DataError(f"task {task.name} was prepared by an earlier version; prepare the data again")
        self._recipe, self._tasks, self._encoder = recipe, tasks, encoder
        self._background, self._profiles, self._seed = background, profiles, seed
        self._assembler = Assembler(encoder, recipe.assembly)
        self._held: _OneUser | None = None  # users come one after another
        self.shortage: Shortage = ""

    def history(self, user: User, position: int, num_reserved: int) -> str:
        """The prompt for training on the history item at `position`; it knows the items before that alone.

        Args:
            num_reserved: tokens of the answer, for which room is left.
        """
        item, self.shortage = user.history[position], ""
        task = self._tasks[item.task]
        text = history_prompt(task, item)
        if self._recipe.is_plain:
            return text
        held = self._of(user)
        num_before = held.num_before[position]
        shown: Sequence[HistoryItem] = ()
        if self._recipe.retriever is not None:
            seed = seed_of(self._seed, user.key, "history", position)
            shown = held.searchers[task.name].before(num_before, item.text, seed)
        profile = self._profile(held, task, num_before)
        instruction = task.history_prompts[item.prompt][0]
        return self._made(Pieces(text, instruction, FORMS[task.form], profile, shown, TRAIN_WORDS), num_reserved)

    def query(self, user: User, position: int, num_reserved: int) -> str:
        """The prompt of the question at `position`; it may know the whole history.

        Args:
            num_reserved: tokens of the answer, for which room is left.
        """
        query, self.shortage = user.queries[position], ""
        task = self._tasks[query.task]
        if self._recipe.is_plain:
            return query.input
        held = self._of(user)
        own = query_text(TASKS[task.form], query.input, task.instruction)
        shown: Sequence[HistoryItem] = ()
        if self._recipe.retriever is not None and task.name in held.searchers:
            shown = held.searchers[task.name].among_all(own, seed_of(self._seed, user.key, "query", query.id))
        profile = self._profile(held, task, held.num_items.get(task.name, 0))
        instruction = query.input.removesuffix(own) if query.input.endswith(own) else ""
        return self._made(Pieces(query.input, instruction, FORMS[task.form], profile, shown, TEST_WORDS), num_reserved)

    def _of(self, user: User) -> _OneUser:
        if self._held is None or self._held.user is not user:
            self._held = _OneUser(user, self._recipe, self._tasks, self._background)
        return self._held

    def _profile(self, held: _OneUser, task: TaskManifest, stop: int) -> str:
        if self._profiles is not None:
            found = self._profiles.of(held.user.key, task.name)
            if found is not None:
                return found
        return held.summaries[task.name].before(stop) if task.name in held.summaries else ""

    def _made(self, pieces: Pieces, num_reserved: int) -> str:
        if not pieces.profile and not pieces.items:
            return pieces.question
        found = self._assembler.assembled(pieces, self._encoder.room(num_reserved))
        if found.text == pieces.question:
            self.shortage = "bare"
        elif found.num_items < len(pieces.items):
            self.shortage = "fewer_items" if found.num_items else "no_items"
        return found.text


def maker_for(
    recipe: PromptRecipe,
    prepared: PreparedData,
    encoder: PromptEncoder,
    out: Path,
    written: Path,
    split: str,
    seed: int,
) -> PromptMaker:
    """A maker with everything its recipe needs, counted or read from files.

    Args:
        out: the folder of the tokens, where the background is written.
        written: the folder of the units that a model's profiles were committed in.
        split: whose users make up the background: data.train_split.

    Raises:
        DataError: for a profile file that cannot be used, or that lacks users.
    """
    background, profiles = None, None
    if recipe.needs_background:
        background = Background.count(prepared.users(), split)
        background.write(out)
    if recipe.profile == "file":
        assert recipe.profile_file is not None
        profiles = Profiles.from_file(Path(recipe.profile_file))
    elif recipe.profile == "model":
        profiles = Profiles.from_units(written, prepared.keys())
    if profiles is not None:
        profiles.check(recipe, prepared.users())
    return PromptMaker(recipe, prepared.manifest.tasks, encoder, background, profiles, seed)
