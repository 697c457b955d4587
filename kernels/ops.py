# SPDX-License-Identifier: Apache-2.0
"""Lightning attention: the public functions, their dispatch and their registration as torch custom operators.

Shapes: ``B`` batch, ``T`` tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``S`` state slots, ``G`` plan segments.

* :func:`lightning_attention` and :func:`lightning_attention_packed`: functional, differentiable (training, and
  inference without a cache).
* :func:`lightning_prefill`, :func:`lightning_decode`, :func:`lightning_verify`: in place on a pool of slots (serving,
  and Hugging Face generation). A slot not above ``null_slot`` is padding: zeros are written to its output rows and no
  state is touched.
* :func:`lightning_decode_replay`: decode and verify over a state that is rarely written and a ring of recent keys and
  values, with :func:`prefer_replay`, :func:`replay_ring_rows` and :func:`next_boundary`.
* :func:`segment_state` and :func:`combine_states`: states of stretches of one sequence and how they add up (context
  parallelism).
* :func:`gated_rmsnorm`: the norm over all heads and the sigmoid gate that follow;
  :func:`single_collective_projection`: with the output projection of split heads in one all-reduce.

The recurrent state is fp32 ``[*, H, D_k, D_v]``, slopes are fp32 ``[H]``. Every function is one node for torch.compile.
The backend is chosen by device: Triton kernels on CUDA and ROCm, the chunk loop of
:mod:`minimax_plugin.kernels.reference` elsewhere; ``MINIMAX_LIGHTNING_BACKEND=torch|triton`` forces one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimax_plugin.kernels import checks, custom_ops, norm, reference
from minimax_plugin.kernels.dispatch import BACKEND_VARIABLE, lightning_backend
from minimax_plugin.kernels.norm import single_collective_projection
from minimax_plugin.kernels.plan import SEGMENT, LightningPlan, suggest_segment
from minimax_plugin.kernels.replay import lightning_decode_replay, next_boundary, prefer_replay, replay_ring_rows

__all__ = [
    "BACKEND_VARIABLE",
    "NAMESPACE",
    "SEGMENT",
    "LightningPlan",
    "combine_states",
    "gated_rmsnorm",
    "lightning_attention",
    "lightning_attention_packed",
    "lightning_backend",
    "lightning_decode",
    "lightning_decode_replay",
    "lightning_prefill",
    "lightning_verify",
    "next_boundary",
    "prefer_replay",
    "replay_ring_rows",
    "segment_state",
    "single_collective_projection",
    "suggest_segment",
]

NAMESPACE = custom_ops.NAMESPACE


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: LightningPlan | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Causal lightning attention, differentiable in q, k, v and the initial state.

    Args:
        q, k, v: [B, T, H, D], or packed sequences [T, H, D]; fp32, bf16 or fp16; last dim contiguous, else any strides.
        slopes: [H] fp32, positive.
        cu_seqlens: [N + 1] bounds of the packed sequences, host memory; only with [T, H, D], where None means one
            sequence.
        initial_state: [N, H, D, D] fp32 (N = B for [B, T, H, D]) or None for zeros.
        output_final_state: also return the states after the last token of every sequence.
        plan: a plan built before, in place of the bounds; spares building it again.
        precision: "default" (bf16 dots for bf16 inputs on a GPU) or "high" (state exact to 1e-6).

    Returns:
        output like v, and the final states [N, H, D, D] fp32 or None.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; the message says what was found and expected.
    """
    checks.check_alike(q=q, k=k, v=v)
    checks.check_slopes(slopes, q.shape[-2], q.device)
    checks.check_precision(precision)
    plan = _resolve_plan("q", q, cu_seqlens, plan)
    _check_initial_state(initial_state, plan, q.shape[-2], q.shape[-1], q.device)
    o, state = torch.ops.minimax_plugin.lightning_forward(
        *(_pack(x) for x in (q, k, v)), slopes, initial_state, *_cut(plan), precision
    )
    return o.reshape(v.shape), state if output_final_state else None


def lightning_attention_packed(
    qkv: Tensor,
    slopes: Tensor,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: LightningPlan | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """:func:`lightning_attention` on the projection output ``[B, T, H, 3D]`` or ``[T, H, 3D]`` (per head q, k, v).

    The activation is part of the operator and computed again in the backward, so that training keeps ``qkv`` only.
    """
    checks.check_activation(activation)
    checks.check_packed(qkv, (3, 4))
    num_heads, head_dim = qkv.shape[-2], qkv.shape[-1] // 3
    checks.check_slopes(slopes, num_heads, qkv.device)
    checks.check_precision(precision)
    plan = _resolve_plan("qkv", qkv, cu_seqlens, plan)
    _check_initial_state(initial_state, plan, num_heads, head_dim, qkv.device)
    o, state = torch.ops.minimax_plugin.lightning_packed_forward(
        _pack(qkv), slopes, initial_state, *_cut(plan), activation or "", precision
    )
    return o.reshape(*qkv.shape[:-1], head_dim), state if output_final_state else None


def lightning_prefill(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    has_initial: Tensor,
    plan: LightningPlan,
    *,
    out: Tensor,
    sumsq: Tensor | None = None,
    checkpoint_slots: Tensor | None = None,
    activation: str | None = "silu",
    precision: str = "default",
    null_slot: int = -1,
) -> None:
    """Prefill of packed sequences, the state of each read from and written back to its slot.

    Args:
        qkv: [T, H, 3D], per head q, k, v; last dim contiguous, other strides free.
        slopes: [H] fp32.
        state_pool: [S, H, D, D] fp32, the last three dims contiguous, any stride between slots. Updated in place; only
            the given slots are touched.
        slot_ids: [N] int32 or int64; none twice. A value not above ``null_slot`` is padding.
        has_initial: [N] bool; False starts from zeros whatever the slot holds. A sequence without tokens leaves its
            slot as it is.
        plan: segments of the T tokens.
        out: [T, H, D], written.
        sumsq: [T, H] fp32, written with the sum of squares of each output row as stored in ``out``.
        checkpoint_slots: [G] int32 or int64; the state after each plan segment is also stored there if above
            ``null_slot``. None of them may be in ``slot_ids``.
        activation: "silu" or None; the result is rounded to the dtype of qkv as the released module does.
        precision: "default" or "high", see :func:`lightning_attention`.
        null_slot: highest value that marks padding (-1, or 0 where slot 0 is a null block).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    checks.check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    checks.check_precision(precision)
    checks.check_num_tokens(plan.num_tokens, qkv.shape[0])
    num_sequences = plan.num_sequences
    checks.check_index("slot_ids", slot_ids, (num_sequences,), qkv.device)
    checks.check_has_initial(has_initial, num_sequences, qkv.device)
    if checkpoint_slots is not None:
        checks.check_index("checkpoint_slots", checkpoint_slots, (plan.segments.shape[0],), qkv.device)
    torch.ops.minimax_plugin.lightning_prefill(
        qkv,
        slopes,
        state_pool,
        slot_ids,
        has_initial,
        *_cut(plan),
        out,
        sumsq,
        checkpoint_slots,
        activation or "",
        precision,
        null_slot,
    )


def lightning_decode(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    *,
    out: Tensor,
    sumsq: Tensor | None = None,
    activation: str | None = "silu",
    null_slot: int = -1,
) -> None:
    """One token per sequence: ``qkv`` [N, H, 3D], ``slot_ids`` [N], ``out`` [N, H, D]; states updated in place.

    Arguments and errors as for :func:`lightning_prefill`. Every live slot must hold a state (no ``has_initial``).
    """
    checks.check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    checks.check_index("slot_ids", slot_ids, (qkv.shape[0],), qkv.device)
    torch.ops.minimax_plugin.lightning_decode(
        qkv, slopes, state_pool, slot_ids, out, sumsq, activation or "", null_slot
    )


def lightning_verify(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    cu_seqlens: Tensor,
    *,
    out: Tensor,
    sumsq: Tensor | None = None,
    activation: str | None = "silu",
    null_slot: int = -1,
) -> None:
    """A few tokens per sequence (speculative decoding), the state after each token kept in a slot of its own.

    Args:
        qkv: [T, H, 3D] packed tokens of all sequences.
        read_slots: [N] int; slot to start from, zeros if not above ``null_slot``. No other sequence may write it.
        write_slots: [N, Q] int; slot for the state after token j. Padding if the first is not above ``null_slot``.
        cu_seqlens: [N + 1] int32 on the device; no sequence longer than Q. Rows of ``out`` past the last bound (the
            padding of a captured graph) are set to zero.

    The rest is as for :func:`lightning_prefill`.
    """
    checks.check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    num_sequences = read_slots.shape[0]
    checks.check_index("read_slots", read_slots, (num_sequences,), qkv.device)
    checks.check_index("write_slots", write_slots, (num_sequences, write_slots.shape[-1]), qkv.device)
    checks.check_index("cu_seqlens", cu_seqlens, (num_sequences + 1,), qkv.device)
    torch.ops.minimax_plugin.lightning_verify(
        qkv, slopes, state_pool, read_slots, write_slots, cu_seqlens, out, sumsq, activation or "", null_slot
    )


def segment_state(k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool = False, precision: str = "default") -> Tensor:
    """State that a stretch of tokens leaves when it starts from zeros; not differentiable.

    With ``lam = exp(-slope)`` and L tokens counted from 0: ``sum_j lam^(L-1-j) k_j v_j^T``, or with ``reverse``
    ``sum_j lam^(j+1) k_j v_j^T``, which is what the stretch adds to the gradient of the state that enters it when q and
    the gradient of the output are given as ``k`` and ``v``.

    Args:
        k, v: [B, T, H, D] or [T, H, D].
        slopes: [H] fp32.
        reverse: see above.
        precision: "default" or "high".

    Returns:
        [B, H, D, D] or [H, D, D], fp32.
    """
    checks.check_alike(k=k, v=v)
    checks.check_slopes(slopes, k.shape[-2], k.device)
    checks.check_precision(precision)
    batch, length = k.shape[:2] if k.dim() == 4 else (1, k.shape[0])
    plan = LightningPlan.uniform(batch, length, device=k.device)
    state = torch.ops.minimax_plugin.lightning_segment_state(
        _pack(k), _pack(v), slopes, *_cut(plan), reverse, precision
    )
    return state if k.dim() == 4 else state[0]


def combine_states(
    states: Tensor, lengths: Sequence[int] | Tensor, slopes: Tensor, initial_state: Tensor | None = None
) -> Tensor:
    """States before each of R consecutive stretches and after the last one; differentiable.

    Args:
        states: [R, ..., H, D, D] fp32, what each stretch leaves when it starts from zeros (:func:`segment_state`).
        lengths: R token counts, on the host or as a tensor on the device of the states.
        slopes: [H] fp32.
        initial_state: [..., H, D, D] fp32 before the first stretch, or None for zeros.

    Returns:
        [R + 1, ..., H, D, D] fp32. For the reverse direction pass states and lengths last stretch first.
    """
    if states.dtype != torch.float32 or states.dim() < 4 or len(lengths) != states.shape[0]:
        raise ValueError(
            f"combine_states got states {states.dtype} {tuple(states.shape)} and {len(lengths)} lengths, expected "
            "torch.float32 [R, ..., H, D, D] and R lengths"
        )
    checks.check_slopes(slopes, states.shape[-3], states.device)
    running = torch.zeros_like(states[0]) if initial_state is None else initial_state
    if running.dtype != torch.float32 or running.shape != states.shape[1:]:
        raise ValueError(
            f"initial_state is {running.dtype} {tuple(running.shape)}, expected torch.float32 {tuple(states.shape[1:])}"
        )
    prefix = [running]
    for state, length in zip(states, lengths, strict=True):
        running = running * torch.exp(-slopes * length)[:, None, None] + state
        prefix.append(running)
    return torch.stack(prefix)


def gated_rmsnorm(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, sumsq: Tensor | None = None, norm_size: int | None = None
) -> Tensor:
    """``weight * o / sqrt(mean(o^2) + eps) * sigmoid(gate)`` over the last dim; differentiable.

    Args:
        o, gate: [..., H * D], gate before the sigmoid.
        weight: [H * D].
        eps: ``architecture.LIGHTNING_NORM_EPS``.
        sumsq: [...] or [..., 1] fp32 sums of squares over the whole norm, for heads that are split over ranks; None
            takes them from ``o``.
        norm_size: number of channels that ``sumsq`` covers; None means those of ``o``.

    Returns:
        like ``o``. The norm is computed in fp32 and rounded to the dtype of ``o`` before weight and gate, as the
        released module does.

    Raises:
        ValueError: shapes, devices or the dtype of ``sumsq`` do not fit, or ``norm_size`` is given without it.
    """
    checks.check_gated_norm(o, gate, weight, sumsq, norm_size)
    if lightning_backend(o.device) == "triton":
        return norm.gated_rmsnorm(o, gate, weight, eps, sumsq, norm_size or o.shape[-1])
    return reference.gated_rmsnorm_torch(o, gate, weight, eps, sumsq=sumsq, norm_size=norm_size)


def _resolve_plan(
    name: str, tokens: Tensor, cu_seqlens: Tensor | Sequence[int] | None, plan: LightningPlan | None
) -> LightningPlan:
    """The given plan, or one from the shape and the bounds; either must cover the tokens."""
    if plan is not None and cu_seqlens is not None:
        raise ValueError("got cu_seqlens and a plan, expected one of them: the plan holds the bounds it was built from")
    batched = tokens.dim() == 4
    if batched and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens is only for packed tokens [T, H, ...], got {name} of shape {tuple(tokens.shape)}")
    if plan is None and batched:
        return LightningPlan.uniform(tokens.shape[0], tokens.shape[1], device=tokens.device)
    if plan is None:
        plan = LightningPlan.build([0, tokens.shape[0]] if cu_seqlens is None else cu_seqlens, device=tokens.device)
    checks.check_num_tokens(plan.num_tokens, tokens.shape[0] * tokens.shape[1] if batched else tokens.shape[0])
    return plan


def _check_initial_state(
    state: Tensor | None, plan: LightningPlan, num_heads: int, head_dim: int, device: torch.device
) -> None:
    if state is None:
        return
    checks.check_state("initial_state", state, num_heads, head_dim, device)
    if state.shape[0] != plan.num_sequences:
        raise ValueError(f"initial_state holds {state.shape[0]} states, expected {plan.num_sequences}")


def _pack(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, *tokens.shape[-2:])


def _cut(plan: LightningPlan) -> tuple[Tensor, Tensor, Tensor, int]:
    """A plan as the operators take it."""
    return plan.cu_seqlens, plan.segments, plan.segment_offsets, plan.max_segments
