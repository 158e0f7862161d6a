"""A user's own labels as a prior over the answers of a closed label set: the smallest user level there is, some counts.

`prior_fit.py` learns its two numbers from the training users' questions; `predict_job.py` answers with it.
Shapes: Q questions, L labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from proper_ds.files import write_json_atomic

PRIOR = "prior.json"
"""The file, in the folder of stage `prior/<level>`."""
PRIOR_ITEMS = np.geomspace(0.1, 100, 25)
WEIGHTS = np.arange(0, 31) / 20
"""What is tried; 1 is Bayes' rule for a model that knows nothing of the user, 0 leaves the model's answers alone."""


@dataclass(frozen=True)
class LabelPrior:
    """A Dirichlet prior around everybody's labels, and how much it counts beside the model.

    A user with counts c of n labels has shares `rho = (c + prior_items * share) / (n + prior_items)`, the mean of the
    Dirichlet posterior; an answer y is then as likely as `p(y | question) (rho_y / share_y)^weight`.

    Attributes:
        labels: in the task's order.
        share: of each label among the training users' history items, each counted once more than it occurs.
        prior_items: as many items as everybody's shares are worth.
        weight: exponent of what the user's own shares say beyond everybody's.
        num_questions: it was learned from.
        nll_before, nll_after: mean negative log-likelihood of those questions' golds in nats, without it and with it.
        nll_shares: the same of everybody's shares alone, which know no question.
    """

    labels: tuple[str, ...]
    share: tuple[float, ...]
    prior_items: float
    weight: float
    num_questions: int
    nll_before: float
    nll_after: float
    nll_shares: float

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"prior_items {self.prior_items:.3g}, weight {self.weight:.2f} from {self.num_questions} questions:"
            f" {self.nll_before:.3f} nats a question without, {self.nll_after:.3f} with it, {self.nll_shares:.3f} by"
            " everybody's shares alone"
        )

    @property
    def is_level_worse(self) -> bool:
        """Whether the level that is weighed is farther from the golds than shares that know no question."""
        return self.nll_before > self.nll_shares

    def weighed(self, scores_L: Sequence[float], own: Sequence[str]) -> list[float]:
        """The log-likelihood of each label [L], up to a number, for a user with these labels; unchanged without any."""
        counts_QL, share_L = np.asarray([counts_of(own, self.labels)]), np.asarray(self.share)
        ratio_L = log_ratio(counts_QL, share_L, self.prior_items)[0]
        found: list[float] = (np.asarray(scores_L) + self.weight * ratio_L).tolist()
        return found


def counts_of(own: Sequence[str], labels: Sequence[str]) -> list[int]:
    """How often each label occurs among a user's own [L]."""
    return [sum(label == given for given in own) for label in labels]


def log_ratio(counts_QL: np.ndarray, share_L: np.ndarray, prior_items: float) -> np.ndarray:
    """log(rho / share) [Q, L]; see LabelPrior."""
    rho_QL = (counts_QL + prior_items * share_L) / (counts_QL.sum(-1, keepdims=True) + prior_items)
    found: np.ndarray = np.log(rho_QL) - np.log(share_L)
    return found


def fit_prior(
    labels: Sequence[str], share_L: np.ndarray, scores_QL: np.ndarray, counts_QL: np.ndarray, gold_Q: np.ndarray
) -> LabelPrior:
    """The prior under which the golds are likeliest; of equals the one that changes least.

    Args:
        share_L: everybody's shares, none of them 0.
        scores_QL: the model's log-likelihood of each label, up to a number a question.
        counts_QL: the asked users' own labels.
        gold_Q: positions of the golds.
    """
    assert len(gold_Q) and (share_L > 0).all(), "somebody is asked, and every label may occur"

    def nll(ratio_QL: np.ndarray, weight: float) -> float:
        logits_QL = scores_QL + weight * ratio_QL
        top_Q1 = logits_QL.max(-1, keepdims=True)
        norm_Q = (top_Q1 + np.log(np.exp(logits_QL - top_Q1).sum(-1, keepdims=True)))[:, 0]
        return float((norm_Q - logits_QL[np.arange(len(gold_Q)), gold_Q]).mean())

    before = nll(np.zeros_like(scores_QL), 0.0)
    best = (before, float(PRIOR_ITEMS[-1]), 0.0)
    for prior_items in PRIOR_ITEMS[::-1]:
        ratio_QL = log_ratio(counts_QL, share_L, float(prior_items))
        for weight in WEIGHTS[1:]:
            found = nll(ratio_QL, float(weight))
            if found < best[0] - 1e-9:
                best = (found, float(prior_items), float(weight))
    after, items, weight = best
    shares = float(-np.log(share_L[gold_Q]).mean())
    return LabelPrior(tuple(labels), tuple(share_L.tolist()), items, weight, len(gold_Q), before, after, shares)


def save_priors(folder: Path, priors: Mapping[str, LabelPrior]) -> None:
    """Write the priors by task."""
    write_json_atomic(folder / PRIOR, {task: asdict(prior) for task, prior in priors.items()})


def load_priors(folder: Path) -> dict[str, LabelPrior]:
    """The priors of a finished stage, by task."""
    raw = json.loads((folder / PRIOR).read_text(encoding="utf-8"))
    return {
        task: LabelPrior(**about | {"labels": tuple(about["labels"]), "share": tuple(about["share"])})
        for task, about in raw.items()
    }
