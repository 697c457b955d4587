# SPDX-License-Identifier: Apache-2.0
"""Lightning attention on a sequence cut into consecutive parts over ranks (LASP-2, arXiv 2502.07563).

Shapes: ``R`` ranks, ``B`` batch, ``T`` tokens of this rank, ``H`` heads, ``D`` head_dim.

Each rank computes the state that its tokens leave when they start from zeros; one all-gather of these states (4 MiB per
rank for 64 heads of 128 channels) tells every rank the state that its own tokens start from, and the rest is local. The
backward mirrors it with one all-gather of the gradients that flow back through the states. Lengths travel with the
states, so parts may differ in length and no rank synchronises with its device.

:func:`local_state`, :func:`attend`, :func:`local_gradient` and :func:`attend_backward` are the four pure pieces, for
callers with collectives of their own; :func:`context_parallel_lightning_attention` joins them with
``torch.distributed``.

The parts must be consecutive: rank r holds the tokens right before those of rank r + 1. A sharding that balances causal
softmax attention by giving each rank a piece of the head and a piece of the tail does not fit.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_plugin.kernels import checks, ops
from minimax_plugin.kernels.plan import LightningPlan


def context_parallel_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    group: Any = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """:func:`minimax_plugin.kernels.ops.lightning_attention` on this rank's part of the sequences.

    Every rank of the group must call it, and every rank must run the backward if one does: both are collective.

    Args:
        q, k, v: [B, T, H, D], or [T, H, D] of one sequence; T may differ between ranks and may be 0, the rest may not.
        slopes: [H] fp32.
        group: process group in the order of the sequence; None is the default group.
        initial_state: [B, H, D, D] or [H, D, D] fp32 before the first token of rank 0, the same on every rank.
        output_final_state: also return the state after the last token of the last rank, the same on every rank.
        precision: "default" or "high".

    Returns:
        output like v, and the final state or None. The gradients are those of the sum of all ranks' losses; that of
        ``initial_state`` is whole on every rank and must not be summed over the group again.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    checks.check_alike(q=q, k=k, v=v)
    checks.check_slopes(slopes, q.shape[-2], q.device)
    checks.check_precision(precision)
    group = dist.group.WORLD if group is None else group
    single = q.dim() == 3
    if single:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        initial_state = None if initial_state is None else initial_state.unsqueeze(0)
    if initial_state is not None:
        checks.check_state("initial_state", initial_state, q.shape[-2], q.shape[-1], q.device)
        if initial_state.shape[0] != q.shape[0]:
            raise ValueError(f"initial_state holds {initial_state.shape[0]} states, expected {q.shape[0]}")
    out, state = _ContextParallel.apply(q, k, v, slopes, initial_state, group, precision)
    if single:
        out, state = out.squeeze(0), state.squeeze(0)
    return out, state if output_final_state else None


def local_state(k: Tensor, v: Tensor, slopes: Tensor, *, precision: str = "default") -> Tensor:
    """What to gather before :func:`attend`: the state [B, H, D, D] fp32 that k, v [B, T, H, D] leave from zeros."""
    return ops.segment_state(k, v, slopes, precision=precision)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    states: Tensor,
    lengths: Tensor,
    rank: int,
    *,
    initial_state: Tensor | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of one rank given the local states of all.

    Args:
        q, k, v: [B, T, H, D] of this rank.
        states: [R, B, H, D, D] fp32, :func:`local_state` of every rank.
        lengths: [R] integers on the device of q, tokens of every rank.
        rank: which part q, k, v are.
        initial_state: [B, H, D, D] fp32 before the first token of rank 0.

    Returns:
        output [B, T, H, D], the state [B, H, D, D] that this rank started from (keep it for the backward), and the
        state after the last rank.
    """
    prefix = ops.combine_states(states, lengths, slopes, initial_state)
    out, _ = torch.ops.minimax_plugin.lightning_forward(
        *(_flat(x) for x in (q, k, v)), slopes, prefix[rank], *_plan_arguments(q), precision
    )
    return out.reshape(v.shape), prefix[rank].clone(), prefix[-1].clone()


def local_gradient(q: Tensor, grad_out: Tensor, slopes: Tensor, *, precision: str = "default") -> Tensor:
    """What to gather before :func:`attend_backward`: the gradient [B, H, D, D] fp32 of the state this rank started from
    that its own outputs cause."""
    return ops.segment_state(q, grad_out, slopes, reverse=True, precision=precision)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    start: Tensor,
    gradients: Tensor,
    lengths: Tensor,
    rank: int,
    *,
    grad_final: Tensor | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one rank given the local gradients of all.

    Args:
        grad_out: [B, T, H, D] like the output of this rank.
        start: [B, H, D, D], the state this rank started from.
        gradients: [R, B, H, D, D] fp32, :func:`local_gradient` of every rank.
        lengths: [R] integers, as in the forward.
        grad_final: [B, H, D, D] fp32, gradient of the state after the last rank, summed over all that used it.

    Returns:
        gradients of q, k, v of this rank and of the initial state.
    """
    # Seen from the end, the state gradient that enters rank r is what the ranks behind it leave.
    suffix = ops.combine_states(gradients.flip(0), lengths.flip(0), slopes, grad_final)
    dq, dk, dv, _ = torch.ops.minimax_plugin.lightning_backward(
        _flat(grad_out),
        suffix[len(lengths) - 1 - rank],
        *(_flat(x) for x in (q, k, v)),
        slopes,
        start,
        *_plan_arguments(q),
        precision,
    )
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), suffix[-1]


class _ContextParallel(torch.autograd.Function):
    """One explicit function on every rank: with a differentiable all-gather the backward of rank 0, whose start does
    not depend on any other rank, would never enter the collective that the others wait in."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial_state: Tensor | None,
        group: Any,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        local = local_state(k, v, slopes, precision=precision)
        states, lengths = _gather(local, q.shape[1], group)
        out, start, final = attend(
            q,
            k,
            v,
            slopes,
            states,
            lengths,
            dist.get_rank(group),
            initial_state=initial_state,
            precision=precision,
        )
        ctx.save_for_backward(q, k, v, slopes, start, lengths)
        ctx.group, ctx.precision, ctx.has_initial = group, precision, initial_state is not None
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, start, lengths = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        local = local_gradient(q, grad_out, slopes, precision=ctx.precision)
        # The gradients of the final state ride along, so that the backward too is one collective.
        pairs, _ = _gather(torch.stack([local, grad_final.float()]), q.shape[1], ctx.group)
        dq, dk, dv, d_initial = attend_backward(
            grad_out,
            q,
            k,
            v,
            slopes,
            start,
            pairs[:, 0],
            lengths,
            dist.get_rank(ctx.group),
            grad_final=pairs[:, 1].sum(0),
            precision=ctx.precision,
        )
        return dq, dk, dv, None, d_initial if ctx.has_initial else None, None, None


def _gather(local: Tensor, num_tokens: int, group: Any) -> tuple[Tensor, Tensor]:
    """The tensors of all ranks [R, *local.shape] and their numbers of tokens [R] int32, in one all-gather."""
    count = torch.tensor([num_tokens], dtype=torch.int32).view(torch.float32).to(local.device, non_blocking=True)
    packed = torch.cat([local.reshape(-1), count])
    gathered = packed.new_empty(dist.get_world_size(group), packed.numel())
    dist.all_gather(list(gathered.unbind(0)), packed, group=group)
    lengths = gathered[:, -1].contiguous().view(torch.int32)
    return gathered[:, :-1].reshape(-1, *local.shape), lengths


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def _plan_arguments(q: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    plan = LightningPlan.uniform(*q.shape[:2], device=q.device)
    return plan.cu_seqlens, plan.segments, plan.segment_offsets, plan.max_segments
