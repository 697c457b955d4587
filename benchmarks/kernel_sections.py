# SPDX-License-Identifier: Apache-2.0
"""The timed sections of ``benchmarks/kernels.py``: which shapes, which calls, and the bytes that each must move.

Shapes: ``T`` packed tokens, ``N`` sequences, ``H`` heads, ``D`` head_dim. 8 heads are one rank of eight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import kernel_timing as timing
from benchmarks.kernel_peers import Call, Decode
from benchmarks.kernel_timing import HEAD_DIM
from minimax_plugin.architecture import lightning_slopes
from minimax_plugin.kernels import ops, replay

if TYPE_CHECKING:
    from benchmarks.kernels import Bench

OURS = "ours"

#: Bytes per token and head that a task must move: q, k, v, o in bf16; the backward reads q, k, v, do and writes three.
PREFILL_BYTES, BACKWARD_BYTES = 4 * 2 * HEAD_DIM, 7 * 2 * HEAD_DIM

STATE_BYTES = 4 * HEAD_DIM * HEAD_DIM

#: Query tokens of one sequence in the verify section.
DRAFTS = 4


def prefill(bench: Bench, quick: bool) -> None:
    """Sequences from zero states, q, k, v activated beforehand except where the row says so."""
    for heads in (8, 64):
        for case, lengths in prefill_cases(heads, quick):
            if bench.ready("prefill", f"{heads} heads, {case}"):
                time_prefill(bench, f"{heads} heads, {case}", heads, lengths)


def prefill_cases(heads: int, quick: bool) -> list[tuple[str, list[int]]]:
    if quick:
        return [("1 x 1K", [1024])]
    ragged = [37 * (n + 1) + (n % 3) for n in range(20)]
    cases = [("1 x 1K", [1024]), ("1 x 8K", [8192]), ("1 x 64K", [65536]), ("8 x 1K", [1024] * 8)]
    cases += [("8 x 8K", [8192] * 8), ("32 x 1K", [1024] * 32)]
    cases += [("20 ragged, 8K", ragged), ("20 ragged, 62K", [8 * length for length in ragged])]
    return cases + ([("1 x 256K", [262144])] if heads == 8 else [])


def time_prefill(bench: Bench, case: str, heads: int, lengths: list[int]) -> None:
    bounds, slopes = list(itertools.accumulate(lengths, initial=0)), make_slopes(heads, bench.device)
    raw = torch.randn(bounds[-1], heads, 3 * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    qkv = torch.nn.functional.silu(raw)
    q, k, v = qkv.chunk(3, dim=-1)
    pool = torch.zeros(len(lengths), heads, HEAD_DIM, HEAD_DIM, device=bench.device)
    out = torch.empty(bounds[-1], heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    ours = functools.partial(prefill_call, slopes=slopes, pool=pool, bounds=bounds, out=out)
    calls: dict[str, Callable[[], Call]] = {
        OURS: functools.partial(ours, qkv),
        f"{OURS}, high": functools.partial(ours, qkv, precision="high"),
        f"{OURS}, silu inside": functools.partial(ours, raw, activation="silu"),
    }
    for peer in bench.present("prefill"):
        assert peer.prefill is not None
        calls[peer.name] = functools.partial(peer.prefill, q, k, v, slopes, bounds)
    expected = timing.chunked_fp64(q, k, v, slopes, bounds)
    floor = PREFILL_BYTES * bounds[-1] * heads
    for name, prepare in calls.items():
        bench.time("prefill", case, name, prepare, floor, expected=expected)


def decode(bench: Bench, quick: bool) -> None:
    """One token per sequence, replayed from a CUDA graph."""
    for heads, batch in itertools.product((8, 64), (1,) if quick else (1, 8, 64, 256)):
        if bench.ready("decode", f"{heads} heads, batch {batch}"):
            time_decode(bench, f"{heads} heads, batch {batch}", heads, batch)


def time_decode(bench: Bench, case: str, heads: int, batch: int) -> None:
    slopes, slots = make_slopes(heads, bench.device), torch.arange(batch, dtype=torch.int32, device=bench.device)
    qkv = torch.randn(batch, heads, 3 * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    q, k, v = qkv.chunk(3, dim=-1)
    out = torch.empty(batch, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)

    def recurrent(pool: Tensor) -> Call:
        def run() -> Tensor:
            ops.lightning_decode(qkv, slopes, pool, slots, out=out, activation=None)
            return out

        return run

    calls: dict[str, Callable[[Tensor], Call]] = {OURS: recurrent}
    for chunk in replay.CHUNKS:
        calls[f"{OURS}, replay {chunk}"] = timing.replay_step(qkv, slopes, slots, out, chunk)
    for peer in bench.present("decode"):
        assert peer.decode is not None
        calls[peer.name] = functools.partial(_peer_decode, peer.decode, (q, k, v), slopes, slots)
    floor = batch * heads * (2 * STATE_BYTES + PREFILL_BYTES)
    # More pools than the L2 cache holds, so that every step finds its states in memory, as 70 layers do.
    pools = timing.rotated_pools(batch, heads, HEAD_DIM, bench.device)
    for name, make in calls.items():
        bench.time("decode", case, name, functools.partial(_rotate, make, pools), floor, graph=True)


def _rotate(make: Callable[[Tensor], Call], pools: Sequence[Tensor]) -> Call:
    return timing.Rotation([make(pool) for pool in pools])


def _peer_decode(
    start: Decode, qkv: tuple[Tensor, Tensor, Tensor], slopes: Tensor, slots: Tensor, pool: Tensor
) -> Call:
    q, k, v = qkv
    return start(q, k, v, slopes, pool, slots)


def verify(bench: Bench, quick: bool) -> None:
    """Four tokens per sequence: the state kept after each, or replay."""
    for heads, batch in itertools.product((8, 64), (1,) if quick else (1, 64)):
        case = f"{heads} heads, batch {batch}, {DRAFTS} tokens"
        if bench.ready("verify", case):
            time_verify(bench, case, heads, batch)


def time_verify(bench: Bench, case: str, heads: int, batch: int) -> None:
    slopes, slots = make_slopes(heads, bench.device), torch.arange(batch, dtype=torch.int32, device=bench.device)
    writes = torch.arange(batch, batch * (DRAFTS + 1), dtype=torch.int32, device=bench.device).reshape(batch, -1)
    bounds = DRAFTS * torch.arange(batch + 1, dtype=torch.int32, device=bench.device)
    qkv = torch.randn(batch * DRAFTS, heads, 3 * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    out = torch.empty(batch * DRAFTS, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)

    def keep_states(pool: Tensor) -> Call:
        def run() -> Tensor:
            ops.lightning_verify(qkv, slopes, pool, slots, writes, bounds, out=out, activation=None)
            return out

        return run

    tokens = batch * heads * DRAFTS * PREFILL_BYTES
    calls = {
        f"{OURS}, a state per token": (keep_states, 1 + DRAFTS),
        f"{OURS}, replay 16": (timing.replay_step(qkv, slopes, slots, out, 16, bounds), 1),
    }
    pools = timing.rotated_pools(batch * (DRAFTS + 1), heads, HEAD_DIM, bench.device)
    for name, (make, states) in calls.items():
        floor = batch * heads * states * STATE_BYTES + tokens
        bench.time("verify", case, name, functools.partial(_rotate, make, pools), floor, graph=True)


def train(bench: Bench, quick: bool) -> None:
    """One sequence, forward alone and with its backward."""
    for heads, tokens in [(64, 1024)] if quick else [(64, 4096), (64, 16384), (64, 65536), (8, 65536)]:
        case = f"{heads} heads, {tokens // 1024}K"
        if bench.ready("train", case):
            time_train(bench, case, heads, tokens)


def time_train(bench: Bench, case: str, heads: int, tokens: int) -> None:
    slopes, shape = make_slopes(heads, bench.device), (1, tokens, heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=bench.device).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
    calls: dict[str, Callable[[], Call]] = {OURS: lambda: lambda: ops.lightning_attention(q, k, v, slopes)[0]}
    for peer in bench.present("train"):
        assert peer.train is not None
        calls[peer.name] = functools.partial(peer.train, q, k, v, slopes)
    floor = PREFILL_BYTES * tokens * heads
    for name, prepare in calls.items():
        bench.time("train", f"{case}, forward", name, prepare, floor)
        both = functools.partial(_with_backward, prepare, (q, k, v), grad)
        bench.time("train", f"{case}, with backward", name, both, floor + BACKWARD_BYTES * tokens * heads)


def _with_backward(prepare: Callable[[], Call], leaves: Sequence[Tensor], grad: Tensor) -> Call:
    return timing.forward_backward(prepare(), leaves, grad)


def mixer(bench: Bench, quick: bool) -> None:
    """From the projection to the input of the next one: SiLU, attention, norm over all heads, gate; 64 heads."""
    length = 1024 if quick else 8192
    if bench.ready("mixer", f"prefill 1 x {length}"):
        time_mixer(bench, f"prefill 1 x {length}", [length])
    if bench.ready("mixer", "decode, batch 64"):
        time_mixer(bench, "decode, batch 64", [1] * 64)


def time_mixer(bench: Bench, case: str, lengths: list[int]) -> None:
    heads, tokens, decoding = 64, sum(lengths), len(lengths) > 1
    bounds, slopes = list(itertools.accumulate(lengths, initial=0)), make_slopes(heads, bench.device)
    qkv = torch.randn(tokens, heads, 3 * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    gate = torch.randn(tokens, heads * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    weight = torch.ones(heads * HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    pool = torch.zeros(len(lengths), heads, HEAD_DIM, HEAD_DIM, device=bench.device)
    out = torch.empty(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    slots = torch.arange(len(lengths), dtype=torch.int32, device=bench.device)
    attend = prefill_call(qkv, slopes, pool, bounds, out, activation="silu")

    def run() -> Tensor:
        if decoding:
            ops.lightning_decode(qkv, slopes, pool, slots, out=out)
        else:
            attend()
        return ops.gated_rmsnorm(out.flatten(1), gate, weight, 1e-6)

    states = 2 * STATE_BYTES * heads * len(lengths) if decoding else 0
    # The norm reads the output and the gate and writes its result.
    bench.time(
        "mixer", case, OURS, lambda: run, (PREFILL_BYTES + 6 * HEAD_DIM) * tokens * heads + states, graph=decoding
    )


def prefill_call(
    qkv: Tensor,
    slopes: Tensor,
    pool: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    *,
    precision: str = "default",
    activation: str | None = None,
    has_initial: bool = False,
) -> Call:
    """One prefill into ``out``; the plan is made beforehand, for 70 layers share it."""
    segment = ops.suggest_segment(bounds[-1], slopes.shape[0])
    plan = ops.LightningPlan.build(list(bounds), device=qkv.device, segment=segment)
    slots = torch.arange(len(bounds) - 1, dtype=torch.int32, device=qkv.device)
    flags = torch.full((len(bounds) - 1,), has_initial, device=qkv.device)

    def run() -> Tensor:
        ops.lightning_prefill(
            qkv, slopes, pool, slots, flags, plan, out=out, activation=activation, precision=precision
        )
        return out

    return run


def make_slopes(heads: int, device: torch.device) -> Tensor:
    """The first ``heads`` of 64, as a rank of a split model has them: the fastest decay and the most demanding."""
    return torch.tensor(lightning_slopes(64, 0, 80)[:heads], dtype=torch.float32, device=device)


SECTIONS: dict[str, Callable[[Bench, bool], None]] = {
    "prefill": prefill,
    "decode": decode,
    "verify": verify,
    "train": train,
    "mixer": mixer,
}
