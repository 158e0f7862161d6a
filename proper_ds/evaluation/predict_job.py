"""What the fleet's actors run for evaluation: every method's answers to the questions of each unit's users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from proper_ds.data.batches import length_batches
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import QUERY, Example
from proper_ds.evaluation.methods import METHODS, Method
from proper_ds.evaluation.predict import decide, generate, score_labels
from proper_ds.files import atomic_path
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import SlotBuffers
from proper_ds.model.routing import Rows, mean_gates
from proper_ds.store.elsewhere import open_store
from proper_ds.store.layers import LayeredAdapters
from proper_ds.store.store import AdapterStore
from proper_ds.training.context import PopulationSwitch, RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.selection import num_history
from proper_ds.training.unit_jobs import UserRange, user_vector

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

Tensor = torch.Tensor

MAX_ROWS = 64
SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("user", pa.int32()),
        ("task", pa.string()),
        ("id", pa.string()),
        ("gold", pa.string()),
        ("prediction", pa.string()),
        ("num_history", pa.int32()),
        ("personal", pa.bool_()),
        ("scores", pa.list_(pa.float32())),
        ("gates", pa.list_(pa.float32())),
        ("num_experts", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Question:
    """One question to be answered.

    Attributes:
        example: its prompt.
        gold: the answer, or None where it is hidden.
    """

    example: Example
    id: str
    gold: str | None

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt alone."""
        return self.example.ids[: self.example.num_prompt]


class PredictJob:
    """Answers each unit's questions by all methods, and commits them as one Parquet file."""

    def __init__(self, config: RunConfig, device: torch.device, methods: list[str]) -> None:
        self._context = context = RunContext(config, device)
        self._methods = [METHODS[name] for name in methods]
        self._tasks = list(context.prepared.manifest.tasks.values())
        self._history = num_history(context.tokens)
        base = config.base
        self._encoder = PromptEncoder(context.tokenizer, base.prompt_suffix, base.max_length)
        lm = context.load_lm(with_population=False)
        self._population: PopulationSwitch | None = None
        if any(method.population for method in self._methods):
            self._population = context.population_switch(lm)
        names = sorted({*config.user.lora.target_modules, *config.group.lora.target_modules})
        self._model = PersonalModel(lm, find_targets(lm, names))
        self._levels = {self._level_path(m): self._load_level(m) for m in self._methods if m.preset}
        self._stores = {m.own_set: self._adapters_of(m) for m in self._methods if m.own_set is not None}
        self._slots = {
            name: SlotBuffers(store.layout, MAX_ROWS, torch.float32, device, trainable=False)
            for name, store in self._stores.items()
            if store.users()
        }
        self._features: FeatureData | None = None
        if any(level.encoder is not None for level in self._levels.values()):
            self._features = FeatureData(context.folder.stage("features").path)

    def _adapters_of(self, method: Method) -> AdapterStore | LayeredAdapters:
        lower = open_store(self._context.folder.stage(f"store/{method.adapter_set}").path)
        if method.joint_set is None:
            return lower
        return LayeredAdapters(open_store(self._context.folder.stage(f"store/{method.joint_set}").path), lower)

    def _level_path(self, method: Method) -> Path:
        return self._context.folder.stage(method.level_folder).path / "level.safetensors"

    def _load_level(self, method: Method) -> GroupLevel:
        return GroupLevel.load(self._level_path(method)).to(self._context.device)

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        questions = self._questions(unit)
        rows: list[dict[str, Any]] = []
        for method in self._methods:
            self._switch_to(method)
            for task_code, task in enumerate(self._tasks):
                rows += self._answer(method, task, [q for q in questions if q.example.task == task_code])
        folder = self._context.folder.stage("predictions").path / "units"
        with atomic_path(folder / f"{unit.name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")
        return {"num_questions": len(questions), "num_answers": len(rows)}

    def _questions(self, unit: UserRange) -> list[Question]:
        context, found = self._context, []
        split = context.config.evaluation.split
        for index, user in enumerate(context.prepared.users(unit.first, unit.stop), start=unit.first):
            if not any(query.split == split for query in user.queries):
                continue
            start, stop = context.tokens.range_of(index)
            for example in context.tokens.examples_of(start, stop):
                if example.kind == QUERY and user.queries[example.position].split == split:
                    query = user.queries[example.position]
                    found.append(Question(example, query.id, query.answer))
        return found

    def _switch_to(self, method: Method) -> None:
        """Set the model up for a method: population merged or not, experts and slots on or off."""
        if self._population is not None:
            self._population.set(method.population)
        level = self._levels[self._level_path(method)] if method.preset else None
        self._model.attach_groups(level.by_module() if level is not None else None)
        slots = self._slots.get(method.own_set) if method.own_set is not None else None
        if level is not None and level.lora_aware and slots is None:
            raise AssertionError("the router stage cannot have run without any stored adapter")
        self._model.attach_users(slots.modules() if slots is not None else None)

    def _answer(self, method: Method, task: TaskManifest, questions: list[Question]) -> Iterator[dict[str, Any]]:
        evaluation = self._context.config.evaluation
        scored = task.labels is not None and evaluation.closed_labels == "score"
        extra = sum(len(ids) for ids in self._context.tokens.labels(task.name)) if scored else 0
        lengths = [len(q.prompt) + extra for q in questions]
        for part in length_batches(lengths, evaluation.num_tokens_per_batch):
            for start in range(0, len(part), MAX_ROWS):
                yield from self._answer_batch(method, task, [questions[i] for i in part[start : start + MAX_ROWS]])

    def _answer_batch(self, method: Method, task: TaskManifest, batch: list[Question]) -> Iterator[dict[str, Any]]:
        evaluation, tokens = self._context.config.evaluation, self._context.tokens
        rows, personal = self._rows(method, batch)
        prompts = [q.prompt for q in batch]
        gates = self._prompt_gates(rows, prompts) if method.preset else [[] for _ in batch]
        self._model.set_rows(rows)
        scores: list[list[float]] = [[] for _ in batch]
        if task.labels is not None and evaluation.closed_labels == "score":
            scores = score_labels(self._model, prompts, tokens.labels(task.name)).tolist()
            answers = [
                decide(s, task.labels, evaluation.ordinal == "median" and task.kind == "ordinal") for s in scores
            ]
        else:
            room = evaluation.max_new_tokens or task.max_new_tokens
            made = generate(self._model, prompts, room, self._encoder.eos)
            answers = [self._parsed(task, self._encoder.decode(ids)) for ids in made]
        self._model.set_rows(Rows())
        for q, answer, own, score_L, gate in zip(batch, answers, personal, scores, gates, strict=True):
            yield {
                "method": method.name,
                "user": q.example.user,
                "task": task.name,
                "id": q.id,
                "gold": q.gold,
                "prediction": answer,
                "num_history": int(self._history[q.example.user]),
                "personal": own,
                "scores": score_L,
                "gates": gate,
                "num_experts": self._levels[self._level_path(method)].num_experts if method.preset else 0,
            }

    def _rows(self, method: Method, batch: list[Question]) -> tuple[Rows, list[bool]]:
        """What the adapted modules must know, and which rows have an adapter of their own.

        A user without one (no history, or failed) gets a slot of zeros: the groups or the population answer.
        """
        device, keys = self._context.device, self._context.keys
        users = [q.example.user for q in batch]
        rows, personal = Rows(), [False] * len(batch)
        level = self._levels[self._level_path(method)] if method.preset else None
        if level is not None:
            vectors = {u: user_vector(level, self._features, u, int(self._history[u])) for u in set(users)}
            rows.user_RU = torch.stack([vectors[user] for user in users])
        slots = self._slots.get(method.own_set) if method.own_set is not None else None
        if slots is not None and method.own_set is not None:
            store = self._stores[method.own_set]
            distinct = sorted(set(users))
            held = [user for user in distinct if store.has(keys[user])]
            slots.weights_SP.zero_()
            if held:
                slots.weights_SP[: len(held)] = store.get_many([keys[user] for user in held]).to(device)
            place = {user: n for n, user in enumerate(held)}
            # one slot more than distinct users with an adapter is never needed: rows without one share it
            rows.slot_R = torch.tensor([place.get(user, len(held) % MAX_ROWS) for user in users], device=device)
            personal = [user in place for user in users]
        return rows, personal

    def _parsed(self, task: TaskManifest, text: str) -> str:
        """A generated answer; a label that the tokenizer cannot write exactly is recognised as it writes it."""
        for label in task.labels or ():
            if text in (label, self._encoder.visible(label)):
                return label
        return text

    def _prompt_gates(self, rows: Rows, prompts: list[np.ndarray]) -> list[list[float]]:
        """For each row the mean gates over its prompt, module after module."""
        ids_RT = np.zeros((len(prompts), max(len(p) for p in prompts)), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_RT[row, : len(prompt)] = prompt
        self._model.set_rows(replace(rows, gates={}))
        with torch.no_grad():
            self._model.hidden(torch.from_numpy(ids_RT).to(self._context.device))
        assert self._model.rows.gates is not None
        lengths = torch.tensor([len(p) for p in prompts], device=self._context.device)
        parts = []
        for gates_RTN in self._model.rows.gates.values():
            mask_RT = torch.arange(gates_RTN.shape[1], device=lengths.device) < lengths[:, None]
            parts.append(mean_gates(gates_RTN.float(), mask_RT))
        found: list[list[float]] = torch.cat(parts, dim=-1).tolist()
        return found
