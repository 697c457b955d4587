# SPDX-License-Identifier: Apache-2.0
"""Lightning attention by its definition, in float64: what kernels and models are held against.

Written from the MiniMax-01 report (arXiv 2501.08313, equations 6 to 12) and free of the package under test. The whole
model of ``oracle.py`` runs on it, and so the results of the original code vouch for it.

Shapes: ``T`` tokens, ``H`` heads, ``D`` head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-slope) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``: token by token, differentiable.

    Args:
        q, k, v: [T, H, D], any floating dtype.
        slopes: [H], used as given.
        initial_state: [H, D, D], zeros by default.

    Returns:
        outputs [T, H, D] and the state [H, D, D] after the last token, both float64.
    """
    decay = slopes.double().neg().exp().view(-1, 1, 1)
    state = torch.zeros(*k.shape[1:], v.shape[-1], dtype=torch.float64, device=q.device)
    if initial_state is not None:
        state = initial_state.double()
    outputs = [torch.zeros(0, *v.shape[1:], dtype=torch.float64, device=q.device)]
    for query, key, value in zip(q.double(), k.double(), v.double(), strict=True):
        state = state * decay + torch.einsum("hk,hv->hkv", key, value)
        outputs.append(torch.einsum("hk,hkv->hv", query, state)[None])
    return torch.cat(outputs), state


def split_heads(qkv: Tensor, *, activate: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a projection ``[..., H, 3D]``, after SiLU, which rounds to the dtype of the projection."""
    if activate:
        qkv = torch.nn.functional.silu(qkv)
    size = qkv.shape[-1] // 3
    return qkv[..., :size], qkv[..., size : 2 * size], qkv[..., 2 * size :]
