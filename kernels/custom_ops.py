# SPDX-License-Identifier: Apache-2.0
"""Lightning attention as torch custom operators: one node each for torch.compile, autograd, fake tensors.

Shapes: ``T`` packed tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``S`` state slots, ``G`` plan segments.

The operators take the tensors of a :class:`minimax_plugin.kernels.plan.LightningPlan` one by one, for an operator's
schema knows no dataclass. Each picks its backend by the device of its first tensor. Contents of index tensors are
checked on CPU only: on a GPU reading them would synchronise every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from minimax_plugin.kernels import checks, lightning, recurrent, reference
from minimax_plugin.kernels.dispatch import lightning_backend

#: Name space of the custom operators.
NAMESPACE = "minimax_plugin"

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(body: Callable[P, R]) -> Callable[P, R]:
    """Run an operator's body with autocast off: it would round the fp32 operands of every ``bmm`` to 16 bits."""

    @functools.wraps(body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return body(*args, **kwargs)

    return wrapped


@torch.library.custom_op(f"{NAMESPACE}::lightning_forward", mutates_args=())
@outside_autocast
def lightning_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, D] and final states [N, H, D, D] of packed sequences."""
    state = _states_or_zeros(q, initial_state, cu_seqlens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if lightning_backend(q.device) == "triton":
        cut = lightning.Cut(segments, segment_offsets, max_segments)
        lightning.forward(q, k, v, slopes, state, cut, out, has_initial=initial_state is not None, precision=precision)
        return out, state
    _check_values(slopes)
    _scan_sequences(q, k, v, slopes, state, cu_seqlens, out, reverse=False)
    return out, state


@lightning_forward.register_fake
def _(q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision):  # type: ignore[no-untyped-def]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _fake_states(q, cu_seqlens)


@torch.library.custom_op(f"{NAMESPACE}::lightning_backward", mutates_args=())
@outside_autocast
def lightning_backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial states: three scans with permuted roles, see ``reference``."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    cut = lightning.Cut(segments, segment_offsets, max_segments)
    carry = _gradients((dq, dk, dv), grad_o, grad_state, (q, k, v), slopes, initial_state, cu_seqlens, cut, precision)
    return dq, dk, dv, carry


@lightning_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_o, grad_state, q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision
):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, _fake_states(q, cu_seqlens)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision = inputs
    ctx.save_for_backward(q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets)
    ctx.max_segments, ctx.precision = max_segments, precision


def _backward(ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets = ctx.saved_tensors
    dq, dk, dv, ds0 = torch.ops.minimax_plugin.lightning_backward(
        torch.zeros_like(v) if grad_o is None else grad_o.contiguous(),
        grad_state,
        q,
        k,
        v,
        slopes,
        initial_state,
        cu_seqlens,
        segments,
        segment_offsets,
        ctx.max_segments,
        ctx.precision,
    )
    return dq, dk, dv, None, ds0 if initial_state is not None else None, None, None, None, None, None


lightning_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::lightning_packed_forward", mutates_args=())
@outside_autocast
def lightning_packed_forward(
    qkv: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    activation: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """:func:`lightning_forward` on the projection output [T, H, 3D]; only that is kept for the backward."""
    num_tokens, num_heads, width = qkv.shape
    out = torch.empty((num_tokens, num_heads, width // 3), dtype=qkv.dtype, device=qkv.device)
    state = _states_or_zeros(out, initial_state, cu_seqlens)
    if lightning_backend(qkv.device) == "triton":
        cut = lightning.Cut(segments, segment_offsets, max_segments)
        q, k, v = qkv.chunk(3, dim=-1)
        lightning.forward(
            q,
            k,
            v,
            slopes,
            state,
            cut,
            out,
            has_initial=initial_state is not None,
            activation=activation,
            precision=precision,
        )
        return out, state
    _check_values(slopes)
    sequences = range(cu_seqlens.shape[0] - 1)
    reference.prefill_loop(
        qkv, slopes, state, sequences, [True for _ in sequences], segments.tolist(), out, activation=activation or None
    )
    return out, state


@lightning_packed_forward.register_fake
def _(qkv, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, activation, precision):  # type: ignore[no-untyped-def]
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))
    return out, _fake_states(out, cu_seqlens)


@torch.library.custom_op(f"{NAMESPACE}::lightning_packed_backward", mutates_args=())
@outside_autocast
def lightning_packed_backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    qkv: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    activation: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection output and of the initial states; the activation is computed again."""
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    cut = lightning.Cut(segments, segment_offsets, max_segments)
    activated = reference.split_packed(qkv, activation or None)
    carry = _gradients(
        grad.chunk(3, dim=-1), grad_o, grad_state, activated, slopes, initial_state, cu_seqlens, cut, precision
    )
    return torch.ops.aten.silu_backward(grad, qkv) if activation else grad, carry


@lightning_packed_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_o, grad_state, qkv, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, activation,
    precision,
):  # fmt: skip
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), _fake_states(grad_o, cu_seqlens)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_segments, ctx.activation, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _packed_backward(ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, slopes, initial_state, *cut = ctx.saved_tensors
    if grad_o is None:
        grad_o = qkv.new_zeros((*qkv.shape[:2], qkv.shape[2] // 3))
    options = (ctx.max_segments, ctx.activation, ctx.precision)
    grad, ds0 = torch.ops.minimax_plugin.lightning_packed_backward(
        grad_o.contiguous(), grad_state, qkv, slopes, initial_state, *cut, *options
    )
    return grad, None, ds0 if initial_state is not None else None, None, None, None, None, None, None


lightning_packed_forward.register_autograd(_packed_backward, setup_context=_packed_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::lightning_segment_state", mutates_args=())
@outside_autocast
def lightning_segment_state(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    reverse: bool,
    precision: str,
) -> Tensor:
    """State [N, H, D, D] that every packed sequence leaves when it starts from zeros."""
    state = _states_or_zeros(k, None, cu_seqlens)
    if lightning_backend(k.device) == "triton":
        cut = lightning.Cut(segments, segment_offsets, max_segments)
        lightning.segment_state(k, v, slopes, state, cut, reverse=reverse, precision=precision)
        return state
    _check_values(slopes)
    bounds = cu_seqlens.tolist()
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        reference.accumulate_state(k[rows], v[rows], state[n], reference.DecayTable(slopes), reverse=reverse)
    return state


@lightning_segment_state.register_fake
def _(k, v, slopes, cu_seqlens, segments, segment_offsets, max_segments, reverse, precision):  # type: ignore[no-untyped-def]
    return _fake_states(k, cu_seqlens)


@torch.library.custom_op(f"{NAMESPACE}::lightning_prefill", mutates_args=("state_pool", "out", "sumsq"))
@outside_autocast
def lightning_prefill(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    has_initial: Tensor,
    cu_seqlens: Tensor,
    segments: Tensor,
    segment_offsets: Tensor,
    max_segments: int,
    out: Tensor,
    sumsq: Tensor | None,
    checkpoint_slots: Tensor | None,
    activation: str,
    precision: str,
    null_slot: int,
) -> None:
    slots: list[int] = []
    if qkv.device.type == "cpu":
        slots = slot_ids.tolist()
        checkpoints = [] if checkpoint_slots is None else checkpoint_slots.tolist()
        _check_values(slopes, state_pool, null_slot, slot_ids=slots, checkpoint_slots=checkpoints)
        checks.check_checkpoint_values(checkpoints, slots, null_slot)
    if lightning_backend(qkv.device) == "triton":
        lightning.prefill(
            qkv,
            slopes,
            state_pool,
            slot_ids,
            has_initial,
            lightning.Cut(segments, segment_offsets, max_segments),
            out,
            sumsq,
            checkpoint_slots,
            activation=activation,
            precision=precision,
            null_slot=null_slot,
        )
        return
    reference.prefill_loop(
        qkv,
        slopes,
        state_pool,
        slots or slot_ids.tolist(),
        has_initial.tolist(),
        segments.tolist(),
        out,
        activation=activation or None,
        checkpoint_slots=None if checkpoint_slots is None else checkpoint_slots.tolist(),
        null_slot=null_slot,
    )
    _store_sumsq(out, sumsq)


@torch.library.custom_op(f"{NAMESPACE}::lightning_decode", mutates_args=("state_pool", "out", "sumsq"))
@outside_autocast
def lightning_decode(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    activation: str,
    null_slot: int,
) -> None:
    if qkv.device.type == "cpu":
        _check_values(slopes, state_pool, null_slot, slot_ids=slot_ids.tolist())
    if lightning_backend(qkv.device) == "triton":
        recurrent.decode(qkv, slopes, state_pool, slot_ids, out, sumsq, activation=activation, null_slot=null_slot)
        return
    reference.decode_loop(
        qkv, slopes, state_pool, slot_ids.tolist(), out, activation=activation or None, null_slot=null_slot
    )
    _store_sumsq(out, sumsq)


@torch.library.custom_op(f"{NAMESPACE}::lightning_verify", mutates_args=("state_pool", "out", "sumsq"))
@outside_autocast
def lightning_verify(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    activation: str,
    null_slot: int,
) -> None:
    if qkv.device.type == "cpu":
        _check_verify_values(slopes, state_pool, read_slots, write_slots, cu_seqlens, out.shape[0], null_slot)
    if lightning_backend(qkv.device) == "triton":
        recurrent.verify(
            qkv,
            slopes,
            state_pool,
            read_slots,
            write_slots,
            cu_seqlens,
            out,
            sumsq,
            activation=activation,
            null_slot=null_slot,
        )
        return
    bounds = cu_seqlens.tolist()
    reference.verify_loop(
        qkv,
        slopes,
        state_pool,
        read_slots.tolist(),
        write_slots.tolist(),
        bounds,
        out,
        activation=activation or None,
        null_slot=null_slot,
    )
    out[bounds[-1] :] = 0
    _store_sumsq(out, sumsq)


for _op in (lightning_prefill, lightning_decode, lightning_verify):
    _op.register_fake(lambda *args: None)


def _gradients(
    grads: tuple[Tensor, ...],
    grad_o: Tensor,
    grad_state: Tensor | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    cut: lightning.Cut,
    precision: str,
) -> Tensor:
    """Write the gradients of q, k and v; return those of the initial states."""
    (dq, dk, dv), (q, k, v) = grads, qkv
    carry = _states_or_zeros(q, grad_state, cu_seqlens)
    if lightning_backend(q.device) == "triton":
        lightning.backward(grad_o, carry, q, k, v, slopes, initial_state, cut, (dq, dk, dv), precision=precision)
        return carry
    forward_state = _states_or_zeros(q, initial_state, cu_seqlens).transpose(2, 3).contiguous()
    _scan_sequences(grad_o, v, k, slopes, forward_state, cu_seqlens, dq, reverse=False)
    carry_t = carry.transpose(2, 3).contiguous()
    _scan_sequences(v, grad_o, q, slopes, carry_t, cu_seqlens, dk, reverse=True)
    _scan_sequences(k, q, grad_o, slopes, carry, cu_seqlens, dv, reverse=True)
    return carry


def _scan_sequences(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, cu_seqlens: Tensor, out: Tensor, *, reverse: bool
) -> None:
    table = reference.DecayTable(slopes)
    bounds = cu_seqlens.tolist()
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        reference.chunk_scan(q[rows], k[rows], v[rows], state[n], out[rows], table, reverse=reverse)


def _states_or_zeros(like: Tensor, state: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """A copy of the given states that may be overwritten, or zeros [N, H, D, D] fp32."""
    if state is not None:
        return state.float().clone(memory_format=torch.contiguous_format)
    return torch.zeros(_state_shape(like, cu_seqlens), dtype=torch.float32, device=like.device)


def _fake_states(like: Tensor, cu_seqlens: Tensor) -> Tensor:
    return like.new_empty(_state_shape(like, cu_seqlens), dtype=torch.float32)


def _state_shape(like: Tensor, cu_seqlens: Tensor) -> tuple[int, int, int, int]:
    return cu_seqlens.shape[0] - 1, like.shape[1], like.shape[2], like.shape[2]


def _store_sumsq(out: Tensor, sumsq: Tensor | None) -> None:
    if sumsq is not None:
        sumsq.copy_(out.float().square().sum(-1))


def _check_values(slopes: Tensor, state_pool: Tensor | None = None, null_slot: int = -1, **slots: list[int]) -> None:
    if slopes.device.type == "cpu":
        checks.check_slope_values(slopes)
    if state_pool is not None:
        for name, values in slots.items():
            checks.check_slot_values(name, values, state_pool.shape[0], null_slot)


def _check_verify_values(
    slopes: Tensor,
    state_pool: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    null_slot: int,
) -> None:
    reads = read_slots.tolist()
    checks.check_slot_values("read_slots", reads, state_pool.shape[0], null_slot, unique=False)
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > num_tokens:
        raise ValueError(f"cu_seqlens is {bounds}, expected to rise from 0 to at most {num_tokens}")
    if max(lengths, default=0) > write_slots.shape[1]:
        raise ValueError(
            f"cu_seqlens has a sequence of {max(lengths)} tokens, expected at most {write_slots.shape[1]}, one per "
            "column of write_slots"
        )
    writes = [row[:length] for row, length in zip(write_slots.tolist(), lengths, strict=True)]
    # A sequence whose first slot is padding writes none.
    writes = [row if row and row[0] > null_slot else [] for row in writes]
    _check_values(slopes, state_pool, null_slot, write_slots=[slot for row in writes for slot in row])
    writer = {slot: n for n, row in enumerate(writes) for slot in row if slot > null_slot}
    shared = sorted({slot for n, slot in enumerate(reads) if writes[n] and writer.get(slot, n) != n})
    if shared:
        raise ValueError(
            f"read_slots holds {shared}, which another sequence writes, expected others: sequences run in any order"
        )
