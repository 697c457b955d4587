# SPDX-License-Identifier: Apache-2.0
"""The state-cache adapter: slot-indexed fp32 recurrent state of one lightning layer.

A :class:`StatePool` is the one way from a model to the in-place kernels. Who owns the memory differs: a Hugging Face
cache layer allocates a pool with one slot per batch row, vLLM hands over a view of its block pool. Neither loops over
sequences nor synchronises with the device.

Shapes: ``S`` slots, ``N`` sequences, ``T`` packed tokens, ``H`` heads of this rank, ``D`` head_dim, ``Q`` tokens of
one sequence in speculative decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_plugin.architecture import WHY_FP32_STATE
from minimax_plugin.kernels import ops
from minimax_plugin.kernels.ops import LightningPlan


class StatePool:
    """Recurrent states ``[S, H, D_k, D_v]`` of one lightning layer, fp32.

    Args:
        states: the memory; each slot contiguous, any stride between slots (vLLM pads its pages). Never copied.
        null_slot: highest slot number that means padding: -1 where every slot is usable, 0 where slot 0 is a null
            block that padding rows point to.

    Raises:
        ValueError: the memory is not fp32 or not laid out as ``[S, H, D, D]``.
    """

    def __init__(self, states: Tensor, *, null_slot: int = -1) -> None:
        if states.dtype != torch.float32:
            raise ValueError(f"the lightning state is {states.dtype}, expected torch.float32: {WHY_FP32_STATE}")
        if states.dim() != 4 or states.shape[2] != states.shape[3]:
            raise ValueError(f"the lightning state has shape {tuple(states.shape)}, expected [slots, H, D, D]")
        head_dim = states.shape[3]
        if states.shape[0] and tuple(states.stride()[1:]) != (head_dim * head_dim, head_dim, 1):
            raise ValueError(f"the lightning state has strides {states.stride()}, expected every slot contiguous")
        self.states = states
        self.null_slot = null_slot

    @classmethod
    def allocate(
        cls, num_slots: int, num_heads: int, head_dim: int, *, device: torch.device | str = "cpu"
    ) -> StatePool:
        """A pool of its own, every state zero."""
        return cls(torch.zeros(num_slots, num_heads, head_dim, head_dim, dtype=torch.float32, device=device))

    @property
    def num_slots(self) -> int:
        return self.states.shape[0]

    def prefill(
        self,
        qkv: Tensor,
        slopes: Tensor,
        slot_ids: Tensor,
        has_initial: Tensor,
        plan: LightningPlan,
        *,
        out: Tensor,
        sumsq: Tensor | None = None,
        checkpoint_slots: Tensor | None = None,
    ) -> None:
        """Packed prompts or chunks of prompts, see :func:`minimax_plugin.kernels.ops.lightning_prefill`."""
        ops.lightning_prefill(
            qkv,
            slopes,
            self.states,
            slot_ids,
            has_initial,
            plan,
            out=out,
            sumsq=sumsq,
            checkpoint_slots=checkpoint_slots,
            null_slot=self.null_slot,
        )

    def decode(
        self, qkv: Tensor, slopes: Tensor, slot_ids: Tensor, *, out: Tensor, sumsq: Tensor | None = None
    ) -> None:
        """One token per sequence, see :func:`minimax_plugin.kernels.ops.lightning_decode`."""
        ops.lightning_decode(qkv, slopes, self.states, slot_ids, out=out, sumsq=sumsq, null_slot=self.null_slot)

    def verify(
        self,
        qkv: Tensor,
        slopes: Tensor,
        read_slots: Tensor,
        write_slots: Tensor,
        cu_seqlens: Tensor,
        *,
        out: Tensor,
        sumsq: Tensor | None = None,
    ) -> None:
        """Up to Q tokens per sequence, see :func:`minimax_plugin.kernels.ops.lightning_verify`."""
        ops.lightning_verify(
            qkv,
            slopes,
            self.states,
            read_slots,
            write_slots,
            cu_seqlens,
            out=out,
            sumsq=sumsq,
            null_slot=self.null_slot,
        )
