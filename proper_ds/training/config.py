"""The sections `population`, `group`, `user` and `router` of a run; names as in Hugging Face's TrainingArguments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from proper_ds.model.config import ATTENTION, LoraSettings
from proper_ds.section import Section

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Examples = Literal["history", "queries"]
Users = Literal["train", "all"]


class OptimSettings(Section):
    """AdamW and its schedule (Loshchilov and Hutter 2019)."""

    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: Schedule = "cosine"
    lr_scheduler_kwargs: dict[str, float | str] = {}
    """More for the schedule, as Hugging Face's `get_scheduler` takes it, such as `{min_lr_rate: 0.1}`."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    """Exactly so many warm-up steps instead of `warmup_ratio`."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient norm to clip at; 0 turns clipping off."""
    num_train_epochs: int = Field(default=1, ge=1)


class RankTraining(OptimSettings):
    """A stage that runs on ranks under DeepSpeed."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Examples that a rank runs at once. They can be more where examples must go to certain ranks (`group.num_blocks`
    with expert parallelism, `joint`) and a step has many for the same; a warning says how many."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)
    """Examples of one optimizer step over all ranks, whatever their number; ranks then accumulate as often as it takes.
    By default the product of the two above and `distributed.num_ranks`."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and run the layer again in the backward pass: less memory, a third more work."""
    max_steps: int | None = Field(default=None, ge=1)
    """Exactly so many optimizer steps instead of `num_train_epochs`, going round the data as often as needed."""
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=100, ge=1)
    """A checkpoint every so many optimizer steps: what the loss of a rank can cost."""
    save_total_limit: int = Field(default=2, ge=1)
    """Keep so many checkpoints, the newest; a damaged one is passed over for the one before it."""
    train_on: list[Examples] = ["history", "queries"]
    """`history`: items of the users' histories; `queries`: questions with their answers."""

    def global_batch_size(self, num_ranks: int) -> int:
        """Examples of one optimizer step over all ranks."""
        if self.train_batch_size is not None:
            return self.train_batch_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_ranks

    def num_micro_batches(self, num_ranks: int) -> int:
        """Micro-batches that each rank runs in one optimizer step."""
        return -(-self.global_batch_size(num_ranks) // (num_ranks * self.per_device_train_batch_size))

    @property
    def by_length(self) -> bool:
        """Whether a step's examples are of similar length, so that little is padded."""
        return True

    @field_validator("train_on")
    @classmethod
    def _something(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give `history`, `queries` or both, each once")
        return value


RUN_ONLY = (
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "gradient_checkpointing",
    "max_damaged_share",
)
"""Settings of rank stages that say how they run, not what is learned."""


def learned_by(section: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage on ranks, as JSON values, that its result depends on."""
    # where a global batch is given, how it is dealt to ranks is rounding
    dealt = ("per_device_train_batch_size", "gradient_accumulation_steps")
    idle = dealt if section["train_batch_size"] is not None else ("train_batch_size",)
    return {name: value for name, value in section.items() if name not in (*RUN_ONLY, *idle)}


class PackedTraining(RankTraining):
    """A stage on ranks whose rows may hold several examples."""

    packing: bool = False
    """Draw a step's examples at random instead of by similar length, and put several, which do not see each other, into
    a row as long as the longest. For bases that take 4-D masks, and whose window is not shorter than an example."""

    @property
    def by_length(self) -> bool:
        """See RankTraining."""
        return not self.packing


class PopulationConfig(PackedTraining):
    """Stage 1: one LoRA over everybody's data (PROPER, section 3.2; released code: attention, r 8, alpha 16)."""

    lora: LoraSettings = LoraSettings(r=8, lora_alpha=16, target_modules=ATTENTION)
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


PROPER_ONLY = {
    "users",
    "top_k",
    "num_blocks",
    "divide_by_experts",
    "gate",
    "user_vector",
    "constraint_weight",
    "balance_weight",
    "user_vector_size",
    "history_dropout",
    "generic_user_probability",
}
"""Settings of the group stage that `proper-released` knows nothing of."""


class GroupConfig(PackedTraining):
    """Stage 2: a mixture of LoRA experts with a user-aware router (PROPER, section 3.3)."""

    lora: LoraSettings = LoraSettings()
    num_experts: int = Field(default=5, ge=2)
    top_k: int | None = Field(default=None, ge=1)
    """`proper` only: experts of a token; None: all of them, as PROPER has it. For hundreds of groups and more."""
    num_blocks: int | None = Field(default=None, ge=2)
    """`proper` only: cut the experts into so many blocks and give each user one, by likeness of histories. With expert
    parallelism a user's examples go to the rank that owns the block, and no token crosses ranks."""
    divide_by_experts: bool = False
    """`proper` only: multiply the experts' sum by 1/N, as the released code does and the paper does not."""
    gate: Literal["tokens_and_user", "user"] = "tokens_and_user"
    """`proper` only: what the user-aware gates depend on; `user` gives a user the same gates at every token."""
    user_vector: Literal["encoder", "table"] = "encoder"
    """`proper` only: made from the user's history, also for users never seen; or a learned row per user."""
    users: Users = "train"
    """Whose examples teach the experts in `proper`. With a row per user (`user_vector: table`, `proper-released`) it is
    all users."""
    constraint_weight: float = Field(default=0.01, ge=0)
    """`proper` only: weight of the constraint that makes each user's mean gate one-hot."""
    balance_weight: float = Field(default=0.01, ge=0)
    """`proper` only: weight of the term that keeps users from all choosing one expert."""
    user_vector_size: int = Field(default=32, ge=1)
    """`proper` only: width of the user vector."""
    history_dropout: float = Field(default=0.8, ge=0, lt=1)
    """`proper` with the encoder: a training row's user vector forgets a random share, up to this, of the history."""
    generic_user_probability: float = Field(default=0.05, ge=0, lt=1)
    """`proper` only: how often a training row forgets its user, so that the generic user is learned too."""


class UserConfig(OptimSettings):
    """Stage 3.1: one LoRA per user on the frozen groups (PROPER, section 3.4), or without groups (OPPU)."""

    lora: LoraSettings = LoraSettings()
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Rounded up to whole steps, of which a user with little history has few; the first warm-up step learns nothing."""
    start: Literal["fresh", "learned"] = "fresh"
    """Where the adapters of `start.adapter_sets` start: `fresh` (A at random, B zero), or `learned` over the training
    users by a stage of its own (section `start`, whose settings take the place of some of these)."""
    users: Literal["all", "needed"] = "all"
    """`needed`: only users that are evaluated, and those that a set's LoRA-aware router, or `merged`, learns from."""
    only_changed: bool = False
    """Keep the shared stages although the data changed; train only users whose history changed, and new ones."""
    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Items of one user in one of that user's optimizer steps: what it would be if the user trained alone."""
    min_steps: int = Field(default=0, ge=0)
    """Users with little history repeat their epochs until they have made so many optimizer steps."""
    max_history_items: int | None = Field(default=None, ge=1)
    """Train on a user's newest so many items only."""
    rank_by_history: dict[int, int] | None = None
    """`{1: 2, 10: 4, 50: 8}`: users with at least so many items get this LoRA rank; the largest is `lora.r`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End a user whose mean loss has not fallen for so many epochs (as Hugging Face's EarlyStoppingCallback)."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """By how much an epoch's loss must fall to count."""
    share_prefix: bool = True
    """Run the tokens that all items of a user begin with once a step, which changes nothing (but with `lora_dropout`:
    they have one mask then). Off for bases that take no 4-D masks, or whose window is shorter than an item."""
    cache_bytes: int = Field(default=1 << 30, ge=0)
    """With `lora.layers`: memory for the states of the layers below, which are run once a user; 0 runs them always."""
    num_slots: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """Users trained side by side on one device; `auto`: as many as fit a quarter of a GPU's memory, 64 on CPUs."""
    num_tokens_per_batch: int = Field(default=1024, ge=16)
    """Padded tokens in one forward pass; a user's step may take several."""

    @field_validator("rank_by_history")
    @classmethod
    def _ranks(cls, value: dict[int, int] | None) -> dict[int, int] | None:
        if value is not None and (1 not in value or min(value) < 1 or min(value.values()) < 1):
            raise ValueError("give ranks of at least 1 by numbers of items from 1 on, such as {1: 2, 10: 4}")
        return value

    def rank_of(self, num_items: int) -> int:
        """The LoRA rank of a user with so many items."""
        if self.rank_by_history is None:
            return self.lora.r
        return self.rank_by_history[max(least for least in self.rank_by_history if least <= max(1, num_items))]


OPTIMISED = (
    *OptimSettings.model_fields,
    "per_device_train_batch_size",
    "min_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
)
"""Settings of the user stage that a set of adapters may have of its own: they say how an adapter is optimised, not
which numbers it has or who has one."""
REPLACED = ("learning_rate", "num_train_epochs", "min_steps")
"""Settings of the user stage that a learned start has its own of, called `user_...`."""


class StartConfig(RankTraining):
    """The learned start of users' LoRAs (`user.start: learned`), and how users train from there.

    A batch counts users. Each learns from the history as in the user stage, then answers the training questions.
    """

    adapter_sets: list[Literal["proper", "OPPU"]] = ["proper"]
    """Sets of adapters that start from a learned one; each set has its own. OPPU is published without; `[proper, OPPU]`
    tells what is PROPER's groups and what is the start."""
    learning_rate: float = Field(default=3e-3, gt=0)
    factor_learning_rate: float = Field(default=0.1, gt=0)
    """Of the logarithms of step sizes and shrinkage, under the same schedule."""
    prior_items: float = Field(default=1.0, gt=0)
    """At first a user with n items keeps n / (n + prior_items) of what was learned from them; learned from there."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    num_train_epochs: int = Field(default=2, ge=1)
    train_on: list[Examples] = ["queries"]
    """Only `queries`: a start is judged by questions about items that are newer than the history."""
    max_history_items: int = Field(default=32, ge=1)
    """Training users learn from their newest so many items here, to save time."""
    short_history_probability: float = Field(default=0.5, ge=0, le=1)
    """How often a training user learns from some items only, of a number drawn log-uniformly up to all."""
    user_learning_rate: float = Field(default=3e-3, gt=0)
    """Takes the place of `user.learning_rate`; what is learned multiplies it."""
    user_num_train_epochs: int = Field(default=1, ge=1)
    """Takes the place of `user.num_train_epochs`."""
    user_min_steps: int = Field(default=5, ge=0)
    """Takes the place of `user.min_steps`: from a learned start fewer steps are needed than from a fresh one."""

    @field_validator("adapter_sets")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give `proper`, `OPPU` or both, each once")
        return value

    @field_validator("train_on")
    @classmethod
    def _questions_only(cls, value: list[str]) -> list[str]:
        if value != ["queries"]:
            raise ValueError("a start is judged by questions alone: leave it out, or give [queries]")
        return value

    def for_users(self, user: UserConfig) -> UserConfig:
        """The settings of users that train from the learned start."""
        return user.model_copy(update={name: getattr(self, f"user_{name}") for name in REPLACED})


class RouterConfig(RankTraining):
    """Stage 3.2: the LoRA-aware router, shared by all users (PROPER, section 3.4)."""

    train_on: list[Examples] = ["queries"]
    users: Users = "train"
    """Whose examples and adapters teach the router."""
    max_users: int | None = Field(default=10_000, ge=1)
    """Learn from a sample of so many users; null for all. Their adapters are read once before the first step."""
    max_damaged_share: float = Field(default=0.01, ge=0, le=1)
    """Users whose stored adapter cannot be read are left out, with a warning; with more of them the run ends."""


class JointConfig(RouterConfig):
    """Stages 3.1 and 3.2 together, from 3.1's adapters: a LoRA-aware router and the sampled users' adapters."""

    train_on: list[Examples] = ["history", "queries"]
    users: Users = "all"
    max_users: int | None = Field(default=1000, ge=1)
    """A sample of so many users is trained on; ranks share their adapters and moments, 12 bytes a number, in host
    memory. All others keep 3.1's adapter."""
    user_learning_rate: float = Field(default=2e-4, gt=0)
    """Of the users' adapters; it follows the same schedule. AdamW's other numbers, and `max_grad_norm`, are shared."""


class PplugConfig(RankTraining):
    """PPlug: a user token and an instruction token before a frozen base's input (arXiv 2409.11901)."""

    encoder: str | None = None
    """A sentence encoder, as a Hugging Face name or a folder; by default the frozen base's own last states."""
    encoder_revision: str | None = None
    pooling: Literal["mean", "cls"] = "mean"
    """With an encoder: the mean over a text's tokens, or its first token (BGE)."""
    query_prefix: str = ""
    """With an encoder: put before questions, as BGE asks for."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over the cosines of question and items; lower is sharper."""
    history_dropout: float = Field(default=0.5, ge=0, lt=1)
    """A training row forgets a random share, up to this, of the history."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    num_train_epochs: int = Field(default=2, ge=1)


class PloraConfig(RankTraining):
    """PLoRA: one LoRA for all users with each user's vector in its rank space (arXiv 2403.06208)."""

    lora: LoraSettings = LoraSettings(r=8, lora_alpha=16)
    user_vector_size: int = Field(default=32, ge=1)
    user_learning_rate: float = Field(default=1e-2, gt=0)
    """Of the users' vectors, which begin at zero and see few steps each; it follows the same schedule."""
    generic_user_probability: float = Field(default=0.1, ge=0, lt=1)
    """How often a training row forgets its user (personalised dropout), so that the generic user is learned too."""
    mutual_information_weight: float = Field(default=0.0, ge=0)
    """Weight of the term that brings the generic user's predictions towards the users'. Off, as in the released
    configurations: it doubles the rows of every forward pass."""


class MergeConfig(Section):
    """Method `merged`: for each user the adapters of the most similar training users, merged without training."""

    num_anchors: int = Field(default=50, ge=1)
    """So many training users, those with most history, may be merged from (MTA's and Per-Pcs' bank)."""
    num_neighbours: int = Field(default=3, ge=1)
    """Adapters in one merge."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over the cosines that weighs them."""
