"""Dropout that is a function of (row key, token, channel, module) alone.

The same example in the same step gets the same mask whatever batch it stands in, so a user trained among others
equals that user trained alone, and a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_TOKEN, _CHANNEL, _MODULE = 0x9E3779B97F4A7C15 - (1 << 64), 0xC2B2AE3D27D4EB4F - (1 << 64), 0x165667B19E3779F9
_MIX_1, _MIX_2 = 0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64)


def _mixed(h: Tensor) -> Tensor:
    """The 64-bit finaliser of MurmurHash3 (Appleby, public domain), on wrapping int64."""
    for factor in (_MIX_1, _MIX_2):
        h = (h ^ ((h >> 33) & 0x7FFFFFFF)) * factor
    return h ^ ((h >> 33) & 0x7FFFFFFF)


def row_dropout(x_RTD: Tensor, key_R: Tensor, module: int, p: float) -> Tensor:
    """`x` with each element zeroed with probability `p` and the rest divided by `1 - p`.

    Args:
        key_R: int64 key of each row: a hash of seed, user, step and example.
        module: number of the module, so that modules draw different masks.
    """
    _, num_tokens, width = x_RTD.shape
    device = x_RTD.device
    token_T = torch.arange(num_tokens, device=device) * _TOKEN
    channel_D = torch.arange(width, device=device) * _CHANNEL
    row_R = _mixed(key_R + torch.tensor(module, device=device) * _MODULE)  # wraps, as int64 does
    hashed = _mixed(row_R[:, None, None] + token_T[:, None] + channel_D)
    keep = ((hashed >> 11) & 0xFFFFFF) >= int(p * (1 << 24))
    return x_RTD * keep / (1 - p)
