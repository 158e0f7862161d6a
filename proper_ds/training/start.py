"""A start of users' LoRAs, learned over the training users: first-order MAML (Finn et al. 2017), with step sizes.

For each training user of a step: train the user's LoRA on the history exactly as the user stage will (`train_users`),
ask it the user's training questions, and move the start, the step sizes of its parts (Meta-SGD, Li et al. 2017) and
the shrinkage so that the answers get better. Run by `rank_jobs.py`; ranks share the users of a step.
Shapes: S users of a micro-batch, P numbers in one adapter, M parts of an adapter, K target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step
from proper_ds.data.indices import Indices
from proper_ds.data.tokens import HISTORY, QUERY, Example
from proper_ds.errors import DataError
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.routing import Rows
from proper_ds.model.user_start import START, UserStart, part_sizes
from proper_ds.training.config import StartConfig, UserConfig
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.rank_batch import RankBatch, example_seed, numbers_of, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.rows import micro_batches, pack, rows_of_step
from proper_ds.training.selection import first_questions, num_history
from proper_ds.training.slots import UserTask
from proper_ds.training.unit_jobs import user_vector
from proper_ds.training.users import Counters, train_users

Tensor = torch.Tensor


@dataclass
class StartBatch(RankBatch):
    """Users of one micro-batch: what each learns from, and the questions that tell how well.

    Attributes:
        tasks: the users with as much of their history as they learn from in this step.
        questions: of each user; all have answers.
        seed: decides the order of items in the users' own training.
    """

    tasks: Sequence[UserTask] = ()
    questions: Sequence[Sequence[Example]] = ()
    seed: int = 0


def question_gradients(
    model: PersonalModel,
    layout: LoraLayout,
    rows_SP: Tensor,
    vectors: Sequence[Tensor | None],
    questions: Sequence[Sequence[Example]],
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Each user's mean loss over the answers' tokens [S], and its gradient by the user's adapter [S, P].

    Args:
        rows_SP: the users' adapters.
        vectors: the users' vectors; None without groups.
        num_tokens: padded tokens in one forward pass.
    """
    slots = SlotBuffers(layout, len(questions), rows_SP.dtype, model.device, trainable=True)
    assert slots.grads_SP is not None
    slots.weights_SP.copy_(rows_SP)
    rows = [row for n, own in enumerate(questions) for row in rows_of_step(n, own, {}, num_tokens, 0)]
    weights = [1 / sum(example.num_targets for example in own) for own in questions]
    weight_S = torch.tensor(weights, device=model.device, dtype=rows_SP.dtype)
    loss_S = torch.zeros_like(weight_S)
    model.attach_users(slots.modules())
    try:
        for part in micro_batches(rows, num_tokens):
            packed = pack(part, model.device)
            found = Rows(packed.slot_R, places=packed.places)
            own_vectors = [vector for row in part if (vector := vectors[row.slot]) is not None]
            if own_vectors:
                found.user_RU = torch.stack(own_vectors).to(model.device)
            model.set_rows(found)
            at = packed.places
            losses_K = model.losses_at(model.hidden(packed.ids_RT), at.row_K, at.column_K, packed.target_K)
            slot_K = packed.slot_R[at.row_K]
            weighted_K = losses_K * weight_S[slot_K]
            loss_S.index_add_(0, slot_K, weighted_K.detach())
            weighted_K.sum().backward()
    finally:
        model.attach_users(None)
        model.set_rows(Rows())
    return loss_S, slots.grads_SP


class StartModule(nn.Module):
    """The start as what is trained, and the frozen model that users train on.

    The gradient is first-order: a user's trained adapter counts as `start + share(n) * factor * d` with d, the way
    that the user's training went, held fixed.
    """

    def __init__(
        self, model: PersonalModel, layout: LoraLayout, settings: StartConfig, user: UserConfig, seed: int
    ) -> None:
        """`user` says how users train from the start; see `StartConfig.for_users`."""
        super().__init__()
        self.row_P = nn.Parameter(layout.initial_row(seed))
        # AdamW moves every number by about the learning rate: in these units step sizes move at their own
        self.log_factor_M = nn.Parameter(torch.zeros(2 * len(layout.modules)))
        self.log_prior = nn.Parameter(torch.zeros(1))
        self.model, self._layout, self._user = model, layout, user
        self._unit = settings.factor_learning_rate / settings.learning_rate
        self._first_prior = math.log(settings.prior_items)
        self._sizes = torch.tensor(part_sizes(layout))

    def _prior(self) -> Tensor:
        return (self._first_prior + self._unit * self.log_prior.float()).exp()

    def start(self) -> UserStart:
        """The start as it stands."""
        factor_M = (self._unit * self.log_factor_M.detach().float()).exp()
        return UserStart(self._layout, self.row_P.detach().float().clone(), factor_M, float(self._prior().detach()))

    def forward(self, inputs: StartBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log): the mean over the step's users of each one's mean loss per answer token."""
        nothing = 0.0 * (self.row_P.sum() + self.log_factor_M.sum() + self.log_prior.sum())
        if not inputs.weight:
            return nothing, numbers_of(ce=nothing, tokens=nothing)
        start, tasks = self.start(), inputs.tasks
        counters = Counters()
        results = train_users(self.model, self._layout, tasks, self._user, inputs.seed, counters, start)
        # who cannot be trained counts as one who stays at the start
        rows_SP = torch.stack([start.row_P.cpu() if r.row_P is None else r.row_P for r in results])
        rows_SP = rows_SP.to(start.row_P)
        count_S1 = torch.tensor([[float(len(task.examples))] for task in tasks], device=rows_SP.device)
        share_S1 = torch.tensor([[start.share(len(task.examples))] for task in tasks], device=rows_SP.device)
        vectors = [task.user_vector_U for task in tasks]
        loss_S, grads_SP = question_gradients(
            self.model, self._layout, rows_SP, vectors, inputs.questions, self._user.num_tokens_per_batch
        )
        moved_SP = self._moved(share_S1, count_S1, rows_SP - start.row_P)
        # its value is of no use; its gradient is that of the users' mean loss
        towards = (moved_SP * grads_SP).sum() / inputs.num_rows
        loss = towards - towards.detach() + loss_S.sum() / inputs.num_rows
        ce = loss_S.sum() * (inputs.num_targets / inputs.num_rows)
        num_asked = sum(len(example.ids) for own in inputs.questions for example in own)
        tokens = torch.tensor(float(counters.whole.num_tokens + num_asked))
        return loss + nothing, numbers_of(ce=ce, tokens=tokens)

    def _moved(self, share_S1: Tensor, count_S1: Tensor, delta_SP: Tensor) -> Tensor:
        """The users' adapters [S, P] as functions of what is trained; their values are those that were found."""
        sizes = self._sizes.to(delta_SP.device)
        log_factor_M = self._unit * self.log_factor_M.float()
        factor_P = (log_factor_M - log_factor_M.detach()).exp().repeat_interleave(sizes)
        kept_S1 = count_S1 / (count_S1 + self._prior())
        return self.row_P.float() + (kept_S1 / share_S1) * factor_P * delta_SP


class StartStage(RankStage):
    """See the module's docstring."""

    section = "start"

    def __init__(self, context: RunContext, adapter_set: str) -> None:
        """`adapter_set`: a preset, whose group level is on while users train, or `OPPU`, which has none."""
        super().__init__(context)
        self.name = f"start/{adapter_set}"
        config, tokens = context.config, context.tokens
        self._seed = seed_of(config.seed, self.name)
        self._level: GroupLevel | None = None
        if adapter_set != "OPPU":
            path = context.stage(f"group/{adapter_set}").path / "level.safetensors"
            self._level = GroupLevel.load(path).to(context.device)
        with_features = self._level is not None and self._level.encoder is not None
        self._features = FeatureData(context.stage("features").path) if with_features else None
        self._history = num_history(tokens)
        lora = config.user.lora
        names = sorted({*lora.target_modules, *(config.group.lora.target_modules if self._level is not None else [])})
        lm = self.load_lm(with_population=True)
        layout = LoraLayout.of(find_targets(lm, lora.target_modules, lora.layers), lora)
        model = PersonalModel(lm, find_targets(lm, names))
        if self._level is not None:
            model.attach_groups(self._level.by_module(), config.group.lora.lora_dropout)
        user = config.user_for(adapter_set)
        self.module: StartModule = StartModule(model, layout, self.settings, user, self._seed)

    @property
    def settings(self) -> StartConfig:
        """See RankStage."""
        return self.context.config.start

    def indices(self) -> Indices:
        """The first training question of each user with history; a user's other questions come with it."""
        tokens = self.context.tokens
        first = first_questions(tokens, self.context.config.data.train_split)

        def is_chosen(start: int, stop: int) -> np.ndarray:
            user = tokens.column("user", start, stop)
            return (first[user] == np.arange(start, stop)) & (self._history[user] > 0)

        found = Indices(tokens, is_chosen)
        if not len(found):
            raise DataError(
                "stage start has nothing to learn from: no user has both a history and a question of"
                f" data.train_split {self.context.config.data.train_split!r}; set user.start: fresh"
            )
        return found

    def batch(self, indices: np.ndarray, step: Step, number: int) -> StartBatch:
        """See RankStage."""
        made = rank_batch(self.context.tokens, indices, step, self.context.device)
        found = StartBatch(made.batch, made.weight, made.num_targets, made.num_rows, seed=seed_of(self._seed, number))
        if made.weight:
            pairs = [self._of(example, number) for example in made.examples]
            found.tasks, found.questions = [task for task, _ in pairs], [own for _, own in pairs]
        return found

    def _of(self, example: Example, number: int) -> tuple[UserTask, list[Example]]:
        """(user with some of the history, all of the user's training questions)."""
        tokens = self.context.tokens
        every = tokens.examples_of(*tokens.range_of(example.user))
        history = [e for e in every if e.kind == HISTORY]
        kept = self._kept(history, example, number)
        vector_U = None
        if self._level is not None:
            vector_U = user_vector(self._level, self._features, example.user, len(history), kept)
        questions = [e for e in every if e.kind == QUERY and e.num_targets]
        return UserTask(str(example.user), [history[n] for n in kept], vector_U), questions

    def _kept(self, history: Sequence[Example], example: Example, number: int) -> list[int]:
        """Positions of the items learned from in this step: the newest, or fewer of them, so that all lengths occur."""
        newest = np.arange(len(history))[-self.settings.max_history_items :]
        generator = np.random.default_rng(example_seed(self._seed, "history", number, example))
        if generator.random() >= self.settings.short_history_probability:
            return [int(n) for n in newest]
        num_kept = int(math.exp(generator.uniform(0, math.log(len(newest) + 1))))
        return sorted(int(n) for n in generator.choice(newest, num_kept, replace=False))

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        start = self.module.start()
        replace(start, row_P=start.row_P.cpu(), factor_M=start.factor_M.cpu()).save(folder / START, self.section)
