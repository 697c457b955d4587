# SPDX-License-Identifier: Apache-2.0
"""Lightning attention: the public functions, their dispatch and their registration as torch custom operators.

Shapes: ``B`` batch, ``T`` tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``S`` state slots, ``G`` plan segments.

* :func:`lightning_attention` and :func:`lightning_attention_packed`: functional, differentiable (training, and
  inference without a cache).
* :func:`lightning_prefill`, :func:`lightning_decode`, :func:`lightning_verify`: in place on a pool of slots (serving,
  and Hugging Face generation). A slot not above ``null_slot`` is padding: zeros are written to its output rows and no
  state is touched.
* :func:`gated_rmsnorm`: the norm over all heads and the sigmoid gate that follow.

The recurrent state is fp32 ``[*, H, D_k, D_v]``, slopes are fp32 ``[H]``. Every function is one node for torch.compile.
The backend is chosen by device: Triton kernels on CUDA and ROCm, the chunk loop of
:mod:`minimax_plugin.kernels.reference` elsewhere; ``MINIMAX_LIGHTNING_BACKEND=torch|triton`` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_plugin.kernels import reference

#: Name space of the custom operators.
NAMESPACE = "minimax_plugin"

#: Tokens of one parallel segment of the Triton prefill; the batch-invariant grid is fixed to it.
SEGMENT = 1024

BACKEND_VARIABLE = "MINIMAX_LIGHTNING_BACKEND"


@dataclass(frozen=True)
class LightningPlan:
    """How the tokens of one step are cut into sequences and segments; built once per step, shared by all layers.

    Attributes:
        cu_seqlens: [N + 1] int32 on the device of the tokens, from 0 to T.
        segments: [G, 3] int32, rows ``(sequence, start, stop)``, in time order within each sequence, none empty.
        segment_offsets: [N + 1] int32; the segments of sequence n are rows ``segment_offsets[n]`` up to
            ``segment_offsets[n + 1]``.
        max_segments: largest number of segments of one sequence (host integer).
    """

    cu_seqlens: Tensor
    segments: Tensor
    segment_offsets: Tensor
    max_segments: int

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        num_computed: Tensor | Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        segment: int = SEGMENT,
    ) -> LightningPlan:
        """Plan from host metadata: no device synchronisation, one upload.

        Segment borders lie on multiples of ``segment`` counted from the absolute position 0 of each sequence, so they
        depend on nothing but the sequence itself.

        Args:
            cu_seqlens: [N + 1] integers on the host, starting at 0, never decreasing.
            num_computed: [N] tokens of each sequence that are already in its state; None means none.
            device: where the kernels will run.
            segment: tokens of a segment, a positive multiple of the chunk of 64.

        Raises:
            ValueError: the lengths or the segment size are not as described.
        """
        if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"LightningPlan.build got cu_seqlens on {cu_seqlens.device}, expected host memory: reading it from the "
                "device would synchronise every step"
            )
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        if not bounds or bounds[0] != 0:
            raise ValueError(f"cu_seqlens starts with {bounds[:1]}, expected [0]")
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"cu_seqlens decreases somewhere: {bounds}")
        if segment <= 0 or segment % reference.CHUNK:
            raise ValueError(f"segment is {segment}, expected a positive multiple of {reference.CHUNK}")
        num_sequences = len(bounds) - 1
        computed = num_computed.tolist() if isinstance(num_computed, Tensor) else list(num_computed or [0] * num_sequences)
        if len(computed) != num_sequences or any(n < 0 for n in computed):
            raise ValueError(f"num_computed is {computed}, expected {num_sequences} integers >= 0")
        rows: list[tuple[int, int, int]] = []
        offsets = [0]
        for n in range(num_sequences):
            start, stop = bounds[n], bounds[n + 1]
            while start < stop:
                position = computed[n] + start - bounds[n]
                end = min(stop, start + segment - position % segment)
                rows.append((n, start, end))
                start = end
            offsets.append(len(rows))
        return cls(
            cu_seqlens=_upload(bounds, device),
            segments=_upload(rows, device).reshape(-1, 3),
            segment_offsets=_upload(offsets, device),
            max_segments=max((b - a for a, b in zip(offsets, offsets[1:], strict=False)), default=0),
        )

    @classmethod
    def uniform(
        cls, batch: int, length: int, *, device: torch.device | str = "cpu", segment: int = SEGMENT
    ) -> LightningPlan:
        """Plan of ``batch`` sequences of ``length`` tokens each, made on the device and traceable by torch.compile."""
        per_sequence = (length + segment - 1) // segment
        index = torch.arange(batch * per_sequence, device=device, dtype=torch.int32)
        sequence = torch.div(index, max(per_sequence, 1), rounding_mode="floor")
        start = sequence * length + (index - sequence * per_sequence) * segment
        stop = torch.minimum(start + segment, (sequence + 1) * length)
        bounds = torch.arange(batch + 1, device=device, dtype=torch.int32)
        return cls(bounds * length, torch.stack([sequence, start, stop], dim=1), bounds * per_sequence, per_sequence)


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
        plan: a plan built before from the same bounds; spares building it again.
        precision: "default" (bf16 dots for bf16 inputs on a GPU) or "high" (state exact to 1e-6).

    Returns:
        output like v, and the final states [N, H, D, D] fp32 or None.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; the message says what was found and expected.
    """
    _check_qkv(q, k, v)
    _check_slopes(slopes, q.shape[-2], q.device)
    if precision not in ("default", "high"):
        raise ValueError(f"precision is {precision!r}, expected 'default' or 'high'")
    if q.dim() == 4:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is only for packed [T, H, D] inputs, got q of shape " + str(tuple(q.shape)))
        batch, length = q.shape[:2]
        plan = plan or LightningPlan.uniform(batch, length, device=q.device)
        flat = [x.reshape(batch * length, *x.shape[2:]) for x in (q, k, v)]
        o, state = _attention(*flat, slopes, initial_state, plan, output_final_state, precision)
        return o.reshape(v.shape), state
    if plan is None:
        bounds: Tensor | Sequence[int] = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens
        plan = LightningPlan.build(bounds, device=q.device)
        if int(bounds[-1]) != q.shape[0]:
            raise ValueError(f"cu_seqlens ends with {int(bounds[-1])}, expected the number of tokens {q.shape[0]}")
    return _attention(q, k, v, slopes, initial_state, plan, output_final_state, precision)


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
    """:func:`lightning_attention` on the projection output ``[B, T, H, 3D]`` or ``[T, H, 3D]`` (per head q, k, v)."""
    _check_activation(activation)
    if qkv.dim() not in (3, 4) or qkv.shape[-1] % 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected [B, T, H, 3 * D] or [T, H, 3 * D]")
    q, k, v = reference.split_packed(qkv, activation)
    return lightning_attention(
        q,
        k,
        v,
        slopes,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        plan=plan,
        precision=precision,
    )


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
        has_initial: [N] bool; False starts from zeros whatever the slot holds.
        plan: segments of the T tokens.
        out: [T, H, D], written.
        sumsq: [T, H] fp32, written with the sum of squares of each output row as stored in ``out``.
        checkpoint_slots: [G] int32 or int64; the state after each plan segment is also stored there if above
            ``null_slot``.
        activation: "silu" or None; the result is rounded to the dtype of qkv as the released module does.
        precision: "default" or "high", see :func:`lightning_attention`.
        null_slot: highest value that marks padding (-1, or 0 where slot 0 is a null block).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    num_sequences = plan.num_sequences
    _check_index("slot_ids", slot_ids, (num_sequences,))
    if has_initial.dtype != torch.bool or has_initial.shape != (num_sequences,):
        raise ValueError(
            f"has_initial is {has_initial.dtype} {tuple(has_initial.shape)}, expected torch.bool ({num_sequences},)"
        )
    if checkpoint_slots is not None:
        _check_index("checkpoint_slots", checkpoint_slots, (plan.segments.shape[0],))
    torch.ops.minimax_plugin.lightning_prefill(
        qkv,
        slopes,
        state_pool,
        slot_ids,
        has_initial,
        plan.cu_seqlens,
        plan.segments,
        plan.segment_offsets,
        plan.max_segments,
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
    _check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    _check_index("slot_ids", slot_ids, (qkv.shape[0],))
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
        read_slots: [N] int; slot to start from, zeros if not above ``null_slot``.
        write_slots: [N, Q] int; slot for the state after token j. Padding if the first is not above ``null_slot``.
        cu_seqlens: [N + 1] int32 on the device; no sequence longer than Q. Rows of ``out`` past the last bound (the
            padding of a captured graph) are set to zero.

    The rest is as for :func:`lightning_prefill`.
    """
    _check_pool_call(qkv, slopes, state_pool, out, sumsq, activation)
    num_sequences = read_slots.shape[0]
    _check_index("read_slots", read_slots, (num_sequences,))
    _check_index("write_slots", write_slots, (num_sequences, write_slots.shape[-1]))
    _check_index("cu_seqlens", cu_seqlens, (num_sequences + 1,))
    torch.ops.minimax_plugin.lightning_verify(
        qkv, slopes, state_pool, read_slots, write_slots, cu_seqlens, out, sumsq, activation or "", null_slot
    )


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
    """
    if o.shape != gate.shape or weight.shape != o.shape[-1:]:
        raise ValueError(
            f"gated_rmsnorm got o {tuple(o.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}; expected "
            "o and gate alike and weight of their last dim"
        )
    return reference.gated_rmsnorm_torch(o, gate, weight, eps, sumsq=sumsq, norm_size=norm_size)


def lightning_backend(device: torch.device) -> str:
    """Backend that serves tensors on ``device``: "triton" or "torch".

    Raises:
        RuntimeError: ``MINIMAX_LIGHTNING_BACKEND`` forces one that cannot run here.
        ValueError: the variable holds another word.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "auto")
    if forced not in ("auto", "torch", "triton"):
        raise ValueError(f"{BACKEND_VARIABLE} is {forced!r}, expected 'auto', 'torch' or 'triton'")
    if forced == "triton":
        raise RuntimeError(f"{BACKEND_VARIABLE}=triton, but this build has no Triton kernels; unset it")
    return "torch"


def _upload(values: Sequence[int] | Sequence[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.int32)
    target = torch.device(device)
    if target.type == "cpu":
        return tensor
    return tensor.pin_memory().to(target, non_blocking=True)


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}, expected 'silu' or None")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() not in (3, 4):
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [B, T, H, D] or [T, H, D]")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected like q: {q.dtype} {tuple(q.shape)} on "
                f"{q.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v are {q.dtype}, expected a floating dtype")


def _check_slopes(slopes: Tensor, num_heads: int, device: torch.device) -> None:
    if slopes.dtype != torch.float32 or slopes.shape != (num_heads,) or slopes.device != device:
        raise ValueError(
            f"slopes are {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}, expected torch.float32 "
            f"({num_heads},) on {device}"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int, ...]) -> None:
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape) != shape:
        raise ValueError(f"{name} is {index.dtype} {tuple(index.shape)}, expected int32 or int64 {shape}")


def _check_state(name: str, state: Tensor, heads: int, head_dim: int) -> None:
    if state.dtype != torch.float32:
        raise ValueError(
            f"{name} is {state.dtype}, expected torch.float32: a bf16 state reaches a relative error of 0.42 after "
            "8,192 decode steps, an fp16 state 1.9e-2 (docs/kernels.md)"
        )
    if state.dim() != 4 or state.shape[1:] != (heads, head_dim, head_dim):
        raise ValueError(f"{name} has shape {tuple(state.shape)}, expected [*, {heads}, {head_dim}, {head_dim}]")


def _check_pool_call(
    qkv: Tensor, slopes: Tensor, state_pool: Tensor, out: Tensor, sumsq: Tensor | None, activation: str | None
) -> None:
    _check_activation(activation)
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected [T, H, 3 * D]")
    num_tokens, num_heads, head_dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    _check_slopes(slopes, num_heads, qkv.device)
    _check_state("state_pool", state_pool, num_heads, head_dim)
    if tuple(state_pool.stride()[1:]) != (head_dim * head_dim, head_dim, 1):
        raise ValueError(f"state_pool has strides {state_pool.stride()}, expected each slot [H, D, D] contiguous")
    if out.shape != (num_tokens, num_heads, head_dim):
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {(num_tokens, num_heads, head_dim)}")
    if sumsq is not None and (sumsq.dtype != torch.float32 or sumsq.shape != (num_tokens, num_heads)):
        raise ValueError(
            f"sumsq is {sumsq.dtype} {tuple(sumsq.shape)}, expected torch.float32 {(num_tokens, num_heads)}"
        )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    plan: LightningPlan,
    output_final_state: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    if initial_state is not None:
        _check_state("initial_state", initial_state, q.shape[-2], q.shape[-1])
        if initial_state.shape[0] != plan.num_sequences:
            raise ValueError(f"initial_state holds {initial_state.shape[0]} states, expected {plan.num_sequences}")
    o, state = torch.ops.minimax_plugin.lightning_forward(
        q, k, v, slopes, initial_state, plan.cu_seqlens, plan.segments, plan.segment_offsets, plan.max_segments, precision
    )
    return o, state if output_final_state else None


def _scan_sequences(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, cu_seqlens: Tensor, out: Tensor, *, reverse: bool
) -> None:
    table = reference.DecayTable(slopes)
    bounds = cu_seqlens.tolist()
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        reference.chunk_scan(q[rows], k[rows], v[rows], state[n], out[rows], table, reverse=reverse)


@torch.library.custom_op(f"{NAMESPACE}::lightning_forward", mutates_args=())
def _lightning_forward(
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
    lightning_backend(q.device)
    state = _initial_states(q, initial_state, cu_seqlens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _scan_sequences(q, k, v, slopes, state, cu_seqlens, out, reverse=False)
    return out, state


@_lightning_forward.register_fake
def _(q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision):  # type: ignore[no-untyped-def]
    state = q.new_empty((cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], q.shape[2]), dtype=torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), state


@torch.library.custom_op(f"{NAMESPACE}::lightning_backward", mutates_args=())
def _lightning_backward(
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
    """Three scans with permuted roles, see :mod:`minimax_plugin.kernels.reference`."""
    lightning_backend(q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    forward_state = _initial_states(q, initial_state, cu_seqlens).transpose(2, 3).contiguous()
    _scan_sequences(grad_o, v, k, slopes, forward_state, cu_seqlens, dq, reverse=False)
    carry = _initial_states(q, grad_state, cu_seqlens)
    carry_t = carry.transpose(2, 3).contiguous()
    _scan_sequences(v, grad_o, q, slopes, carry_t, cu_seqlens, dk, reverse=True)
    _scan_sequences(k, q, grad_o, slopes, carry, cu_seqlens, dv, reverse=True)
    return dq, dk, dv, carry


@_lightning_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_o, grad_state, q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision
):
    state = q.new_empty((cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], q.shape[2]), dtype=torch.float32)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, state


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets, max_segments, precision = inputs
    ctx.save_for_backward(q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets)
    ctx.max_segments, ctx.precision = max_segments, precision


def _backward(ctx, grad_o, grad_state):  # type: ignore[no-untyped-def]
    q, k, v, slopes, initial_state, cu_seqlens, segments, segment_offsets = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    dq, dk, dv, ds0 = torch.ops.minimax_plugin.lightning_backward(
        grad_o.contiguous(),
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


_lightning_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::lightning_prefill", mutates_args=("state_pool", "out", "sumsq"))
def _lightning_prefill(
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
    lightning_backend(qkv.device)
    reference.prefill_loop(
        qkv,
        slopes,
        state_pool,
        slot_ids.tolist(),
        has_initial.tolist(),
        segments.tolist(),
        out,
        activation=activation or None,
        checkpoint_slots=None if checkpoint_slots is None else checkpoint_slots.tolist(),
        null_slot=null_slot,
    )
    _store_sumsq(out, sumsq)


@torch.library.custom_op(f"{NAMESPACE}::lightning_decode", mutates_args=("state_pool", "out", "sumsq"))
def _lightning_decode(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    activation: str,
    null_slot: int,
) -> None:
    lightning_backend(qkv.device)
    reference.decode_loop(
        qkv, slopes, state_pool, slot_ids.tolist(), out, activation=activation or None, null_slot=null_slot
    )
    _store_sumsq(out, sumsq)


@torch.library.custom_op(f"{NAMESPACE}::lightning_verify", mutates_args=("state_pool", "out", "sumsq"))
def _lightning_verify(
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
    lightning_backend(qkv.device)
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


for _op in (_lightning_prefill, _lightning_decode, _lightning_verify):
    _op.register_fake(lambda *args: None)


def _initial_states(like: Tensor, state: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    if state is not None:
        return state.float().clone(memory_format=torch.contiguous_format)
    head_dim = like.shape[-1]
    shape = (cu_seqlens.shape[0] - 1, like.shape[-2], head_dim, head_dim)
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def _store_sumsq(out: Tensor, sumsq: Tensor | None) -> None:
    if sumsq is not None:
        sumsq.copy_(out.float().square().sum(-1))
