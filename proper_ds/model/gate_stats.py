"""What routers do with their experts, as numbers for people: how sharp gates are, who uses which expert, how alike
experts are, and what is wrong with that. Pure; group and router stages log it, the report plots it.

Shapes: X texts, M adapted modules, N experts, K experts sampled, D in-features, E out-features, r LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor

MAX_LISTED = 64
"""Longer lists over experts are logged as so many means of experts in falling order of their share."""
MAX_COMPARED = 64
"""Experts that are compared with each other, a fixed sample of them."""
COLLAPSED_SHARE, ALIKE, UNIFORM = 0.9, 0.99, 0.98
_USERS_PER_EXPERT, _FEWEST_USERS = 4, 10
"""Of fewer users than so many an expert, nobody can say which experts are left out; of fewer than ten, nothing."""


@dataclass
class GateStats:
    """Gathers what texts did with the gates, on the device, until `take`.

    Attributes:
        user: the user of each text.
        strongest_XM: each text's strongest expert in each module.
        sums: gates summed over texts, by module and expert; and the entropy of the gates, summed over texts.
    """

    num_modules: int
    num_experts: int
    user: list[int] = field(default_factory=list)
    strongest_XM: list[Tensor] = field(default_factory=list)
    sums: Tensor | None = None

    def add(self, omega_MXN: Tensor, entropy_X: Tensor, users: Sequence[int]) -> None:
        """Count texts once.

        Args:
            omega_MXN: each text's mean gates over its tokens.
            entropy_X: mean entropy of its gates over tokens and modules, in nats.
            users: the user of each text.
        """
        assert omega_MXN.shape == (self.num_modules, len(users), self.num_experts), "gates of other modules or experts"
        omega_MXN = omega_MXN.detach()
        self.user += users
        self.strongest_XM.append(omega_MXN.argmax(-1).T)
        found = torch.cat([omega_MXN.sum(1).flatten(), entropy_X.detach().sum().reshape(1)]).double()
        self.sums = found if self.sums is None else self.sums + found

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(texts [X, 1 + M]: user and strongest experts; sums [M N + 1]) since the last call; see `gate_numbers`."""
        texts = torch.zeros(0, 1 + self.num_modules, dtype=torch.int64, device=device)
        sums = torch.zeros(self.num_modules * self.num_experts + 1, dtype=torch.float64, device=device)
        if self.sums is not None:
            user_X1 = torch.tensor(self.user, dtype=torch.int64, device=device).unsqueeze(1)
            texts = torch.cat([user_X1, torch.cat(self.strongest_XM).to(device)], dim=1)
            sums = self.sums.to(device)
        self.user, self.strongest_XM, self.sums = [], [], None
        return texts, sums


def gate_numbers(texts: Tensor, sums: Tensor, num_experts: int, num_blocks: int = 1) -> dict[str, Any]:
    """The numbers of some texts; of many ranks: their texts one after another, and their sums added up.

    Every user counts alike, however many texts they have; every text has one strongest expert in each module.

    Returns:
        num_users, num_texts: how many were seen.
        entropy: of the gates, in nats; `highest_entropy` where uniform: log N, or with blocks, of which a user has one,
            the log of the experts of a block.
        num_effective: exp(entropy of the mean gates), mean over modules: N where all are used alike, 1 where one is.
        num_used: experts that are somebody's strongest, mean over modules.
        top_share: the share of users whose strongest expert is the most liked one, mean over modules.
        num_collapsed, num_modules: modules where that share is above COLLAPSED_SHARE, of so many.
        user_share, mean_gate: by expert, mean over modules; `..._by_rank` instead where there are many (MAX_LISTED).
    """
    assert len(texts), "no text was counted"
    user, strongest_XM = texts[:, 0].cpu().numpy(), texts[:, 1:].cpu().numpy()
    num_modules = strongest_XM.shape[1]
    _, inverse, count = np.unique(user, return_inverse=True, return_counts=True)
    vote_X = 1 / (count[inverse] * len(count))
    share_MN = np.stack([np.bincount(row, vote_X, num_experts) for row in strongest_XM.T])
    values = sums.cpu().numpy()
    gate_MN = values[:-1].reshape(num_modules, num_experts) / len(texts)
    logs_MN = np.log(np.maximum(gate_MN, 1e-12))
    found = {
        "num_users": len(count),
        "num_texts": len(texts),
        "entropy": float(values[-1]) / len(texts),
        "highest_entropy": math.log(num_experts // num_blocks),
        "num_effective": float(np.exp(-(gate_MN * logs_MN).sum(1)).mean()),
        "num_used": float((share_MN > 0).sum(1).mean()),
        "top_share": float(share_MN.max(1).mean()),
        "num_collapsed": int((share_MN.max(1) > COLLAPSED_SHARE).sum()),
        "num_modules": num_modules,
        "num_experts": num_experts,
    }
    lists = _listed("user_share", share_MN) | _listed("mean_gate", gate_MN)
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
    return rounded | lists


def _listed(name: str, share_MN: np.ndarray) -> dict[str, list[float]]:
    if share_MN.shape[1] <= MAX_LISTED:
        return {name: [round(float(value), 4) for value in share_MN.mean(0)]}
    falling_N = -np.sort(-share_MN, axis=1).mean(0)
    return {f"{name}_by_rank": [float(f"{part.mean():.4g}") for part in np.array_split(falling_N, MAX_LISTED)]}


def compared_experts(num_experts: int) -> list[int]:
    """Numbers of the experts that `likeness` compares: all, or a fixed sample of MAX_COMPARED."""
    if num_experts <= MAX_COMPARED:
        return list(range(num_experts))
    return sorted(np.random.default_rng(0).choice(num_experts, MAX_COMPARED, replace=False).tolist())


def likeness(experts: Iterable[tuple[Tensor, Tensor]], chosen: Sequence[int]) -> Tensor:
    """Cosines [K, K] between the updates `B_i A_i` of the chosen experts, each taken over all modules together.

    No update is ever formed: <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)). An expert without effect is like
    none, itself included.

    Args:
        experts: (A [N, r, D], B [N, E, r]) of each module.
    """
    gram_KK = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for a_NrD, b_NEr in experts:
        a_KrD = a_NrD[list(chosen)].double().cpu()
        b_KrE = b_NEr[list(chosen)].double().cpu().transpose(1, 2)
        r = a_KrD.shape[1]
        a_ZD, b_ZE = a_KrD.flatten(0, 1), b_KrE.flatten(0, 1)  # Z = K r
        product = (a_ZD @ a_ZD.T) * (b_ZE @ b_ZE.T)
        gram_KK += product.view(len(chosen), r, len(chosen), r).sum((1, 3))
    length_K = gram_KK.diagonal().clamp_min(0).sqrt()
    inverse_K = torch.where(length_K > 0, 1 / length_K, torch.zeros_like(length_K))
    return (gram_KK * inverse_K[:, None] * inverse_K[None, :]).clamp(-1, 1)


def likeness_numbers(cosine_KK: Tensor, chosen: Sequence[int]) -> dict[str, Any]:
    """What is logged of `likeness`: `mean`, `max` and `most_alike` of all pairs, and the matrix itself."""
    first, second = np.triu_indices(len(chosen), 1)
    pairs = cosine_KK.numpy()[first, second]
    top = int(pairs.argmax())
    return {
        "experts": list(chosen),
        "mean": round(float(pairs.mean()), 6),
        "max": round(float(pairs[top]), 6),
        "most_alike": [chosen[first[top]], chosen[second[top]]],
        "num_alike": int((pairs > ALIKE).sum()),
        "cosine": [[round(value, 3) for value in row] for row in cosine_KK.tolist()],
    }


def gate_problems(numbers: dict[str, Any], alike: dict[str, Any] | None, section: str, is_steered: bool) -> list[str]:
    """What is wrong at the end of a stage, each with what to change; empty where experts are used as they should be.

    Args:
        numbers: of `gate_numbers`.
        alike: of `likeness_numbers`, where the stage trained the experts.
        section: the stage's section in the configuration.
        is_steered: whether constraint and balance reach the weights.
    """
    num_experts, problems = numbers["num_experts"], []
    mends = _Mends(section, is_steered)
    highest = numbers["highest_entropy"]
    if highest and numbers["entropy"] > UNIFORM * highest:
        problems.append(
            f"gates stayed uniform (entropy {numbers['entropy']:.3f} of at most {highest:.3f}), so"
            f" everybody gets nearly the same mixture; {mends.uniform}"
        )
    elif 2 * numbers["num_collapsed"] >= numbers["num_modules"] and numbers["num_users"] >= _FEWEST_USERS:
        problems.append(
            f"experts collapsed: in {numbers['num_collapsed']} of {numbers['num_modules']} modules one expert is the"
            f" strongest of more than {COLLAPSED_SHARE:.0%} of {numbers['num_users']} users; {mends.collapsed}"
        )
    elif numbers["num_used"] < num_experts / 2 and numbers["num_users"] >= _USERS_PER_EXPERT * num_experts:
        problems.append(
            f"experts lie idle: of {num_experts}, {numbers['num_used']:.1f} a module are the strongest of any of"
            f" {numbers['num_users']} users; {mends.collapsed}"
        )
    if alike is not None and alike["num_alike"]:
        one, other = alike["most_alike"]
        problems.append(
            f"experts are alike: {alike['num_alike']} pairs with a cosine above {ALIKE}, the nearest {one} and {other}"
            f" with {alike['max']:.3f}; {mends.alike}"
        )
    return problems


@dataclass(frozen=True)
class _Mends:
    """What to change, by what is wrong."""

    section: str
    is_steered: bool

    @property
    def uniform(self) -> str:
        if self.section != "group":
            return f"raise {self.section}.learning_rate or num_train_epochs, or keep the user-aware gates (-user-gates)"
        more = "raise group.constraint_weight, group.learning_rate or group.num_train_epochs"
        return more if self.is_steered else f"{_RELEASED} raise group.learning_rate or num_train_epochs"

    @property
    def collapsed(self) -> str:
        if self.section != "group":
            return f"lower {self.section}.learning_rate, or keep the user-aware gates (-user-gates)"
        less = "raise group.balance_weight, or lower group.constraint_weight or group.num_experts"
        return less if self.is_steered else f"{_RELEASED} lower group.learning_rate or group.num_experts"

    @property
    def alike(self) -> str:
        less = "lower group.num_experts, or raise group.constraint_weight, so that users part"
        return less if self.is_steered else f"{_RELEASED} lower group.num_experts"


_RELEASED = "the released constraint has no gradient, use preset proper, or"
