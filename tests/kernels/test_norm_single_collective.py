# SPDX-License-Identifier: Apache-2.0
"""One all-reduce for the sum of squares and the projection gives what two give, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import single_collective_worker as worker
import torch
from torch import Tensor

from minimax_plugin.kernels import norm, ops

EPS = 1e-6


def layer_end(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """o and gate [T, W], weight [W], out_weight [M, W]."""
    tokens, width, hidden = 7, 256, 96
    o, gate = 3 * torch.randn(tokens, width), torch.randn(tokens, width)
    weight, out_weight = 1 + 0.1 * torch.randn(width), torch.randn(hidden, width) / width**0.5
    return tuple(x.to(dtype) for x in (o, gate, weight, out_weight))


def in_float64(o: Tensor, gate: Tensor, weight: Tensor, out_weight: Tensor) -> Tensor:
    o, gate, weight, out_weight = (x.double() for x in (o, gate, weight, out_weight))
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + EPS)
    return (weight * normed * gate.sigmoid()) @ out_weight.T


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_single_collective_equals_the_ordinary_form(dtype: torch.dtype, ranks: int) -> None:
    o, gate, weight, out_weight = layer_end(dtype)
    shares = zip(*(x.chunk(ranks, dim=-1) for x in (o, gate, weight, out_weight)), strict=True)
    packed = torch.zeros(())
    for o_r, gate_r, weight_r, out_weight_r in shares:
        gated, sumsq = norm.gate_before_norm(o_r, gate_r, weight_r)
        packed = packed + norm.pack_for_reduce(torch.nn.functional.linear(gated, out_weight_r), sumsq)
    actual = norm.norm_after_reduce(packed, EPS, o.shape[-1]).to(dtype)
    ordinary = torch.nn.functional.linear(ops.gated_rmsnorm(o, gate, weight, EPS), out_weight)
    expected = in_float64(o, gate, weight, out_weight)
    assert relative_error(actual, expected) <= 1.25 * relative_error(ordinary, expected)


def test_two_processes_share_one_all_reduce(tmp_path: Path) -> None:
    layers = [layer_end(torch.float32), layer_end(torch.bfloat16)]
    arguments = (str(tmp_path / "rendezvous"), layers, EPS, str(tmp_path))
    torch.multiprocessing.spawn(worker.run, arguments, nprocs=worker.WORLD_SIZE)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(worker.WORLD_SIZE)]
    for _, reduced in saved:
        assert reduced == [(7, 97), (7, 97)], "one collective a layer, the sums of squares beside the 96 channels"
    for number, layer in enumerate(layers):
        first, second = (results[number] for results, _ in saved)
        assert torch.equal(first, second) and first.dtype == layer[0].dtype
        o, gate, weight, out_weight = layer
        ordinary = torch.nn.functional.linear(ops.gated_rmsnorm(o, gate, weight, EPS), out_weight)
        expected = in_float64(*layer)
        assert relative_error(first, expected) <= 1.25 * relative_error(ordinary, expected)


def test_without_a_group_one_rank_holds_all_heads() -> None:
    o, gate, weight, out_weight = layer_end(torch.float32)
    actual = norm.single_collective_projection(o, gate, weight, out_weight, EPS)
    assert relative_error(actual, in_float64(o, gate, weight, out_weight)) <= 1e-6


def test_fp16_is_refused() -> None:
    o, gate, weight, _ = layer_end(torch.float16)
    with pytest.raises(ValueError, match=r"o is torch.float16, expected bf16 or fp32"):
        norm.gate_before_norm(o, gate, weight)


def test_shapes_are_named() -> None:
    o, gate, weight, out_weight = layer_end(torch.float32)
    with pytest.raises(ValueError, match=r"expected o and gate alike"):
        norm.gate_before_norm(o, gate[:, :8], weight)
    with pytest.raises(ValueError, match=r"out_weight has shape \(96, 8\), expected \[M, 256\]"):
        norm.single_collective_projection(o, gate, weight, out_weight[:, :8], EPS)
