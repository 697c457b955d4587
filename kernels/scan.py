# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""The Triton kernels of the chunked scan; :mod:`minimax_plugin.kernels.lightning` launches them.

Shapes: ``T`` packed tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``G`` plan segments, ``S`` state slots.
Tiles: ``BT`` tokens of a chunk, ``BD`` the head_dim padded to a power of two, ``BV`` columns of the state in one
program.

Rules the kernels keep: fp32 state; no arithmetic in 16 bits (tiles are widened first, only matrix products take bf16
operands); no power of the decay with a positive exponent; 64-bit offsets for tokens, slots and segments; no atomics and
no autotuning, so equal inputs give equal bits.
"""

from minimax_plugin.kernels.optional_triton import HAS_TRITON, tl, triton
from minimax_plugin.kernels.recurrent import decay_minus_one

#: Small integer tensors may start anywhere in a larger one; their alignment must not compile the kernels anew.
INDEX_POINTERS = ["segments_ptr", "offsets_ptr", "slots_ptr", "has_initial_ptr"]

LOG2E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634


@triton.jit(do_not_specialize=["sumsq_block"], do_not_specialize_on_alignment=[*INDEX_POINTERS, "checkpoints_ptr"])
def chunk_scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    slopes_ptr,
    segments_ptr,
    offsets_ptr,
    state_ptr,
    starts_ptr,
    slots_ptr,
    has_initial_ptr,
    checkpoints_ptr,
    sumsq_ptr,
    q_head,
    k_head,
    v_head,
    out_head,
    state_slot,
    sumsq_block,
    null_slot,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    out_token: tl.constexpr,
    num_heads: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    ACT: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INITIAL: tl.constexpr,
    STORE: tl.constexpr,
    HIGH: tl.constexpr,
    DOT: tl.constexpr,
):
    """Outputs of one segment of one head, for BV columns of the values; what the walk leaves goes to the pool."""
    BLOCKS: tl.constexpr = BD // BV
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS) % num_heads
    segment = program // (BLOCKS * num_heads)
    sequence, start, length, before, after = _segment_row(segments_ptr, offsets_ptr, segment)
    head_wide = head.to(tl.int64)
    steps = tl.arange(0, BT)
    dims = tl.arange(0, BD)
    columns = block * BV + tl.arange(0, BV)
    out_base = out_ptr + head_wide * out_head
    sumsq_base = None if sumsq_ptr is None else sumsq_ptr + block * sumsq_block.to(tl.int64) + head
    chunks = tl.cdiv(length, BT)

    slot = _slot(slots_ptr, sequence)
    if slots_ptr is not None:  # noqa: SIM102 - a compile-time and a run-time condition
        if slot <= null_slot:
            zeros = tl.zeros([BT, BV], dtype=tl.float32)
            for chunk in range(chunks):
                _store_rows(
                    out_base, sumsq_base, start + chunk * BT, length - chunk * BT, zeros, steps, columns,
                    out_token, num_heads, D, BD,
                )  # fmt: skip
            return

    natural = tl.load(slopes_ptr + head)
    slope = natural * LOG2E
    tile = columns[None, :] * D + dims[:, None] if TRANSPOSED else dims[:, None] * D + columns[None, :]
    inside = (dims < D)[:, None] & (columns < D)[None, :]
    slot_base = state_ptr + slot * state_slot + head_wide * (D * D)
    from_slot = _from_slot(has_initial_ptr, sequence, INITIAL)
    if starts_ptr is None:  # noqa: SIM114 - a compile-time and a run-time condition
        state = tl.load(slot_base + tile, mask=inside & (dims * 0 + from_slot > 0)[:, None], other=0.0)
    elif before + after == 0:
        state = tl.load(slot_base + tile, mask=inside & (dims * 0 + from_slot > 0)[:, None], other=0.0)
    else:
        state = tl.load(starts_ptr + (segment.to(tl.int64) * num_heads + head) * (D * D) + tile, mask=inside, other=0.0)

    distance = steps[None, :] - steps[:, None] if REVERSE else steps[:, None] - steps[None, :]
    causal = tl.where(distance >= 0, tl.exp2(tl.maximum(distance, 0).to(tl.float32) * -slope), 0.0)
    for index in range(chunks):
        chunk = chunks - 1 - index if REVERSE else index
        valid = tl.minimum(length - chunk * BT, BT)
        row = start + chunk * BT
        done = (steps + 1).to(tl.float32)
        left = tl.maximum(valid - 1 - steps, 0).to(tl.float32)
        # The order of the next lines decides how many values are alive at once, hence whether registers spill.
        k = _load(k_ptr + row * k_token + head_wide * k_head, k_token, steps, dims, valid, D, BD, ACT)
        q = _load(q_ptr + row * q_token + head_wide * q_head, q_token, steps, dims, valid, D, BD, ACT)
        scores = (_dot(q, tl.trans(k), tl.zeros([BT, BT], dtype=tl.float32), DOT) * causal).to(q.dtype)
        out = _dot_wide(q, state, tl.zeros([BT, BV], dtype=tl.float32), DOT, 2 if HIGH else 1)
        out *= tl.exp2((left if REVERSE else done) * -slope)[:, None]
        v = _load(v_ptr + row * v_token + head_wide * v_head, v_token, steps, columns, valid, D, BD, ACT)
        out = _dot(scores, v, out, DOT)
        decayed = v.to(tl.float32) * tl.exp2((done if REVERSE else left) * -slope)[:, None]
        state = state * decay_minus_one(natural * valid.to(tl.float32)) + state
        state = _dot_wide(tl.trans(k), decayed, state, DOT, 3 if HIGH else 1)
        _store_rows(out_base, sumsq_base, row, valid, out, steps, columns, out_token, num_heads, D, BD)

    if STORE:
        last = (before if REVERSE else after) + dims * 0 == 0
        tl.store(slot_base + tile, state, mask=inside & last[:, None])
        if checkpoints_ptr is not None:
            checkpoint = tl.load(checkpoints_ptr + segment).to(tl.int64)
            checkpoint_base = state_ptr + checkpoint * state_slot + head_wide * (D * D)
            tl.store(checkpoint_base + tile, state, mask=inside & (dims * 0 + checkpoint > null_slot)[:, None])


@triton.jit(do_not_specialize_on_alignment=INDEX_POINTERS[:3])
def segment_state_kernel(
    k_ptr,
    v_ptr,
    starts_ptr,
    slopes_ptr,
    segments_ptr,
    offsets_ptr,
    slots_ptr,
    k_head,
    v_head,
    null_slot,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    num_heads: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACT: tl.constexpr,
    REVERSE: tl.constexpr,
    ALL: tl.constexpr,
    HIGH: tl.constexpr,
    DOT: tl.constexpr,
):
    """What one segment adds to the state; without ALL only where a later segment of its sequence needs it."""
    BLOCKS: tl.constexpr = BD // BV
    TILES: tl.constexpr = BLOCKS * (BD // BK)
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES) % num_heads
    segment = program // (TILES * num_heads)
    sequence, start, length, before, after = _segment_row(segments_ptr, offsets_ptr, segment)
    if not ALL:
        if (before if REVERSE else after) == 0:
            return
        if slots_ptr is not None:  # noqa: SIM102 - a compile-time and a run-time condition
            if tl.load(slots_ptr + sequence) <= null_slot:
                return

    head_wide = head.to(tl.int64)
    steps = tl.arange(0, BT)
    rows = (tile // BLOCKS) * BK + tl.arange(0, BK)
    columns = (tile % BLOCKS) * BV + tl.arange(0, BV)
    natural = tl.load(slopes_ptr + head)
    chunks = tl.cdiv(length, BT)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    for index in range(chunks):
        chunk = chunks - 1 - index if REVERSE else index
        valid = tl.minimum(length - chunk * BT, BT)
        row = start + chunk * BT
        power = steps + 1 if REVERSE else tl.maximum(valid - 1 - steps, 0)
        k = _load(k_ptr + row * k_token + head_wide * k_head, k_token, steps, rows, valid, D, BD, ACT)
        v = _load(v_ptr + row * v_token + head_wide * v_head, v_token, steps, columns, valid, D, BD, ACT)
        decayed = v.to(tl.float32) * tl.exp2(power.to(tl.float32) * (natural * -LOG2E))[:, None]
        state = state * decay_minus_one(natural * valid.to(tl.float32)) + state
        state = _dot_wide(tl.trans(k), decayed, state, DOT, 3 if HIGH else 1)
    base = starts_ptr + (segment.to(tl.int64) * num_heads + head) * (D * D)
    inside = (rows < D)[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * D + columns[None, :], state, mask=inside)


@triton.jit(do_not_specialize_on_alignment=INDEX_POINTERS)
def segment_scan_kernel(
    starts_ptr,
    state_ptr,
    slopes_ptr,
    segments_ptr,
    offsets_ptr,
    slots_ptr,
    has_initial_ptr,
    state_slot,
    null_slot,
    num_heads: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    INITIAL: tl.constexpr,
    ALL: tl.constexpr,
):
    """Turn what each segment adds into the state it starts from, in place; with ALL store the state after the last."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS) % num_heads
    sequence = program // (BLOCKS * num_heads)
    first = tl.load(offsets_ptr + sequence)
    count = tl.load(offsets_ptr + sequence + 1) - first
    if count < (0 if ALL else 2):
        return
    slot = _slot(slots_ptr, sequence)
    if slots_ptr is not None:  # noqa: SIM102 - a compile-time and a run-time condition
        if slot <= null_slot:
            return
    natural = tl.load(slopes_ptr + head)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    slot_base = state_ptr + slot * state_slot + head.to(tl.int64) * SIZE
    from_slot = _from_slot(has_initial_ptr, sequence, INITIAL)
    state = tl.load(slot_base + offsets, mask=mask & (offsets * 0 + from_slot > 0), other=0.0)
    # The loads do not depend on one another: several in flight hide the latency of a long sequence.
    for index in tl.range(0, count, num_stages=4):
        segment = first + count - 1 - index if REVERSE else first + index
        length = tl.load(segments_ptr + segment * 3 + 2) - tl.load(segments_ptr + segment * 3 + 1)
        base = starts_ptr + (segment.to(tl.int64) * num_heads + head) * SIZE
        added = tl.load(base + offsets, mask=mask, other=0.0)
        tl.store(base + offsets, state, mask=mask)
        state = state * decay_minus_one(natural * length.to(tl.float32)) + state + added
    if ALL:
        tl.store(slot_base + offsets, state, mask=mask)


@triton.jit
def _segment_row(segments_ptr, offsets_ptr, segment):
    """Sequence, first token (64 bits), length, and how many segments of the sequence come before and after."""
    row = segments_ptr + segment * 3
    sequence = tl.load(row)
    start = tl.load(row + 1)
    before = segment - tl.load(offsets_ptr + sequence)
    after = tl.load(offsets_ptr + sequence + 1) - 1 - segment
    return sequence, start.to(tl.int64), tl.load(row + 2) - start, before, after


@triton.jit
def _slot(slots_ptr, sequence):
    """Slot of a sequence, 64 bits; without slots the states lie in the order of the sequences."""
    if slots_ptr is None:
        return sequence.to(tl.int64)
    else:
        return tl.load(slots_ptr + sequence).to(tl.int64)


@triton.jit
def _from_slot(has_initial_ptr, sequence, INITIAL: tl.constexpr):
    """1 if the sequence starts from what its slot holds, 0 if it starts from zeros."""
    if INITIAL == "flags":
        return tl.load(has_initial_ptr + sequence).to(tl.int32)
    elif INITIAL == "always":
        return sequence * 0 + 1
    else:
        return sequence * 0


@triton.jit
def _load(base, row_stride, rows, columns, valid, D: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr):
    """Rows below ``valid`` of a [rows, columns] tile as a matrix operand, the rest zero.

    bf16 stays, other dtypes are widened to fp32. With ACT after SiLU, rounded to the stored dtype.
    """
    mask = (rows < valid)[:, None]
    if D != BD:
        mask = mask & (columns < D)[None, :]
    x = tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    if ACT:
        wide = x.to(tl.float32)
        x = (wide / (1.0 + tl.exp2(wide * -LOG2E))).to(x.dtype)
    return x if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def _store_rows(
    out_base, sumsq_base, first_row, valid, out, steps, columns,
    out_token: tl.constexpr, num_heads: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store the rows below ``valid`` in the dtype of the output, and the sums of their squares as stored."""
    rounded = out.to(out_base.dtype.element_ty)
    mask = (steps < valid)[:, None]
    if D != BD:
        mask = mask & (columns < D)[None, :]
    tl.store(out_base + first_row * out_token + steps[:, None] * out_token + columns[None, :], rounded, mask=mask)
    if sumsq_base is not None:
        wide = rounded.to(tl.float32)
        squares = tl.sum(wide * wide, axis=1)
        tl.store(sumsq_base + first_row * num_heads + steps * num_heads, squares, mask=steps < valid)


@triton.jit
def _dot(a, b, acc, DOT: tl.constexpr):
    """``acc + a @ b``; fp32 operands in the precision DOT."""
    if a.dtype == tl.bfloat16:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def _dot_wide(a, b, acc, DOT: tl.constexpr, PARTS: tl.constexpr):
    """``acc + a @ b`` for an fp32 ``b``; beside a bf16 ``a`` it is the sum of PARTS bf16 values."""
    if a.dtype == tl.bfloat16:
        for part in tl.static_range(PARTS):
            rounded = b.to(tl.bfloat16)
            acc = tl.dot(a, rounded, acc)
            if part + 1 < PARTS:
                b = b - rounded.to(tl.float32)
        return acc
    else:
        return tl.dot(a, b, acc, input_precision=DOT)
