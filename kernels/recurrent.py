# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Lightning attention token by token in Triton: decode, and the verification of drafted tokens.

Shapes: ``T`` packed tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``Q`` most tokens of one sequence,
``S`` state slots.

A program holds one [D, BV] tile of the state of one head of one sequence, so the state is read once and written once.
The launches read nothing on the host, allocate nothing and do not synchronise: they can be captured in a CUDA graph and
replayed with other slots. The tile depends on the head_dim only, never on the batch, so a sequence gets the same bits
in any batch. The rules of :mod:`minimax_plugin.kernels.lightning` on 16-bit arithmetic and offsets hold here too.
"""

import torch
from torch import Tensor

from minimax_plugin.kernels.launch_config import LAUNCH_OPTIONS, LaunchConfig, on_device
from minimax_plugin.kernels.optional_triton import HAS_TRITON, tl, triton

LOG2E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634

#: Columns of the state that one program holds, and its warps. Without the sum of squares, which needs whole rows, more
#: and smaller programs fill a GPU from fewer sequences.
SPLIT_TILE = (32, 4)
WHOLE_ROW_WARPS = 8


def decode(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    *,
    activation: str,
    null_slot: int,
) -> None:
    """Launch :func:`minimax_plugin.kernels.ops.lightning_decode`, whose arguments these are, already checked."""
    num_tokens, num_heads, head_dim = out.shape
    if num_tokens == 0:
        return
    constants, warps = _tile(head_dim, sumsq is not None)
    blocks = constants["BD"] // constants["BV"]
    with on_device(qkv.device):
        _decode[(num_tokens * num_heads * blocks,)](
            qkv,
            slopes,
            state_pool,
            slot_ids,
            out,
            sumsq,
            qkv.stride(0),
            qkv.stride(1),
            state_pool.stride(0),
            out.stride(0),
            out.stride(1),
            *_sumsq_strides(sumsq),
            slot_ids.stride(0),
            null_slot,
            num_heads,
            ACT=activation == "silu",
            **constants,
            num_warps=warps,
            **LAUNCH_OPTIONS,
        )


def verify(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    *,
    activation: str,
    null_slot: int,
) -> None:
    """Launch :func:`minimax_plugin.kernels.ops.lightning_verify`, whose arguments these are, already checked."""
    num_tokens, num_heads, head_dim = out.shape
    num_sequences, max_query = write_slots.shape
    if num_sequences == 0:
        out.zero_()
        if sumsq is not None:
            sumsq.zero_()
        return
    constants, warps = _tile(head_dim, sumsq is not None)
    blocks = constants["BD"] // constants["BV"]
    with on_device(qkv.device):
        _verify[(num_sequences * num_heads * blocks,)](
            qkv,
            slopes,
            state_pool,
            read_slots,
            write_slots,
            cu_seqlens,
            out,
            sumsq,
            qkv.stride(0),
            qkv.stride(1),
            state_pool.stride(0),
            out.stride(0),
            out.stride(1),
            *_sumsq_strides(sumsq),
            read_slots.stride(0),
            write_slots.stride(0),
            write_slots.stride(1),
            null_slot,
            num_heads,
            num_sequences,
            num_tokens,
            max_query,
            ACT=activation == "silu",
            **constants,
            num_warps=warps,
            **LAUNCH_OPTIONS,
        )


def launch_configs(architecture: str) -> list[LaunchConfig]:
    """Every form of the kernels here at the shapes of MiniMax-M1; the same on every architecture."""
    configs = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for sumsq in (None, torch.float32):
            constants, warps = _tile(128, sumsq is not None)
            common = {"qkv_ptr": dtype, "slopes_ptr": torch.float32, "state_ptr": torch.float32}
            strides = {
                "out_ptr": dtype,
                "sumsq_ptr": sumsq,
                "qkv_token": 64 * 384,
                "qkv_head": 384,
                "state_slot": 64 * 128 * 128,
                "out_token": 64 * 128,
                "out_head": 128,
                "sumsq_token": 64,
                "sumsq_head": 1,
            }
            suffix = f"{name} sumsq" if sumsq else name
            configs.append(
                LaunchConfig(
                    name=f"decode {suffix}",
                    kernel=_decode,
                    arguments=common
                    | {"slots_ptr": torch.int32}
                    | strides
                    | {"slots_stride": 1, "null_slot": -1, "num_heads": 64},
                    constants=constants | {"ACT": True},
                    num_warps=warps,
                )
            )
            configs.append(
                LaunchConfig(
                    name=f"verify {suffix}",
                    kernel=_verify,
                    arguments=common
                    | {"read_ptr": torch.int32, "write_ptr": torch.int32, "bounds_ptr": torch.int32}
                    | strides
                    | {"read_stride": 1, "write_row": 4, "write_column": 1, "null_slot": -1, "num_heads": 64}
                    | {"num_sequences": 7, "num_tokens": 28, "max_query": 4},
                    constants=constants | {"ACT": True},
                    num_warps=warps,
                )
            )
    return configs


def _tile(head_dim: int, whole_rows: bool) -> tuple[dict[str, int], int]:
    padded = max(16, triton.next_power_of_2(head_dim))
    columns, warps = (padded, WHOLE_ROW_WARPS) if whole_rows else SPLIT_TILE
    return {"D": head_dim, "BD": padded, "BV": min(columns, padded)}, warps


def _sumsq_strides(sumsq: Tensor | None) -> tuple[int, int]:
    return (0, 0) if sumsq is None else (sumsq.stride(0), sumsq.stride(1))


@triton.jit
def decay_minus_one(slope):
    """``exp(-slope) - 1`` to the last bit of fp32, by its series for slopes below 1.

    The exponential of a GPU is off by up to 2^-22. That is nothing once, but the slowest heads of the model multiply
    it up over 20,000 steps, always in the same direction.
    """
    series = slope * 0.0 + 1.0
    for n in tl.static_range(0, 9):
        series = 1.0 - series * slope * (1.0 / (10 - n))
    return tl.where(slope < 1.0, -slope * series, tl.exp2(slope * -LOG2E) - 1.0)


@triton.jit
def state_step(state, decrement, k, v):
    """The state [D, BV] after one more token; ``decrement`` is :func:`decay_minus_one` of the slope."""
    return state + (state * decrement + k[:, None] * v[None, :])


@triton.jit
def load_activated(base, columns, D: tl.constexpr, ACT: tl.constexpr):
    """One row of q, k or v widened to fp32, after SiLU rounded to the stored dtype if ACT."""
    x = tl.load(base + columns, mask=columns < D, other=0.0)
    wide = x.to(tl.float32)
    if ACT:
        wide = (wide / (1.0 + tl.exp2(wide * -LOG2E))).to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def store_row(out_base, sumsq_pointer, columns, row, D: tl.constexpr):
    """Store fp32 values in the dtype of ``out`` and, if a pointer is given, the sum of their squares as stored."""
    rounded = row.to(out_base.dtype.element_ty)
    tl.store(out_base + columns, rounded, mask=columns < D)
    if sumsq_pointer is not None:
        wide = rounded.to(tl.float32)
        tl.store(sumsq_pointer, tl.sum(wide * wide, axis=0))


@triton.jit
def _decode(
    qkv_ptr,
    slopes_ptr,
    state_ptr,
    slots_ptr,
    out_ptr,
    sumsq_ptr,
    qkv_token,
    qkv_head,
    state_slot,
    out_token,
    out_head,
    sumsq_token,
    sumsq_head,
    slots_stride,
    null_slot,
    num_heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ACT: tl.constexpr,
):
    BLOCKS: tl.constexpr = BD // BV
    program = tl.program_id(0)
    columns = (program % BLOCKS) * BV + tl.arange(0, BV)
    head = ((program // BLOCKS) % num_heads).to(tl.int64)
    token = (program // (BLOCKS * num_heads)).to(tl.int64)
    out_base = out_ptr + token * out_token + head * out_head
    sumsq_pointer = None if sumsq_ptr is None else sumsq_ptr + token * sumsq_token + head * sumsq_head
    slot = tl.load(slots_ptr + token * slots_stride).to(tl.int64)
    if slot <= null_slot:
        store_row(out_base, sumsq_pointer, columns, tl.zeros([BV], dtype=tl.float32), D)
        return

    dims = tl.arange(0, BD)
    row = qkv_ptr + token * qkv_token + head * qkv_head
    q = load_activated(row, dims, D, ACT)
    k = load_activated(row + D, dims, D, ACT)
    v = load_activated(row + 2 * D, columns, D, ACT)
    tile = state_ptr + slot * state_slot + head * (D * D) + dims[:, None] * D + columns[None, :]
    inside = (dims < D)[:, None] & (columns < D)[None, :]
    state = tl.load(tile, mask=inside, other=0.0)
    state = state_step(state, decay_minus_one(tl.load(slopes_ptr + head)), k, v)
    tl.store(tile, state, mask=inside)
    store_row(out_base, sumsq_pointer, columns, tl.sum(q[:, None] * state, axis=0), D)


@triton.jit
def _verify(
    qkv_ptr,
    slopes_ptr,
    state_ptr,
    read_ptr,
    write_ptr,
    bounds_ptr,
    out_ptr,
    sumsq_ptr,
    qkv_token,
    qkv_head,
    state_slot,
    out_token,
    out_head,
    sumsq_token,
    sumsq_head,
    read_stride,
    write_row,
    write_column,
    null_slot,
    num_heads,
    num_sequences,
    num_tokens,
    max_query,
    D: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
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
    length = tl.minimum(tl.load(bounds_ptr + sequence + 1).to(tl.int64) - start, max_query)
    writes = write_ptr + sequence * write_row
    if tl.load(writes) <= null_slot:
        for index in range(length):
            token = start + index
            sumsq_pointer = None if sumsq_base is None else sumsq_base + token * sumsq_token
            store_row(out_base + token * out_token, sumsq_pointer, columns, zeros, D)
        return

    dims = tl.arange(0, BD)
    tile = head * (D * D) + dims[:, None] * D + columns[None, :]
    inside = (dims < D)[:, None] & (columns < D)[None, :]
    source = tl.load(read_ptr + sequence * read_stride).to(tl.int64)
    state = tl.load(
        state_ptr + source * state_slot + tile, mask=inside & (source + dims * 0 > null_slot)[:, None], other=0.0
    )
    decrement = decay_minus_one(tl.load(slopes_ptr + head))
    for index in range(length):
        token = start + index
        row = qkv_ptr + token * qkv_token + head * qkv_head
        q = load_activated(row, dims, D, ACT)
        k = load_activated(row + D, dims, D, ACT)
        v = load_activated(row + 2 * D, columns, D, ACT)
        state = state_step(state, decrement, k, v)
        target = tl.load(writes + index * write_column).to(tl.int64)
        tl.store(state_ptr + target * state_slot + tile, state, mask=inside & (target + dims * 0 > null_slot)[:, None])
        sumsq_pointer = None if sumsq_base is None else sumsq_base + token * sumsq_token
        store_row(out_base + token * out_token, sumsq_pointer, columns, tl.sum(q[:, None] * state, axis=0), D)
