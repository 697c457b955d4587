# SPDX-License-Identifier: Apache-2.0
"""Replay decode on the PyTorch path: any schedule of drafts and rejections follows the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recurrence import recurrence, split_heads

from minimax_plugin.kernels import ops, replay

HEADS, DIM = 2, 16
SLOPES = torch.tensor([0.917, 4.95e-5])

#: (tokens sent, tokens of them accepted) of one call.
CALLS = st.lists(
    st.integers(1, 8).flatmap(lambda sent: st.tuples(st.just(sent), st.integers(1, sent))), min_size=1, max_size=40
)


@example(calls=[(8, 8)] * 10, chunk=64, first=0)
@example(calls=[(1, 1)] * 40, chunk=16, first=7)
@example(calls=[(8, 3)] * 12, chunk=16, first=64)
@settings(max_examples=40)
@given(calls=CALLS, chunk=st.sampled_from(replay.CHUNKS), first=st.integers(0, 200))
def test_any_schedule_follows_the_recurrence(calls: list[tuple[int, int]], chunk: int, first: int) -> None:
    total = sum(accepted for _, accepted in calls) + replay.MAX_QUERY
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(total, HEADS, 3 * DIM, generator=generator)
    pool = torch.randn(2, HEADS, DIM, DIM, generator=generator)
    start = pool.clone()
    expected, _ = recurrence(*split_heads(qkv), SLOPES, pool[1])
    k_ring = torch.full((2, replay.replay_ring_rows(chunk), HEADS, DIM), float("nan"))
    v_ring = k_ring.clone()
    boundary = position = torch.tensor([first], dtype=torch.int32)
    worst = 0.0
    for sent, accepted in calls:
        done = int(position) - first
        out = torch.empty(sent, HEADS, DIM)
        arguments = call_arguments(qkv[done : done + sent], pool, k_ring, v_ring)
        replay.lightning_decode_replay(
            **arguments | {"boundary": boundary, "position": position, "out": out, "chunk": chunk}
        )
        worst = max(worst, float((out - expected[done : done + sent]).abs().max()))
        boundary = replay.next_boundary(boundary, position, chunk)
        position = position + accepted
    # Single outputs may cancel almost to nothing, so the scale is that of all of them.
    assert worst <= 1e-5 * float(expected.square().mean().sqrt())
    folded = int(boundary) - first
    assert folded % chunk == 0 and int(position) - int(boundary) < chunk + replay.MAX_QUERY
    _, state = recurrence(*split_heads(qkv[:folded]), SLOPES, start[1])
    assert (pool[1] - state).norm() <= 1e-6 * state.norm()
    assert torch.equal(pool[0], start[0])


def call_arguments(qkv: torch.Tensor, pool: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor) -> dict[str, Any]:
    """One sequence in slot 1 at position 0."""
    zero = torch.zeros(1, dtype=torch.int32)
    return {
        "qkv": qkv,
        "slopes": SLOPES,
        "state_pool": pool,
        "k_ring": k_ring,
        "v_ring": v_ring,
        "slot_ids": torch.tensor([1]),
        "boundary": zero,
        "position": zero,
        "cu_seqlens": torch.tensor([0, qkv.shape[0]], dtype=torch.int32),
        "out": torch.empty(qkv.shape[0], HEADS, DIM),
    }


def fresh_arguments(num_tokens: int = 3) -> dict[str, Any]:
    ring = torch.zeros(2, replay.replay_ring_rows(), HEADS, DIM)
    return call_arguments(torch.randn(num_tokens, HEADS, 3 * DIM), torch.randn(2, HEADS, DIM, DIM), ring, ring.clone())


def test_replay_is_a_well_formed_operator() -> None:
    arguments = fresh_arguments()
    extra = (None, 16, 8, "silu", -1)
    torch.library.opcheck(torch.ops.minimax_plugin.lightning_decode_replay.default, (*arguments.values(), *extra))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 32}, r"chunk is 32, expected one of \(16, 64\)"),
        ({"max_query": 9}, "max_query is 9, expected 1 to 8"),
        ({"chunk": 64}, "k_ring has 31 rows, expected at least 79"),
        ({"k_ring": torch.zeros(2, 31, HEADS, DIM, dtype=torch.bfloat16)}, "k_ring is torch.bfloat16"),
        ({"position": torch.tensor([32], dtype=torch.int32)}, r"position - boundary is \[32\], expected .* below 32"),
        ({"position": torch.tensor([-1], dtype=torch.int32)}, r"position - boundary is \[-1\]"),
        ({"position": torch.tensor([0.0])}, r"position is torch\.float32 \(1,\), expected int32 or int64"),
        ({"boundary": torch.tensor([0, 0])}, r"boundary is torch\.int64 \(2,\), expected int32 or int64 \(1,\)"),
        ({"activation": "relu"}, "activation is 'relu', expected 'silu' or None"),
        ({"max_query": 2}, r"cu_seqlens is \[0, 3\], expected .* in steps of at most 2"),
        (
            {"v_ring": torch.zeros(2, 30, HEADS, DIM)},
            r"v_ring is torch\.float32 \(2, 30, 2, 16\), expected .* \(2, 31,",
        ),
        ({"v_ring": torch.zeros(2, 31, DIM, HEADS).transpose(2, 3)}, r"v_ring is .*\[S, R, H, D\], contiguous"),
        ({"boundary": torch.tensor([-1], dtype=torch.int32)}, r"boundary is \[-1\], expected none below 0"),
        ({"slopes": torch.tensor([0.917, 0.0])}, r"slopes are .*, expected every one positive"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, r"cu_seqlens is \[0, 4\], expected .* at most 3"),
        ({"slot_ids": torch.tensor([2])}, r"slot_ids holds \[2\], expected slots below 2"),
        ({"state_pool": torch.zeros(2, HEADS, DIM, DIM, dtype=torch.bfloat16)}, "state_pool is torch.bfloat16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay.lightning_decode_replay(**fresh_arguments() | change)


def test_a_tail_that_its_ring_cannot_hold_is_refused() -> None:
    """Positions that no series of calls of this size leads to: the oldest rows of the tail are overwritten already."""
    ring = torch.zeros(2, replay.replay_ring_rows(16, 1), HEADS, DIM)
    arguments = fresh_arguments(1) | {"k_ring": ring, "v_ring": ring.clone(), "max_query": 1}
    replay.lightning_decode_replay(**arguments | {"position": torch.tensor([16], dtype=torch.int32)})
    with pytest.raises(
        ValueError, match=r"position - boundary is \[17\] with \[1\] new tokens, .* at most 17, the rows of a ring"
    ):
        replay.lightning_decode_replay(**arguments | {"position": torch.tensor([17], dtype=torch.int32)})


@pytest.mark.parametrize("null", [-1, 0])
@pytest.mark.parametrize("activation", ["silu", None])
def test_rows_that_belong_to_no_sequence_are_zero(null: int, activation: str | None) -> None:
    """Of a padding sequence and past the last bound; nothing of the padding slot is touched, which may be slot 0."""
    lengths, slots = [2, 3, 1], [2, null, 1]
    bounds = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    qkv, pool = torch.randn(8, HEADS, 3 * DIM), torch.randn(3, HEADS, DIM, DIM)
    rings = torch.full((2, 3, replay.replay_ring_rows(), HEADS, DIM), float("nan"))
    out, sumsq = torch.full((8, HEADS, DIM), float("nan")), torch.full((8, HEADS), float("nan"))
    start, zeros = pool.clone(), torch.zeros(3, dtype=torch.int32)
    arguments = call_arguments(qkv, pool, rings[0], rings[1]) | {"cu_seqlens": bounds, "out": out, "sumsq": sumsq}
    arguments |= {"slot_ids": torch.tensor(slots), "boundary": zeros, "position": zeros}
    replay.lightning_decode_replay(**arguments, activation=activation, null_slot=null)
    for begin, length, slot in zip(bounds.tolist(), lengths, slots, strict=False):
        if slot > null:
            parts = split_heads(qkv[begin : begin + length], activate=activation is not None)
            expected, _ = recurrence(*parts, SLOPES, start[slot])
            assert (out[begin : begin + length] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not out[2:5].any() and not out[6:].any()
    torch.testing.assert_close(sumsq, out.square().sum(-1))
    assert torch.equal(pool, start) and rings[:, 0].isnan().all()


def test_a_padding_sequence_may_have_any_counts() -> None:
    arguments = fresh_arguments()
    odd = torch.tensor([-5], dtype=torch.int32)
    replay.lightning_decode_replay(**arguments | {"slot_ids": torch.tensor([0]), "boundary": odd}, null_slot=0)
    assert not arguments["out"].any()


def test_autocast_does_not_round_the_state() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        arguments = fresh_arguments()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            replay.lightning_decode_replay(**arguments)
        results.append(arguments["out"])
    assert torch.equal(*results)


def test_replay_is_public() -> None:
    for name in ("lightning_decode_replay", "next_boundary", "prefer_replay", "replay_ring_rows"):
        assert getattr(ops, name) is getattr(replay, name) and name in ops.__all__


def test_rule_of_thumb_prefers_replay_for_many_states_only() -> None:
    assert not replay.prefer_replay(1, 64)
    assert replay.prefer_replay(64, 8)
