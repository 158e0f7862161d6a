"""Answers for many users at once: label scoring and greedy generation over rows that each have their own adapter.

Pure functions of a model and prompts; `predict_job.py` feeds them.
Shapes: R rows, T tokens, L labels, K scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import backbone

Tensor = torch.Tensor


def score_labels(model: PersonalModel, prompts: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability [R, L] of each label, end token included, after each prompt; rows must be set on the model.

    One pass a row: the labels' tokens follow the prompt side by side, each label seeing the prompt and itself only
    (a tree mask), at the positions where it would stand alone.
    """
    tree = _LabelTree(labels)
    device = model.device
    num_prompt_R = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(num_prompt_R.max())
    ids_RT = torch.zeros(len(prompts), width + tree.size, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids_RT[row, : len(prompt)] = torch.from_numpy(prompt).to(device)
    ids_RT[:, width:] = torch.tensor(tree.ids, device=device)
    position_RT = torch.arange(width, device=device).expand(len(prompts), -1)
    depth_T = torch.tensor(tree.depth, device=device)
    position_RT = torch.cat([position_RT, num_prompt_R[:, None] + depth_T], dim=1)
    mask_RTT = tree.mask(num_prompt_R, width)
    kind = model.lm.dtype
    bias = torch.zeros(mask_RTT.shape, dtype=kind, device=device).masked_fill(~mask_RTT, torch.finfo(kind).min)
    with torch.no_grad():
        states = backbone(model.lm)(
            input_ids=ids_RT, position_ids=position_RT, attention_mask=bias.unsqueeze(1), use_cache=False
        ).last_hidden_state
        return _label_scores(model, states, num_prompt_R, width, tree)


class _LabelTree:
    """The labels' tokens in one line; the last token of each is only predicted, never read."""

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [list(label) for label in labels]
        self.ids = [token for label in self.labels for token in label[:-1]]
        self.depth = [depth for label in self.labels for depth in range(len(label) - 1)]
        self._owner = [number for number, label in enumerate(self.labels) for _ in label[:-1]]

    @property
    def size(self) -> int:
        return len(self.ids)

    def mask(self, num_prompt_R: Tensor, width: int) -> Tensor:
        """[R, T, T], True where a token is seen; padding between prompt and labels is seen by nobody but itself."""
        device = num_prompt_R.device
        owner = torch.tensor(self._owner, device=device)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        own = (owner[:, None] == owner) & torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril()
        total = width + self.size
        mask_RTT = torch.zeros(len(num_prompt_R), total, total, dtype=torch.bool, device=device)
        mask_RTT[:, :width, :width] = causal
        mask_RTT[:, width:, width:] = own
        in_prompt_RT = torch.arange(width, device=device) < num_prompt_R[:, None]
        mask_RTT[:, width:, :width] = in_prompt_RT[:, None, :]
        return mask_RTT


def _label_scores(model: PersonalModel, states: Tensor, num_prompt_R: Tensor, width: int, tree: _LabelTree) -> Tensor:
    num_rows, device = len(num_prompt_R), num_prompt_R.device
    # position -1 of the tree stands for the prompt's last token, which predicts every label's first
    at, label_K, target_K, offset = [], [], [], 0
    for number, label in enumerate(tree.labels):
        for depth, token in enumerate(label):
            at.append(-1 if depth == 0 else offset + depth - 1)
            label_K.append(number)
            target_K.append(token)
        offset += len(label) - 1
    wanted = sorted(set(at))
    column = {place: n for n, place in enumerate(wanted)}
    places = torch.tensor(wanted, device=device)
    positions = torch.where(places < 0, num_prompt_R[:, None] - 1, width + places.clamp_min(0))
    rows = torch.arange(num_rows, device=device)[:, None].expand_as(positions)
    logits = model.logits_at(states, rows.reshape(-1), positions.reshape(-1)).float()
    logp = logits.log_softmax(-1).view(num_rows, len(wanted), -1)
    columns = torch.tensor([column[place] for place in at], device=device)
    found_RK = logp[:, columns, torch.tensor(target_K, device=device)]
    scores_RL = torch.zeros(num_rows, len(tree.labels), device=device)
    return scores_RL.index_add_(1, torch.tensor(label_K, device=device), found_RK)


def generate(model: PersonalModel, prompts: Sequence[np.ndarray], max_new_tokens: int, eos: int) -> list[list[int]]:
    """Greedy continuations of each prompt, as token ids; rows must be set on the model."""
    from transformers import GenerationConfig

    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids_RT = torch.full((len(prompts), width), eos, dtype=torch.int64, device=device)
    mask_RT = torch.zeros_like(ids_RT)
    for row, prompt in enumerate(prompts):
        ids_RT[row, width - len(prompt) :] = torch.from_numpy(prompt).to(device)
        mask_RT[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos, use_cache=True
    )
    with torch.no_grad():
        out = model.lm.generate(input_ids=ids_RT, attention_mask=mask_RT, generation_config=settings)
    continued: list[list[int]] = out[:, width:].tolist()
    return continued


def decide(scores_L: Sequence[float], labels: Sequence[str], ordinal_median: bool) -> str:
    """The answer that label scores stand for: the likeliest label, or the median of their distribution over ratings."""
    if not ordinal_median:
        return labels[int(np.argmax(scores_L))]
    order = sorted(range(len(labels)), key=lambda i: float(labels[i]))
    scores = np.asarray([scores_L[i] for i in order], dtype=np.float64)
    share = np.exp(scores - scores.max())
    cumulative = np.cumsum(share / share.sum())
    return labels[order[int(np.searchsorted(cumulative, 0.5))]]
