"""Dropout that is a function of (text key, token, channel, module) alone.

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


def token_keys(key_RT: Tensor, position_RT: Tensor) -> Tensor:
    """Keys [R, T] of tokens at these positions of texts with these keys (both int64; sums wrap).

    Args:
        key_RT: key of each token's text; or [R], one for each row that is a single text.
    """
    return (key_RT.unsqueeze(-1) if key_RT.dim() == 1 else key_RT) + position_RT * _TOKEN


def row_dropout(x_RTD: Tensor, key_RT: Tensor, module: int, p: float) -> Tensor:
    """`x` with each element zeroed with probability `p` and the rest divided by `1 - p`.

    Args:
        key_RT: key of each token, see `token_keys`; or [R], one key for each row that is a single text.
        module: number of the module, so that modules draw different masks.
    """
    device = x_RTD.device
    if key_RT.dim() == 1:
        key_RT = token_keys(key_RT, torch.arange(x_RTD.shape[1], device=device))
    channel_D = torch.arange(x_RTD.shape[-1], device=device) * _CHANNEL
    offset = (module * _MODULE + (1 << 63)) % (1 << 64) - (1 << 63)  # wraps, as int64 does
    token_RT = _mixed(key_RT + offset)
    hashed = _mixed(token_RT.unsqueeze(-1) + channel_D)
    keep = ((hashed >> 11) & 0xFFFFFF) >= int(p * (1 << 24))
    return x_RTD * keep / (1 - p)
