"""What the fleet's actors run for evaluation: each method's answers to the questions of each unit's users."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from proper_ds.data.batches import length_batches
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import QUERY, Example
from proper_ds.evaluation.adapters import addition_of
from proper_ds.evaluation.additions import MAX_ROWS, Addition
from proper_ds.evaluation.answers import SCHEMA, write_answers
from proper_ds.evaluation.label_prior import LabelPrior, load_priors
from proper_ds.evaluation.methods import Method, methods_of
from proper_ds.evaluation.predict import decide, generate, score_labels
from proper_ds.evaluation.prior_fit import ASKED, tasks_with_prior
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.routing import Rows, mean_gates
from proper_ds.training.context import RunContext
from proper_ds.training.lanes import Lanes
from proper_ds.training.selection import num_history
from proper_ds.training.unit_jobs import UserRange

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


@dataclass(frozen=True)
class Question:
    """One question to be answered.

    Attributes:
        example: its prompt.
        gold: the answer, or None where it is hidden.
        own: answers of the user's history items of the same task, for label priors.
    """

    example: Example
    id: str
    gold: str | None
    own: tuple[str, ...] = ()

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt alone."""
        return self.example.ids[: self.example.num_prompt]


class PredictJob:
    """Answers the questions of each unit's users by the method that the unit is of, and commits them as one file.

    For stages of label priors these are training questions, of a sample of users, answered without the prior.
    """

    def __init__(self, config: RunConfig, device: torch.device, priors: dict[str, str] | None = None) -> None:
        """`priors`: names of methods by the stages of their label priors; None evaluates."""
        self._config = config
        self._methods = {method.name: method for method in methods_of(config) if method.kind != "floor"}
        self._by_part = {f"predictions/{name}": method for name, method in self._methods.items()}
        if priors is not None:
            self._by_part = {part: self._methods[name].without_prior for part, name in priors.items()}
            self._methods = {method.name: method for method in self._by_part.values()}
        self._of_priors = priors is not None
        methods = list(self._methods.values())
        lanes = list(dict.fromkeys(method.lane for method in methods))
        with_population = list(dict.fromkeys(method.lane for method in methods if method.population))
        self._lanes = Lanes(config, device, lanes, populations=with_population)
        context, lm = self._lanes.context(lanes[0]), self._lanes.lm
        self._history = num_history(context.tokens)
        self._encoder = PromptEncoder(context.tokenizer, config.base.prompt_suffix, config.base.max_length)
        names = sorted({*config.user.lora.target_modules, *config.group.lora.target_modules, *self._of_plora()})
        self._model = PersonalModel(lm, find_targets(lm, names))
        self._addition: tuple[str, Addition] | None = None  # of one method at a time: they take room on the device

    def _of_plora(self) -> list[str]:
        """Modules that PLoRA adapts, where it is asked for."""
        asked = any(method.kind == "PLoRA" for method in self._methods.values())
        return self._config.plora.lora.target_modules if asked else []

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        start_s = time.perf_counter()
        method = self._by_part[unit.part]
        context = self._lanes.context(method.lane)
        questions = list(self._questions_of(context, unit, with_own=method.prior))
        self._lanes.wear(method.lane if method.population else None)
        addition = self._addition_of(method, context)
        priors = load_priors(context.stage(method.prior_stage).path) if method.prior_stage else {}
        rows: list[dict[str, Any]] = []
        answer_s = time.perf_counter()
        addition.attach(self._model)
        for task_code, (name, task) in enumerate(context.prepared.manifest.tasks.items()):
            asked = [q for q in questions if q.example.task == task_code]
            if method.prior_stage and name not in priors:
                continue  # labels weigh nothing there: the method leaves the task out
            rows += self._answer(context, addition, task, priors.get(name), asked)
        addition.detach(self._model)
        answering_seconds = time.perf_counter() - answer_s
        table = pa.Table.from_pylist([row | {"method": method.name} for row in rows], schema=SCHEMA)
        write_answers(context.folder.stage(unit.part).path, unit.name, table)
        seconds = time.perf_counter() - start_s
        tokens = sum(len(q.prompt) for q in questions)
        return {
            "num_questions": len(rows),
            "num_tokens": tokens,
            "answering_seconds": answering_seconds,
            "seconds": seconds,
        }

    def _questions_of(self, context: RunContext, unit: UserRange, with_own: bool) -> Iterator[Question]:
        """Questions of the evaluated split; for stages of label priors, answered ones of the training split.

        Args:
            with_own: whether the answers of the user's history come with them.
        """
        data, split = context.config.data, context.config.evaluation.split
        asked_U, tasks = None, set(context.prepared.manifest.tasks)
        if self._of_priors:
            split, tasks = data.train_split, set(tasks_with_prior(context.prepared))
            asked_U = np.load(context.folder.stage(unit.part).path / ASKED, allow_pickle=False)
        for index, user in enumerate(context.prepared.users(unit.first, unit.stop), start=unit.first):
            if asked_U is not None and not asked_U[index]:
                continue
            wanted = [
                query.split == split and query.task in tasks and (asked_U is None or query.answer is not None)
                for query in user.queries
            ]
            if not any(wanted):
                continue
            start, stop = context.tokens.range_of(index)
            for example in context.tokens.examples_of(start, stop):
                if example.kind == QUERY and wanted[example.position]:
                    query = user.queries[example.position]
                    own = tuple(item.answer for item in user.history if with_own and item.task == query.task)
                    yield Question(example, query.id, query.answer, own)

    def _addition_of(self, method: Method, context: RunContext) -> Addition:
        if self._addition is None or self._addition[0] != method.name:
            self._addition = None  # the old one goes before the new one comes
            self._addition = (method.name, addition_of(method, context))
        return self._addition[1]

    def _answer(
        self,
        context: RunContext,
        addition: Addition,
        task: TaskManifest,
        prior: LabelPrior | None,
        questions: list[Question],
    ) -> Iterator[dict[str, Any]]:
        evaluation = self._config.evaluation
        scored = task.labels is not None and evaluation.closed_labels == "score"
        extra = sum(len(ids) for ids in context.tokens.labels(task.name)) if scored else 0
        lengths = [len(q.prompt) + extra for q in questions]
        for part in length_batches(lengths, evaluation.num_tokens_per_batch):
            for start in range(0, len(part), MAX_ROWS):
                batch = [questions[i] for i in part[start : start + MAX_ROWS]]
                yield from self._answer_batch(context, addition, task, prior, batch)

    def _answer_batch(
        self,
        context: RunContext,
        addition: Addition,
        task: TaskManifest,
        prior: LabelPrior | None,
        batch: list[Question],
    ) -> Iterator[dict[str, Any]]:
        evaluation = self._config.evaluation
        rows, own = addition.rows([q.example for q in batch])
        prompts = [addition.prompt(q.prompt) for q in batch]
        with_gates = addition.num_experts and not self._of_priors
        gates = self._prompt_gates(rows, prompts) if with_gates else [[] for _ in batch]
        self._model.set_rows(rows)
        scores: list[list[float]] = [[] for _ in batch]
        if task.labels is not None and evaluation.closed_labels == "score":
            scores = score_labels(self._model, prompts, context.tokens.labels(task.name)).tolist()
            if prior is not None:
                scores = [prior.weighed(s, q.own) for s, q in zip(scores, batch, strict=True)]
                own = [is_personal or bool(q.own) for is_personal, q in zip(own, batch, strict=True)]
            answers = [
                decide(s, task.labels, evaluation.ordinal == "median" and task.kind == "ordinal") for s in scores
            ]
        else:
            room = evaluation.max_new_tokens or task.max_new_tokens
            made = generate(self._model, prompts, room, self._encoder.eos)
            answers = [self._parsed(task, self._encoder.decode(ids)) for ids in made]
        self._model.set_rows(Rows())
        for q, answer, is_personal, score_L, gate in zip(batch, answers, own, scores, gates, strict=True):
            yield {
                "user": q.example.user,
                "task": task.name,
                "id": q.id,
                "gold": q.gold,
                "prediction": answer,
                "num_history": int(self._history[q.example.user]),
                "personal": is_personal,
                "scores": score_L,
                "gates": gate,
                "num_experts": addition.num_experts,
            }

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
            self._model.hidden(torch.from_numpy(ids_RT).to(self._model.device))
        assert self._model.rows.gates is not None
        lengths = torch.tensor([len(p) for p in prompts], device=self._model.device)
        parts = []
        for gates_RTN in self._model.rows.gates.values():
            mask_RT = torch.arange(gates_RTN.shape[1], device=lengths.device) < lengths[:, None]
            parts.append(mean_gates(gates_RTN.float(), mask_RT))
        found: list[list[float]] = torch.cat(parts, dim=-1).tolist()
        return found
