# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Decode that replays a short tail of keys and values over a state that is rarely written.

Shapes: ``T`` packed tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``S`` state slots, ``C`` chunk,
``R`` rows of a ring.

The recurrent step reads and writes the whole fp32 state for every token. Here the state in a slot stays at a boundary,
and the keys and values since then (activated, in the dtype of the model) wait in a ring::

    o_t = lam^(t + 1 - b) q_t S_b + sum_{b <= j <= t} lam^(t - j) (q_t k_j) v_j          b = boundary of the slot

Once C tokens that are certain have gathered, the next call folds them into the state, one by one in the arithmetic of
the recurrent step. Between such calls a step reads the state once and writes two rows. Rejected drafts cost nothing:
the next call names a smaller position, and their rows are overwritten. (Replay of keys and values: ReplaySSM, vLLM pull
request 48018, and KVBuffer, arXiv 2605.19049, both for other recurrences.)

A ring holds the C rows that a call may fold, the drafts of the last call behind them and the new rows, none of which
may share a row: :func:`replay_ring_rows`. Token t lives in row ``t % R``.
"""

import torch
from torch import Tensor

from minimax_plugin.kernels import checks, reference
from minimax_plugin.kernels.custom_ops import outside_autocast
from minimax_plugin.kernels.dispatch import lightning_backend
from minimax_plugin.kernels.launch_config import LAUNCH_OPTIONS, LaunchConfig, on_device
from minimax_plugin.kernels.optional_triton import HAS_TRITON, tl, triton
from minimax_plugin.kernels.recurrent import decay_minus_one, load_activated, state_step, store_row

LOG2E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634

#: Most query tokens of one sequence in one call.
MAX_QUERY = 8

#: Chunks that are compiled and tested: 16 moves the fewest bytes, 64 is the chunk of the prefill kernels.
CHUNKS = (16, 64)

#: Below this number of (sequence, head) pairs a step is bound by its launch, and the recurrent form is simpler.
REPLAY_MIN_PROGRAMS = 256


def prefer_replay(num_sequences: int, num_heads: int) -> bool:
    """Rule of thumb for choosing replay over the recurrent decode; ``num_heads`` are those of one rank.

    It follows from the bytes moved (128 KiB against 72 KiB on average per head of 128 channels with C = 16) and from
    what ReplaySSM publishes for its recurrence; it was not measured for this one.
    """
    return num_sequences * num_heads >= REPLAY_MIN_PROGRAMS


def replay_ring_rows(chunk: int = 16, max_query: int = MAX_QUERY) -> int:
    """Rows R that a ring needs for calls of at most ``max_query`` tokens per sequence."""
    return chunk + 2 * max_query - 1


def next_boundary(boundary: Tensor, position: Tensor, chunk: int = 16) -> Tensor:
    """Boundaries [N] after a call with these ``boundary`` and ``position``; once per step, for all layers."""
    return boundary + chunk * (position - boundary >= chunk).to(boundary.dtype)


def lightning_decode_replay(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot_ids: Tensor,
    boundary: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    *,
    out: Tensor,
    sumsq: Tensor | None = None,
    chunk: int = 16,
    max_query: int = MAX_QUERY,
    activation: str | None = "silu",
    null_slot: int = -1,
) -> None:
    """One to eight tokens per sequence over a boundary state and a ring of keys and values.

    Positions count the tokens of a sequence from wherever the caller likes, as long as ``boundary`` and ``position``
    agree. A slot whose state was just set by a prefill starts with ``boundary = position``. After a call use
    :func:`next_boundary` for the next, and as position the number of tokens that are certain: the old one plus the
    accepted tokens of this call. Smaller positions down to ``boundary`` are allowed too.

    Args:
        qkv: [T, H, 3D], per head q, k, v; last dim contiguous, other strides free.
        slopes: [H] fp32.
        state_pool: [S, H, D, D] fp32, the states at their boundaries; folded in place.
        k_ring, v_ring: [S, R, H, D] in the dtype of qkv, contiguous, ``R >= replay_ring_rows(chunk, max_query)``.
        slot_ids: [N] int; a value not above ``null_slot`` is padding: zeros are written and nothing else is touched.
        boundary: [N] int32, tokens that the state in the slot holds, at least 0.
        position: [N] int32, certain tokens before this call, ``0 <= position - boundary < 2 * chunk``; together with
            the new tokens no more than R.
        cu_seqlens: [N + 1] int32 on the device; at most ``max_query`` tokens each. Rows of ``out`` past the last bound
            are set to zero.
        out: [T, H, D], written.
        sumsq: [T, H] fp32, written with the sum of squares of each output row as stored in ``out``.
        chunk: C, 16 or 64.
        max_query: most tokens of one sequence, 1 to 8.
        activation: "silu" or None; the result is rounded to the dtype of qkv.
        null_slot: highest value that marks padding.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on a CPU also values that are out of range.
    """
    _check(qkv, slopes, state_pool, (k_ring, v_ring), slot_ids, (boundary, position), cu_seqlens, out, sumsq, chunk)
    checks.check_activation(activation)
    if not 1 <= max_query <= MAX_QUERY:
        raise ValueError(f"max_query is {max_query}, expected 1 to {MAX_QUERY}")
    if k_ring.shape[1] < replay_ring_rows(chunk, max_query):
        raise ValueError(
            f"k_ring has {k_ring.shape[1]} rows, expected at least {replay_ring_rows(chunk, max_query)} for chunk "
            f"{chunk} and max_query {max_query}"
        )
    torch.ops.minimax_plugin.lightning_decode_replay(
        qkv,
        slopes,
        state_pool,
        k_ring,
        v_ring,
        slot_ids,
        boundary,
        position,
        cu_seqlens,
        out,
        sumsq,
        chunk,
        max_query,
        activation or "",
        null_slot,
    )


@torch.library.custom_op(
    "minimax_plugin::lightning_decode_replay", mutates_args=("state_pool", "k_ring", "v_ring", "out", "sumsq")
)
@outside_autocast
def _lightning_decode_replay(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot_ids: Tensor,
    boundary: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    chunk: int,
    max_query: int,
    activation: str,
    null_slot: int,
) -> None:
    arguments = (qkv, slopes, state_pool, k_ring, v_ring, slot_ids, boundary, position, cu_seqlens, out, sumsq)
    if qkv.device.type == "cpu":
        checks.check_slope_values(slopes)
        checks.check_slot_values("slot_ids", slot_ids.tolist(), state_pool.shape[0], null_slot)
        _check_counts(slot_ids > null_slot, boundary, position, cu_seqlens, out, k_ring.shape[1], chunk, max_query)
    if lightning_backend(qkv.device) == "triton":
        launch(*arguments, chunk=chunk, max_query=max_query, activation=activation, null_slot=null_slot)
    else:
        reference.replay_loop(*arguments, chunk=chunk, activation=activation or None, null_slot=null_slot)


_lightning_decode_replay.register_fake(lambda *args: None)


def launch(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot_ids: Tensor,
    boundary: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    *,
    chunk: int,
    max_query: int,
    activation: str,
    null_slot: int,
) -> None:
    """Launch the kernel; no synchronisation, no allocation."""
    num_tokens, num_heads, head_dim = out.shape
    num_sequences = slot_ids.shape[0]
    if num_sequences == 0:
        out.zero_()
        if sumsq is not None:
            sumsq.zero_()
        return
    constants, warps = _tile(head_dim, chunk, max_query, sumsq is not None)
    blocks = constants["BD"] // constants["BV"]
    with on_device(qkv.device):
        _decode_replay[(num_sequences * num_heads * blocks,)](
            qkv,
            slopes,
            state_pool,
            k_ring,
            v_ring,
            slot_ids,
            boundary,
            position,
            cu_seqlens,
            out,
            sumsq,
            qkv.stride(0),
            qkv.stride(1),
            state_pool.stride(0),
            k_ring.stride(0),
            k_ring.shape[1],
            out.stride(0),
            out.stride(1),
            *((0, 0) if sumsq is None else sumsq.stride()),
            null_slot,
            num_heads,
            num_sequences,
            num_tokens,
            ACT=activation == "silu",
            **constants,
            num_warps=warps,
            **LAUNCH_OPTIONS,
        )


def launch_configs(architecture: str) -> list[LaunchConfig]:
    """Every form of the kernel at the shapes of MiniMax-M1; the same on every architecture."""
    configs = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for chunk in CHUNKS:
            for max_query in (1, MAX_QUERY):
                for sumsq in (None, torch.float32):
                    constants, warps = _tile(128, chunk, max_query, sumsq is not None)
                    arguments = {
                        "qkv_ptr": dtype,
                        "slopes_ptr": torch.float32,
                        "state_ptr": torch.float32,
                        "k_ring_ptr": dtype,
                        "v_ring_ptr": dtype,
                        "slots_ptr": torch.int32,
                        "boundary_ptr": torch.int32,
                        "position_ptr": torch.int32,
                        "bounds_ptr": torch.int32,
                        "out_ptr": dtype,
                        "sumsq_ptr": sumsq,
                        "qkv_token": 64 * 384,
                        "qkv_head": 384,
                        "state_slot": 64 * 128 * 128,
                        "ring_slot": replay_ring_rows(chunk) * 64 * 128,
                        "ring_rows": replay_ring_rows(chunk),
                        "out_token": 64 * 128,
                        "out_head": 128,
                        "sumsq_token": 64,
                        "sumsq_head": 1,
                        "null_slot": -1,
                        "num_heads": 64,
                        "num_sequences": 7,
                        "num_tokens": 7 * max_query,
                    }
                    configs.append(
                        LaunchConfig(
                            name=f"replay {chunk} q{max_query} {name}{' sumsq' if sumsq else ''}",
                            kernel=_decode_replay,
                            arguments=arguments,
                            constants=constants | {"ACT": True},
                            num_warps=warps,
                        )
                    )
    return configs


def _tile(head_dim: int, chunk: int, max_query: int, whole_rows: bool) -> tuple[dict[str, int], int]:
    padded = max(16, triton.next_power_of_2(head_dim))
    columns, warps = (padded, 8) if whole_rows else (min(64, padded), 4)
    queries = triton.next_power_of_2(max_query)
    return {"D": head_dim, "BD": padded, "BV": columns, "C": chunk, "Q": queries}, warps


def _check(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    rings: tuple[Tensor, Tensor],
    slot_ids: Tensor,
    counts: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    chunk: int,
) -> None:
    checks.check_pool_call(qkv, slopes, state_pool, out, sumsq, None)
    num_sequences = slot_ids.shape[0]
    checks.check_index("slot_ids", slot_ids, (num_sequences,), qkv.device)
    checks.check_index("boundary", counts[0], (num_sequences,), qkv.device)
    checks.check_index("position", counts[1], (num_sequences,), qkv.device)
    checks.check_index("cu_seqlens", cu_seqlens, (num_sequences + 1,), qkv.device)
    if chunk not in CHUNKS:
        raise ValueError(f"chunk is {chunk}, expected one of {CHUNKS}")
    for name, ring in zip(("k_ring", "v_ring"), rings, strict=True):
        expected = (state_pool.shape[0], rings[0].shape[1], qkv.shape[1], qkv.shape[2] // 3)
        if ring.dtype != qkv.dtype or tuple(ring.shape) != expected or not ring.is_contiguous():
            raise ValueError(
                f"{name} is {ring.dtype} {tuple(ring.shape)}, expected {qkv.dtype} {expected} [S, R, H, D], contiguous"
            )


def _check_counts(
    live: Tensor,
    boundary: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    ring_rows: int,
    chunk: int,
    max_query: int,
) -> None:
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] > out.shape[0] or any(not 0 <= length <= max_query for length in lengths):
        raise ValueError(
            f"cu_seqlens is {bounds}, expected to rise from 0 to at most {out.shape[0]} in steps of at most {max_query}"
        )
    if bool((boundary[live] < 0).any()):
        raise ValueError(f"boundary is {boundary.tolist()}, expected none below 0")
    tail, new = (position - boundary)[live].tolist(), cu_seqlens.diff()[live].tolist()
    if any(not 0 <= count < 2 * chunk for count in tail):
        raise ValueError(f"position - boundary is {tail}, expected from 0 to below {2 * chunk}, twice the chunk")
    if any(old + count > ring_rows for old, count in zip(tail, new, strict=True)):
        raise ValueError(
            f"position - boundary is {tail} with {new} new tokens, expected together at most {ring_rows}, the rows of "
            "a ring"
        )


@triton.jit
def _decode_replay(
    qkv_ptr,
    slopes_ptr,
    state_ptr,
    k_ring_ptr,
    v_ring_ptr,
    slots_ptr,
    boundary_ptr,
    position_ptr,
    bounds_ptr,
    out_ptr,
    sumsq_ptr,
    qkv_token,
    qkv_head,
    state_slot,
    ring_slot,
    ring_rows,
    out_token,
    out_head,
    sumsq_token,
    sumsq_head,
    null_slot,
    num_heads,
    num_sequences,
    num_tokens,
    D: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    ACT: tl.constexpr,
):
    BLOCKS: tl.constexpr = BD // BV
    program = tl.program_id(0)
    columns = (program % BLOCKS) * BV + tl.arange(0, BV)
    head = ((program // BLOCKS) % num_heads).to(tl.int64)
    sequence = (program // (BLOCKS * num_heads)).to(tl.int64)
    out_base = out_ptr + head * out_head
    sumsq_base = None if sumsq_ptr is None else sumsq_ptr + head * sumsq_head
    zeros = tl.zeros([BV], dtype=tl.float32)

    # The rows past the last sequence (padding of a captured graph) are shared out among the sequences' programs.
    padding = tl.load(bounds_ptr + num_sequences).to(tl.int64) + sequence
    for index in range(tl.cdiv(tl.maximum(num_tokens - padding, 0), num_sequences)):
        token = padding + index * num_sequences
        sumsq_pointer = None if sumsq_base is None else sumsq_base + token * sumsq_token
        store_row(out_base + token * out_token, sumsq_pointer, columns, zeros, D)

    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    length = tl.minimum(tl.load(bounds_ptr + sequence + 1).to(tl.int64) - start, Q)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot <= null_slot:
        for index in range(length):
            token = start + index
            sumsq_pointer = None if sumsq_base is None else sumsq_base + token * sumsq_token
            store_row(out_base + token * out_token, sumsq_pointer, columns, zeros, D)
        return

    dims = tl.arange(0, BD)
    slope = tl.load(slopes_ptr + head)
    tile = state_ptr + slot * state_slot + head * (D * D) + dims[:, None] * D + columns[None, :]
    inside = (dims < D)[:, None] & (columns < D)[None, :]
    state = tl.load(tile, mask=inside, other=0.0)
    k_ring = k_ring_ptr + slot * ring_slot + head * D
    v_ring = v_ring_ptr + slot * ring_slot + head * D
    ring_row = num_heads * D
    boundary = tl.load(boundary_ptr + sequence).to(tl.int64)
    position = tl.load(position_ptr + sequence).to(tl.int64)
    if position - boundary >= C:
        decrement = decay_minus_one(slope)
        for step in range(C):
            row = ((boundary + step) % ring_rows) * ring_row
            k = load_activated(k_ring + row, dims, D, False)
            v = load_activated(v_ring + row, columns, D, False)
            state = state_step(state, decrement, k, v)
        tl.store(tile, state, mask=inside)
        boundary += C
    waiting = position - boundary

    # The tail in the ring and the new tokens, as two tiles of rows with zeros behind the last one.
    tail = tl.arange(0, C)
    tail_rows = ((boundary + tail) % ring_rows)[:, None] * ring_row
    tail_keys = tl.load(
        k_ring + tail_rows + dims[None, :], mask=(tail < waiting)[:, None] & (dims < D)[None, :], other=0.0
    )
    tail_values = tl.load(
        v_ring + tail_rows + columns[None, :], mask=(tail < waiting)[:, None] & (columns < D)[None, :], other=0.0
    )
    new = tl.arange(0, Q)
    new_base = qkv_ptr + start * qkv_token + head * qkv_head
    new_keys = _load_rows(new_base + D, qkv_token, new, dims, length, D, ACT)
    new_values = _load_rows(new_base + 2 * D, qkv_token, new, columns, length, D, ACT)
    slope2 = slope * -LOG2E
    for index in range(length):
        q = load_activated(new_base + index * qkv_token, dims, D, ACT)
        out = tl.sum(q[:, None] * state, axis=0) * tl.exp2(slope2 * (waiting + index + 1).to(tl.float32))
        scores = tl.sum(tail_keys.to(tl.float32) * q[None, :], axis=1)
        scores *= tl.exp2(slope2 * tl.maximum(waiting + index - tail, 0).to(tl.float32))
        out += tl.sum(scores[:, None] * tail_values.to(tl.float32), axis=0)
        scores = tl.sum(new_keys * q[None, :], axis=1)
        scores = tl.where(new <= index, scores * tl.exp2(slope2 * tl.maximum(index - new, 0).to(tl.float32)), 0.0)
        out += tl.sum(scores[:, None] * new_values, axis=0)
        token = start + index
        sumsq_pointer = None if sumsq_base is None else sumsq_base + token * sumsq_token
        store_row(out_base + token * out_token, sumsq_pointer, columns, out, D)

    # Each program stores its own columns of the new keys and values; no program of this launch reads those rows.
    new_rows = ((position + new) % ring_rows)[:, None] * ring_row + columns[None, :]
    new_inside = (new < length)[:, None] & (columns < D)[None, :]
    new_keys = _load_rows(new_base + D, qkv_token, new, columns, length, D, ACT)
    tl.store(k_ring + new_rows, new_keys.to(k_ring_ptr.dtype.element_ty), mask=new_inside)
    tl.store(v_ring + new_rows, new_values.to(v_ring_ptr.dtype.element_ty), mask=new_inside)


@triton.jit
def _load_rows(base, row_stride, rows, columns, valid, D: tl.constexpr, ACT: tl.constexpr):
    """Rows below ``valid`` widened to fp32, the rest zero; after SiLU rounded to the stored dtype if ACT."""
    mask = (rows < valid)[:, None] & (columns < D)[None, :]
    x = tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if ACT:
        wide = (wide / (1.0 + tl.exp2(wide * -LOG2E))).to(x.dtype).to(tl.float32)
    return wide
