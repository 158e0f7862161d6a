"""Profile texts by a language model: what a model that follows instructions says of a user's history.

The fleet's actors run `ProfilesJob` before a lane's prompts are tokenised; `data/profiles.py` keeps the texts.
After OPPU's gen_profile.py, with requests of our own, and greedy where OPPU samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from proper_ds.data.assembly import first_words
from proper_ds.data.batches import length_batches
from proper_ds.data.forms import FORMS
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.profiles import write_unit
from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import HistoryItem, User
from proper_ds.errors import AdapterError
from proper_ds.files import seed_of
from proper_ds.run_folder import split_lane
from proper_ds.training.context import RunContext, base_dtype

if TYPE_CHECKING:
    from proper_ds.config import RunConfig
    from proper_ds.training.unit_jobs import UserRange

MAX_WORDS = 200
"""Words of an item's field that the model sees, as in OPPU."""


def drawn_items(user: User, task: TaskManifest, count: int, seed: int) -> list[HistoryItem]:
    """Random items of a user for one task, oldest first; all where there are no more than `count`."""
    items = [item for item in user.history if item.task == task.name]
    if len(items) <= count:
        return items
    generator = np.random.default_rng(seed_of(seed, user.key, "profile", task.name))
    return [items[n] for n in sorted(generator.choice(len(items), count, replace=False))]


def request(task: TaskManifest, items: Sequence[HistoryItem], max_words: int = MAX_WORDS) -> str:
    """What the model is asked about a user."""
    form = FORMS[task.form]
    lines = (form.line(item, first_words(form.cut_field(item), max_words)) for item in items)
    return form.request + "\n\n" + "\n".join(f"- {line}" for line in lines)


class ProfileWriter:
    """A causal language model that writes profiles, greedily."""

    def __init__(self, recipe: PromptRecipe, dtype: torch.dtype, device: torch.device) -> None:
        """Raises AdapterError where `profile_model` cannot be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert recipe.profile_model is not None
        name, revision = recipe.profile_model, recipe.profile_revision
        self._name, self._max_new_tokens = name, recipe.profile_max_new_tokens
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            lm = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0][:200]
            raise AdapterError(
                f"profile_model {name!r}: no causal language model could be loaded ({first})."
                " Give a folder saved by save_pretrained, or a Hugging Face name that this machine can reach"
            ) from None
        self._lm = lm.eval().to(device)
        self._device = device
        longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        self._room = longest - self._max_new_tokens

    def ids(self, task: TaskManifest, items: Sequence[HistoryItem]) -> list[int]:
        """The tokens of a request, in the model's chat form where it has one.

        Where the model has no room for all, the last items go, and then the last words of the first.

        Raises:
            AdapterError: where not even a word of one item fits.
        """
        count, max_words = len(items), MAX_WORDS
        while True:
            found = self._encoded(request(task, items[:count], max_words))
            if len(found) <= self._room:
                return found
            if count > 1:
                count -= 1
            elif max_words > 1:
                max_words //= 2
            else:
                raise AdapterError(
                    f"profile_model {self._name!r} has room for {self._room} tokens besides profile_max_new_tokens"
                    f" {self._max_new_tokens}, too few for one item; use another model, or lower that"
                )

    def _encoded(self, text: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(f"{text}\n\nAnswer:")["input_ids"])
        turns = [{"role": "user", "content": text}]
        shown = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(shown, add_special_tokens=False)["input_ids"])

    def write(self, prompts: Sequence[list[int]], num_tokens_per_batch: int) -> list[str]:
        """A text for each prompt, on one line."""
        found = [""] * len(prompts)
        lengths = [len(prompt) + self._max_new_tokens for prompt in prompts]
        for part in length_batches(lengths, num_tokens_per_batch):
            for n, ids in zip(part, self._continued([prompts[n] for n in part]), strict=True):
                text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
                found[n] = " ".join(text.split())
        return found

    def _continued(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id
        pad = pad if pad is not None else 0
        ids_RT = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask_RT = torch.zeros_like(ids_RT)
        for row, prompt in enumerate(prompts):
            ids_RT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_RT[row, width - len(prompt) :] = 1
        greedy = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }  # whatever the model ships with
        with torch.no_grad():
            out = self._lm.generate(
                input_ids=ids_RT.to(self._device),
                attention_mask=mask_RT.to(self._device),
                max_new_tokens=self._max_new_tokens,
                pad_token_id=pad,
                **greedy,
            )
        continued: list[list[int]] = out[:, width:].tolist()
        return continued


class ProfilesJob:
    """Writes the profiles of each unit's users and commits them as one Parquet file.

    A unit's part is its stage, `profiles@<lane>`. The model of one lane is in memory at a time.
    """

    def __init__(self, config: RunConfig, device: torch.device, recipes: dict[str, dict[str, Any]]) -> None:
        """Takes the recipes by lane, as `PromptRecipe.model_dump()` writes them."""
        self._config, self._device = config, device
        self._recipes = {lane: PromptRecipe.model_validate(raw) for lane, raw in recipes.items()}
        self._writer: tuple[tuple[str | None, str | None, int], ProfileWriter] | None = None

    def _writer_of(self, recipe: PromptRecipe) -> ProfileWriter:
        wanted = (recipe.profile_model, recipe.profile_revision, recipe.profile_max_new_tokens)
        if self._writer is None or self._writer[0] != wanted:
            self._writer = None  # the old one goes before the new one comes
            dtype = base_dtype(self._config.base, self._device.type == "cuda")
            self._writer = (wanted, ProfileWriter(recipe, dtype, self._device))
        return self._writer[1]

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        start_s = time.perf_counter()
        lane = split_lane(unit.part)[1]
        recipe = self._recipes[lane]
        context, writer = RunContext(self._config, self._device, lane), self._writer_of(recipe)
        rows, prompts = [], []
        for index, user in enumerate(context.prepared.users(unit.first, unit.stop), start=unit.first):
            for task in context.prepared.manifest.tasks.values():
                items = drawn_items(user, task, recipe.profile_num_items, self._config.seed)
                if items:
                    rows.append({"user": index, "task": task.name})
                    prompts.append(writer.ids(task, items))
        texts = writer.write(prompts, self._config.evaluation.num_tokens_per_batch)
        rows = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
        write_unit(context.stage("profiles").path / "units", unit.name, rows)
        return {
            "num_users": unit.stop - unit.first,
            "num_texts": len(texts),
            "num_tokens": sum(map(len, prompts)),
            "seconds": time.perf_counter() - start_s,
        }
