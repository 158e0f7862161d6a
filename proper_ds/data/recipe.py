"""A prompt's recipe: what is put before a history item or a question, from the user's own data.

Part of a run's configuration (methods and lanes refer to it); `prompt_maker.py` follows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from proper_ds.errors import Problem
from proper_ds.files import digest_of, digest_of_file
from proper_ds.section import Section

RETRIEVAL_ONLY = ("num_retrieved", "assembly")
MODEL_ONLY = ("profile_revision", "profile_num_items", "profile_max_new_tokens")


class PromptRecipe(Section):
    """What stands before a question: retrieved items of the user's history, a profile of the user, both or nothing."""

    retriever: Literal["bm25", "recency", "random"] | None = None
    """Which earlier items of the user are shown: the likest, the newest, or random ones."""
    num_retrieved: int = Field(default=4, ge=1)
    """How many of them; all where there are fewer."""
    assembly: Literal["lamp", "oppu"] = "lamp"
    """How they are written down: LaMP's sentences and token budgets, or OPPU's lines."""
    profile: Literal["built-in", "file", "model"] | None = None
    """A text about the user: counted from the history, read from `profile_file`, or written by `profile_model`."""
    profile_file: str | None = None
    """JSON `{user: text}`, or JSONL with `user` and `profile` in each row."""
    profile_missing: Literal["refuse", "built-in", "empty"] = "refuse"
    """What to do for users with history whom `profile_file` does not have."""
    profile_model: str | None = None
    """A causal language model that follows instructions: a folder or a Hugging Face name."""
    profile_revision: str | None = None
    profile_num_items: int = Field(default=10, ge=1)
    """How many random history items the model sees (OPPU: 10)."""
    profile_max_new_tokens: int = Field(default=200, ge=1)

    @property
    def is_plain(self) -> bool:
        """Whether prompts are the bare questions."""
        return self.retriever is None and self.profile is None

    @property
    def needs_background(self) -> bool:
        """Whether some profile is counted against the words of the training users."""
        return self.profile == "built-in" or (self.profile == "file" and self.profile_missing == "built-in")

    @property
    def lane(self) -> str:
        """A short folder name that tells recipes apart; "" for the plain prompt."""
        parts = []
        if self.retriever is not None:
            parts.append(f"{self.retriever}-{self.num_retrieved}-{self.assembly}")
        if self.profile == "built-in":
            parts.append("built-in")
        elif self.profile is not None:
            about = self.model_dump(include={name for name in type(self).model_fields if name.startswith("profile")})
            parts.append(f"{self.profile}-{digest_of(about)[:8]}")
        return "+".join(parts)

    def settings(self, seed: int) -> dict[str, Any]:
        """What the prompts depend on besides data and tokenizer, for a stage's fingerprint; {} for the plain prompt.

        Raises:
            OSError: where `profile_file` cannot be read.
        """
        if self.is_plain:
            return {}
        found: dict[str, Any] = json.loads(self.model_dump_json(exclude={"profile_file"}))
        if self.profile_file is not None:
            found["profile_digest"] = digest_of_file(Path(self.profile_file))
        return found | ({"seed": seed} if self.retriever == "random" or self.profile == "model" else {})


def recipe_problems(recipe: PromptRecipe, key: str) -> list[Problem]:
    """What contradicts itself or has no effect in a recipe whose single values are legal.

    Args:
        key: where the recipe stands in the configuration, for the messages.
    """
    fields, problems = type(recipe).model_fields, []

    def idle(names: tuple[str, ...], without: str) -> None:
        for name in names:
            if getattr(recipe, name) != fields[name].get_default():
                problems.append(Problem(f"{key}.{name}", f"has no effect without {without}", "Remove it, or add that."))

    if recipe.retriever is None:
        idle(RETRIEVAL_ONLY, f"{key}.retriever")
    if recipe.profile != "file":
        idle(("profile_file", "profile_missing"), f"{key}.profile `file`")
    elif recipe.profile_file is None:
        mend = "Give JSON `{user: text}`, or JSONL with `user` and `profile` in each row."
        problems.append(Problem(f"{key}.profile_file", f"not set, but {key}.profile is `file`", mend))
    elif not Path(recipe.profile_file).is_file():
        wrong = f"{recipe.profile_file!r} is no file"
        problems.append(Problem(f"{key}.profile_file", wrong, "Check the path."))
    if recipe.profile != "model":
        idle(("profile_model", *MODEL_ONLY), f"{key}.profile `model`")
    elif recipe.profile_model is None:
        mend = "Give a folder or a Hugging Face name of a model that follows instructions."
        problems.append(Problem(f"{key}.profile_model", f"not set, but {key}.profile is `model`", mend))
    return problems
