# SPDX-License-Identifier: Apache-2.0
"""The laws of lightning attention on the PyTorch path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_tools import FASTEST, SLOWEST, Setting, assert_close, oracle, prefill
from lightning_laws import parametrize_laws
from oracle import slopes
from torch import Tensor

from minimax_plugin.kernels import ops, reference

SETTINGS = {
    "fp32": Setting(),
    "bf16": Setting(dtype=torch.bfloat16),
    "fp16": Setting(dtype=torch.float16),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@parametrize_laws()
def test_law(law: Callable[[Setting], None], setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "torch")
    law(setting)


def test_pieces_of_whole_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "torch")
    setting, length, cuts = Setting(segment=128), 300, (0, 64, 192, 256, 300)
    qkv, pool = setting.qkv(length), setting.states(1)
    whole = prefill(setting, qkv, pool, (length,), [0])
    for a, b in zip(cuts, cuts[1:], strict=False):
        piece = prefill(setting, qkv[a:b], pool, (b - a,), [0], computed=[a])
        assert torch.equal(piece.out, whole.out[a:b])
        pool = piece.pool
    assert torch.equal(pool, whole.pool)


@pytest.mark.parametrize("path", ["decode", "verify"])
def test_8192_steps_of_real_slopes(path: str) -> None:
    """The slowest heads multiply the error of one decay up: exp(-slope) rounded to fp32 leads to 8e-5 here."""
    steps, setting = 8192, Setting(head_dim=8, slopes=(FASTEST, 0.0039, 5.4e-5, SLOWEST))
    qkv, pool, rates = setting.qkv(steps), setting.states(2), setting.slopes_tensor()
    expected, final = oracle(setting, qkv, pool[1])
    out = torch.empty(steps, setting.num_heads, setting.head_dim)
    if path == "decode":
        for t in range(steps):
            reference.decode_loop(qkv[t : t + 1], rates, pool, [1], out[t : t + 1])
    else:
        slot, writes, bounds = torch.tensor([1]), torch.tensor([[0, *[-1] * 6, 1]]), torch.tensor([0, 8])
        for t in range(0, steps, 8):
            rows = slice(t, t + 8)
            ops.lightning_verify(qkv[rows], rates, pool, slot, writes, bounds, out=out[rows])
    assert_close("output", out[-1024:], expected[-1024:], 2e-6)
    assert_close("state", pool[1], final, 1e-6)


def test_a_prompt_of_20000_tokens_decays_the_slowest_heads_exactly() -> None:
    """Keys of zero leave the decay alone: 313 chunks multiply up what one decay is off, always in the same direction.

    Decays that are rounded to fp32 before 1 is subtracted lead to 9e-6.
    """
    length, setting = 20_000, Setting(head_dim=8, slopes=tuple(slopes(64, 78, 80)[-13:].tolist()))
    pool = setting.states(1)
    run = prefill(setting, torch.zeros_like(setting.qkv(length)), pool, (length,), [0])
    expected = pool[0].double() * torch.exp(-slopes(64, 78, 80)[-13:] * length)[:, None, None]
    assert_close("state", run.pool[0], expected, 1e-6)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 150), max_size=3),
    slope=st.floats(1e-5, 4.0),
    seed=st.integers(0, 100),
)
@settings(max_examples=30)
def test_any_schedule_of_pieces_gives_the_recurrence(
    lengths: list[int], cuts: list[int], slope: float, seed: int
) -> None:
    """Several sequences prefilled in steps: each step brings a piece of some of them, in packed batches."""
    setting = Setting(head_dim=16, slopes=(slope, SLOWEST))
    qkv = [setting.qkv(length, seed=seed + n) for n, length in enumerate(lengths)]
    pool, done = setting.states(len(lengths)), [0] * len(lengths)
    outs: list[list[Tensor]] = [[] for _ in lengths]
    for border in [*sorted(cuts), 150]:
        pieces = [x[a : min(border, len(x))] for x, a in zip(qkv, done, strict=True)]
        sizes = tuple(len(piece) for piece in pieces)
        first = [a > 0 for a in done]
        run = prefill(
            setting, torch.cat(pieces), pool, sizes, list(range(len(lengths))), has_initial=first, computed=done
        )
        pool = run.pool
        for out, piece in zip(outs, run.out.split(list(sizes)), strict=True):
            out.append(piece)
        done = [a + size for a, size in zip(done, sizes, strict=True)]
    for n, (x, out) in enumerate(zip(qkv, outs, strict=True)):
        if not len(x):
            continue
        expected, final = oracle(setting, x)
        assert_close("output", torch.cat(out), expected, setting.output_error)
        assert_close("state", pool[n], final, setting.state_error)
