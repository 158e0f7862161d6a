"""The `evaluation` section of a run: which methods answer which questions, and how they are scored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from proper_ds.section import Section

DEFAULT_METHODS = ["base", "population", "group", "OPPU", "proper", "proper-released"]
USUAL_REFERENCES = ("population", "OPPU", "proper")


class MethodRecipe(Section):
    """A method of one's own, or a change of a shipped one, as `RAG-8: {like: RAG, prompt: {num_retrieved: 8}}`."""

    like: str | None = None
    """The shipped method that it is made from; by default the one of the same name."""
    prompt: dict[str, Any] = {}
    """What of its prompts differs; keys as in `PromptRecipe` (data/recipe.py)."""


class PriorConfig(Section):
    """Methods `population+prior` and `group+prior`: a user's own labels weigh the answers."""

    max_users: int | None = Field(default=500, ge=1)
    """How much they weigh is learned from the questions of a sample of so many training users; null for all."""


class EvaluationConfig(Section):
    """All methods answer the same questions through the same code."""

    methods: list[str] = DEFAULT_METHODS
    """Names from docs/methods.md, or of the run's own `recipes`."""
    split: str = "dev"
    """The split whose questions are answered."""
    closed_labels: Literal["score", "generate"] = "score"
    """Tasks with a closed label set: take the likeliest label, or generate freely."""
    ordinal: Literal["mode", "median"] = "mode"
    """Ratings under `closed_labels: score`: the likeliest rating, or the median of the ratings' distribution."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """For generated answers; by default what the task says."""
    max_floor_examples: int = Field(default=200_000, ge=1)
    """Methods without a language model are fitted to a sample of so many history items and questions."""
    num_bootstrap_samples: int = Field(default=1000, ge=10)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    references: list[str] | None = None
    """The methods that every other one is compared with by name; by default those of population, OPPU and proper that
    are compared. All pairs stand in report.json."""
    num_tokens_per_batch: int = Field(default=4096, ge=16)
    """Padded prompt tokens in one forward pass."""

    @field_validator("methods", "references", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def compared_with(self) -> list[str]:
        """The references that are set, or the usual ones among the methods."""
        if self.references is not None:
            return self.references
        return [name for name in USUAL_REFERENCES if name in self.methods]

    @field_validator("methods")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give at least one method, each once")
        return value
