# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""What the decode, verify, replay and norm kernels must do, wherever they run.

``test_recurrent_interpreter.py`` runs this file in a process of its own with ``TRITON_INTERPRET=1``,
``test_recurrent_gpu.py`` runs it on a GPU. The oracle is the float64 recurrence of ``tests/recurrence.py``.
"""

from __future__ import annotations

import mmap
import random
from typing import Any

import pytest
import torch
from recurrence import recurrence, split_heads
from torch import Tensor

from minimax_plugin.kernels import norm, recurrent, reference, replay
from minimax_plugin.kernels.optional_triton import INTERPRETED, tl, triton

if INTERPRETED:
    import interpreter_shim

    interpreter_shim.install()

DEVICE = "cpu" if INTERPRETED else "cuda"

#: The fastest head of the first layer and the slowest head of the last lightning layer of the released model.
SLOPES = (0.917, 4.95e-5)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
#: From <linux/mman.h>; not every Python's mmap module names it.
LINUX_MAP_NORESERVE = 0x4000

SUMSQ = pytest.mark.parametrize("with_sumsq", [False, True], ids=["split", "sumsq"])


def slopes() -> Tensor:
    return torch.tensor(SLOPES, dtype=torch.float32, device=DEVICE)


def tokens(count: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, len(SLOPES), 3 * head_dim).to(DEVICE, dtype)


def pool(slots: int, head_dim: int) -> Tensor:
    return torch.randn(slots, len(SLOPES), head_dim, head_dim, device=DEVICE)


def slot_tensor(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def outputs(count: int, head_dim: int, dtype: torch.dtype, with_sumsq: bool) -> tuple[Tensor, Tensor | None]:
    """Poisoned, so that a row that nobody writes is seen."""
    out = torch.full((count, len(SLOPES), head_dim), float("nan"), dtype=dtype, device=DEVICE)
    return out, torch.full(out.shape[:2], float("nan"), device=DEVICE) if with_sumsq else None


def oracle(qkv: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return recurrence(*split_heads(qkv), slopes(), state)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e}, expected at most {tolerance:.0e}"


def assert_sumsq(sumsq: Tensor | None, out: Tensor) -> None:
    if sumsq is not None:
        torch.testing.assert_close(sumsq, out.float().square().sum(-1), rtol=1e-5, atol=1e-5)


def output_error(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 3e-3


@DTYPES
@SUMSQ
@pytest.mark.parametrize("head_dim", [32, 24])
def test_decode_follows_the_recurrence(dtype: torch.dtype, with_sumsq: bool, head_dim: int) -> None:
    steps, states = 6, pool(5, head_dim)
    start, sequences, slots = states.clone(), [tokens(steps, head_dim, dtype) for _ in range(2)], slot_tensor(3, -1, 0)
    results = []
    for t in range(steps):
        padding = torch.full_like(sequences[0][t], float("nan"))
        qkv = torch.stack([sequences[0][t], padding, sequences[1][t]])
        out, sumsq = outputs(3, head_dim, dtype, with_sumsq)
        recurrent.decode(qkv, slopes(), states, slots, out, sumsq, activation="silu", null_slot=-1)
        assert not out[1].any(), "padding rows must be zero"
        assert_sumsq(sumsq, out)
        results.append(out)
    for row, slot, sequence in ((0, 3, sequences[0]), (2, 0, sequences[1])):
        expected, state = oracle(sequence, start[slot])
        assert_close("o", torch.stack([out[row] for out in results]), expected, output_error(dtype))
        assert_close("state", states[slot], state, 1e-6)
    assert torch.equal(states[[1, 2, 4]], start[[1, 2, 4]]), "slots that were not named changed"


def test_decode_ignores_the_batch_around_a_sequence() -> None:
    states, qkv = pool(4, 32), tokens(3, 32, torch.bfloat16)
    alone, batch = states.clone(), states.clone()
    batch[[0, 3]] = float("nan")
    out, _ = outputs(3, 32, torch.bfloat16, False)
    recurrent.decode(qkv, slopes(), batch, slot_tensor(0, 2, 3), out, None, activation="silu", null_slot=-1)
    single, _ = outputs(1, 32, torch.bfloat16, False)
    recurrent.decode(qkv[1:2], slopes(), alone, slot_tensor(2), single, None, activation="silu", null_slot=-1)
    assert torch.equal(out[1:2], single)
    assert torch.equal(batch[2], alone[2])


def test_decode_reads_any_strides_and_a_null_slot_of_zero() -> None:
    wide = torch.randn(2, 3, len(SLOPES), 3 * 32, device=DEVICE)
    qkv, states = wide[0], pool(3, 32)
    strided = torch.randn(3, 2, len(SLOPES), 32, 32, device=DEVICE)[:, 1].copy_(states)
    out, sumsq = outputs(3, 32, torch.float32, True)
    out_strided = torch.empty(len(SLOPES), 3, 32, device=DEVICE).transpose(0, 1)
    sumsq_strided = torch.empty(len(SLOPES), 3, device=DEVICE).t()
    slots = slot_tensor(2, 0, 1)
    recurrent.decode(qkv, slopes(), states, slots, out, sumsq, activation="", null_slot=0)
    column = torch.stack([slots, slot_tensor(7, 8, 9)], dim=1)[:, 0]
    recurrent.decode(wide[0], slopes(), strided, column, out_strided, sumsq_strided, activation="", null_slot=0)
    assert sumsq is not None and torch.equal(sumsq, sumsq_strided)
    assert torch.equal(out, out_strided) and torch.equal(states, strided)
    assert not out[1].any()


@DTYPES
@SUMSQ
def test_verify_keeps_the_state_after_every_token(dtype: torch.dtype, with_sumsq: bool) -> None:
    states, qkv = pool(8, 32), tokens(9, 32, dtype)
    start = states.clone()
    reads = slot_tensor(2, -1, 5, 6)
    writes = torch.stack([slot_tensor(2, -1, 0), slot_tensor(1, 3, 4), slot_tensor(-1, 7, 7), slot_tensor(6, 6, 6)])
    bounds = slot_tensor(0, 3, 5, 7, 7)
    out, sumsq = outputs(9, 32, dtype, with_sumsq)
    recurrent.verify(qkv, slopes(), states, reads, writes, bounds, out, sumsq, activation="silu", null_slot=-1)
    assert not out[5:].any(), "rows of padding sequences and behind the last bound must be zero"
    assert_sumsq(sumsq, out)
    after = {}
    for rows, initial, targets in (((0, 3), start[2], (2, None, 0)), ((3, 5), torch.zeros_like(start[0]), (1, 3))):
        for count, target in enumerate(targets, start=1):
            expected, state = oracle(qkv[rows[0] : rows[0] + count], initial)
            if target is not None:
                assert_close(f"state after {count} tokens", states[target], state, 1e-6)
                after[target] = state
        assert_close("o", out[slice(*rows)], expected, output_error(dtype))
    untouched = [slot for slot in range(8) if slot not in after]
    assert torch.equal(states[untouched], start[untouched])


def test_verify_reads_any_strides_and_a_null_slot_of_zero() -> None:
    states, qkv = pool(6, 32), tokens(5, 32, torch.float32)
    reads, writes, bounds = slot_tensor(1, 0), torch.stack([slot_tensor(2, 0, 3), slot_tensor(4, 5, 0)]), (0, 3, 5)
    other = states.clone()
    out, sumsq = outputs(5, 32, torch.float32, True)
    out_strided = torch.empty(len(SLOPES), 5, 32, device=DEVICE).transpose(0, 1)
    sumsq_strided = torch.empty(len(SLOPES), 5, device=DEVICE).t()
    options: dict[str, Any] = {"activation": "silu", "null_slot": 0}
    recurrent.verify(qkv, slopes(), states, reads, writes, slot_tensor(*bounds), out, sumsq, **options)
    column = torch.stack([reads, slot_tensor(7, 8)], dim=1)[:, 0]
    columns = torch.stack([writes, torch.full_like(writes, 9)], dim=2).flatten(1)[:, ::2]
    recurrent.verify(qkv, slopes(), other, column, columns, slot_tensor(*bounds), out_strided, sumsq_strided, **options)
    assert torch.equal(out, out_strided) and torch.equal(states, other)
    assert sumsq is not None and torch.equal(sumsq, sumsq_strided)
    for rows, start in ((slice(0, 3), 1), (slice(3, 5), None)):
        initial = torch.zeros_like(states[0]) if start is None else states[start]
        assert_close("o", out[rows], oracle(qkv[rows], initial)[0], 1e-6)


def test_verify_stops_at_the_last_write_slot_of_a_sequence() -> None:
    """On a GPU nobody reads the bounds; a sequence that is too long must not go on into the slots of the next."""
    states, qkv = pool(6, 32), tokens(5, 32, torch.float32)
    start, (out, _) = states.clone(), outputs(5, 32, torch.float32, False)
    writes = torch.stack([slot_tensor(1, 2), slot_tensor(-1, 5)])
    bounds = slot_tensor(0, 4, 5)
    recurrent.verify(
        qkv, slopes(), states, slot_tensor(0, 3), writes, bounds, out, None, activation="silu", null_slot=-1
    )
    expected, state = oracle(qkv[:2], start[0])
    assert_close("o", out[:2], expected, 1e-6)
    assert_close("state", states[2], state, 1e-6)
    assert torch.equal(states[[0, 3, 4, 5]], start[[0, 3, 4, 5]])


def test_verify_without_sequences_zeroes_everything() -> None:
    out, sumsq = outputs(3, 32, torch.float32, True)
    empty = torch.empty(0, dtype=torch.int32, device=DEVICE)
    recurrent.verify(
        tokens(3, 32, torch.float32),
        slopes(),
        pool(1, 32),
        empty,
        empty.reshape(0, 2),
        slot_tensor(0),
        out,
        sumsq,
        activation="",
        null_slot=-1,
    )
    assert not out.any() and sumsq is not None and not sumsq.any()


@DTYPES
@SUMSQ
@pytest.mark.parametrize("chunk", replay.CHUNKS)
def test_replay_follows_the_recurrence_through_rejected_drafts(
    dtype: torch.dtype, with_sumsq: bool, chunk: int
) -> None:
    choose, total, live = random.Random(chunk), chunk + 24, {0: 2, 2: 0}
    sequences, states, first = [tokens(total + 8, 32, dtype) for _ in range(3)], pool(3, 32), slot_tensor(0, 0, 5)
    start, boundary, position = states.clone(), first, first
    k_ring = torch.full((3, replay.replay_ring_rows(chunk), 2, 32), float("nan"), dtype=dtype, device=DEVICE)
    v_ring = k_ring.clone()
    while int((position - first).max()) < total:
        done = (position - first).tolist()
        lengths = [choose.randint(1, replay.MAX_QUERY) for _ in sequences]
        drafts = [x[begin : begin + length] for x, begin, length in zip(sequences, done, lengths, strict=True)]
        qkv = torch.cat([*drafts, torch.full_like(drafts[0][:1], float("nan"))])
        bounds = [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
        out, sumsq = outputs(sum(lengths) + 1, 32, dtype, with_sumsq)
        replay.launch(
            qkv,
            slopes(),
            states,
            k_ring,
            v_ring,
            slot_tensor(2, -1, 0),
            boundary,
            position,
            slot_tensor(*bounds),
            out,
            sumsq,
            chunk=chunk,
            max_query=replay.MAX_QUERY,
            activation="silu",
            null_slot=-1,
        )
        for row, slot in live.items():
            expected, _ = oracle(sequences[row][: done[row] + lengths[row]], start[slot])
            assert_close("o", out[bounds[row] : bounds[row + 1]], expected[done[row] :], 2 * output_error(dtype))
        assert not out[bounds[1] : bounds[2]].any() and not out[-1].any(), "padding rows must be zero"
        assert_sumsq(sumsq, out)
        boundary = replay.next_boundary(boundary, position, chunk)
        accepted = slot_tensor(*(choose.randint(1, length) for length in lengths))
        position = torch.minimum(position + accepted, first + total)
    for row, slot in live.items():
        folded = int(boundary[row] - first[row])
        assert folded >= chunk, "no chunk was folded, the test is too short"
        assert_close("state", states[slot], oracle(sequences[row][:folded], start[slot])[1], 1e-6)
    assert torch.equal(states[1], start[1])


@DTYPES
@pytest.mark.parametrize("width", [96, 256])
@pytest.mark.parametrize("given", [False, True], ids=["own-sumsq", "given-sumsq"])
def test_gated_rmsnorm_has_the_roundings_of_the_reference(dtype: torch.dtype, width: int, given: bool) -> None:
    o = torch.randn(5, 2, 2 * width).to(DEVICE, dtype)[..., :width]
    gate, weight = torch.randn(5, 2, width).to(DEVICE, dtype), torch.randn(width).to(DEVICE, dtype)
    sumsq, size = (3 * o.float().square().sum(-1), 3 * width) if given else (None, width)
    actual = norm.gated_rmsnorm(o, gate, weight, 1e-6, sumsq, size)
    expected = reference.gated_rmsnorm_torch(o, gate, weight, 1e-6, sumsq=sumsq, norm_size=size)
    assert actual.dtype == expected.dtype
    # The exponential of a GPU may differ in the last bit of fp32, which can move one rounding to bf16.
    rounding = 1e-6 if dtype == torch.float32 else 0.0 if INTERPRETED else 2**-8
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("given", "size"), [(False, 96), (True, 96), (True, 288)], ids=["own-sumsq", "given-sumsq", "of-three-ranks"]
)
def test_gated_rmsnorm_has_the_gradients_of_the_formula(given: bool, size: int) -> None:
    leaves = [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((3, 96), (3, 96), (96,))]
    if given:
        leaves.append((100 + torch.rand(3, device=DEVICE)).requires_grad_())
    o, gate, weight = leaves[:3]
    sumsq, grad = leaves[3] if given else None, torch.randn(3, 96, device=DEVICE)
    actual = torch.autograd.grad(norm.gated_rmsnorm(o, gate, weight, 1e-6, sumsq, size), leaves, grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    squares = wide[3] if given else wide[0].square().sum(-1)
    exact = wide[2] * wide[0] * torch.rsqrt(squares[:, None] / size + 1e-6) * wide[1].sigmoid()
    for name, mine, theirs in zip(
        ("o", "gate", "weight", "sumsq"), actual, torch.autograd.grad(exact, wide, grad.double()), strict=False
    ):
        assert_close(f"gradient of {name}", mine, theirs, 1e-6)


def test_gate_before_norm_gives_both_factors() -> None:
    o, gate, weight = (torch.randn(*shape, device=DEVICE) for shape in ((4, 96), (4, 96), (96,)))
    gated, sumsq = torch.ops.minimax_plugin.gate_before_norm(o, gate, weight)
    torch.testing.assert_close(gated, o * weight * gate.sigmoid(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sumsq, o.square().sum(-1))


def test_decay_minus_one_is_right_to_the_last_bit() -> None:
    exponent = torch.linspace(-18, 2, 2048, dtype=torch.float64)
    slope = torch.cat([2.0**exponent, torch.tensor([0.999999, 1.0, 4.95e-5, 0.917], dtype=torch.float64)])
    slope = slope[: 4 * (len(slope) // 4)].float().to(DEVICE)
    actual = torch.empty_like(slope)
    _store_decay[(len(slope) // 4,)](slope, actual, BLOCK=4)
    expected = torch.expm1(-slope.double())
    small = slope < 1
    assert float(((actual.double() - expected) / expected)[small].abs().max()) < 2**-22.5
    assert float((actual.double() - expected)[~small].abs().max()) < 2**-21


@triton.jit
def _store_decay(slope_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, recurrent.decay_minus_one(tl.load(slope_ptr + index)))


@pytest.mark.skipif(not INTERPRETED, reason="reserves address space without memory, on a CPU only")
@pytest.mark.parametrize("part", ["qkv", "state", "out"])
def test_offsets_beyond_2_31_elements(part: str) -> None:
    """The last slot, token or row lies beyond 2^31 elements of address space of which only a few pages are touched."""
    far = 2**31 // 2 + 64
    qkv, states = tokens(3, 32, torch.float32), pool(3, 32)
    out, _ = outputs(3, 32, torch.float32, False)
    expected_states, expected = states.clone(), out.clone()
    slots = slot_tensor(2, 0, 1)
    recurrent.decode(qkv, slopes(), expected_states, slots, expected, None, activation="", null_slot=-1)
    if part == "qkv":
        qkv = spread(qkv, far)
    elif part == "state":
        states = spread(states, far)
    else:
        out = spread(out, far)
    recurrent.decode(qkv, slopes(), states, slots, out, None, activation="", null_slot=-1)
    assert torch.equal(out, expected)
    assert torch.equal(states, expected_states)


@pytest.mark.skipif(not INTERPRETED, reason="reserves address space without memory, on a CPU only")
@pytest.mark.parametrize(
    ("kernel", "part"),
    [(kernel, part) for kernel in ("verify", "replay") for part in ("qkv", "state", "out")] + [("replay", "ring")],
)
def test_offsets_of_several_tokens_beyond_2_31_elements(kernel: str, part: str) -> None:
    far, bounds = 2**31 // 2 + 64, slot_tensor(0, 1, 3)
    rings = torch.zeros(2, 3, replay.replay_ring_rows(), len(SLOPES), 32)
    near = {"qkv": tokens(3, 32, torch.float32), "state": pool(3, 32), "k_ring": rings[0], "v_ring": rings[1]}
    near["out"], _ = outputs(3, 32, torch.float32, False)

    def run(x: dict[str, Tensor]) -> None:
        if kernel == "verify":
            slots = (slot_tensor(2, 1), torch.stack([slot_tensor(2, -1), slot_tensor(1, 0)]))
            recurrent.verify(
                x["qkv"], slopes(), x["state"], *slots, bounds, x["out"], None, activation="silu", null_slot=-1
            )
            return
        # The second sequence folds a chunk of its ring.
        counts = (slot_tensor(2, 0), slot_tensor(0, 3), slot_tensor(1, 19))
        replay.launch(
            x["qkv"], slopes(), x["state"], x["k_ring"], x["v_ring"], *counts, bounds, x["out"], None,
            chunk=16, max_query=2, activation="silu", null_slot=-1,
        )  # fmt: skip

    spoiled = {name: spread(x, far) if part in name else x.clone() for name, x in near.items()}
    run(near)
    run(spoiled)
    for name, x in near.items():
        assert torch.equal(spoiled[name], x), name


def spread(x: Tensor, stride: int) -> Tensor:
    """A copy of ``x`` whose first dim has the given stride, in address space backed only where it is touched."""
    size = 4 * ((x.shape[0] - 1) * stride + x[0].numel())
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | LINUX_MAP_NORESERVE)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    return flat.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)
