"""Attention among texts that stand in one row: each token sees its own text up to itself, and no other text.

Used wherever rows hold several texts: packed rows of shared stages, items of one user behind a common beginning.
Shapes: R rows, T tokens.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def text_mask(text_RT: Tensor, dtype: torch.dtype, shared: int | None = None) -> Tensor:
    """What is added to attention scores, [R, 1, T, T]: 0 where a token (row) sees another (column), else very small.

    Args:
        text_RT: each token's text; padding has a number of its own, so that it sees something, too.
        shared: the number of tokens that all texts of their row see.
    """
    num = text_RT.shape[1]
    key, query = text_RT[:, None, :], text_RT[:, :, None]
    seen = key == query if shared is None else (key == query) | (key == shared)
    seen = seen & torch.ones(num, num, dtype=torch.bool, device=key.device).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype, device=key.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return hidden.unsqueeze(1)
