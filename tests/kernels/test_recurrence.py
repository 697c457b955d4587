# SPDX-License-Identifier: Apache-2.0
"""The oracle of the kernels by hand and in closed form, and the recurrence that the package offers against it.

The states of the original code are compared in ``tests/hf_modeling/test_oracle.py``, whose model runs on this oracle.
"""

from __future__ import annotations

import math

import pytest
import torch
from recurrence import recurrence, split_heads
from torch import Tensor

from minimax_plugin.kernels import reference


def closed_form(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """``o_t = sum_{j <= t} e^{-s (t - j)} (q_t k_j) v_j + e^{-s (t + 1)} q_t S`` and the same sum for the state."""
    time = torch.arange(len(q), dtype=torch.float64)
    age = time[:, None] - time
    weights = torch.exp(-slopes.double()[:, None, None] * age).tril()
    history = torch.exp(-slopes.double() * (time[:, None] + 1))
    q, k, v = q.double(), k.double(), v.double()
    out = torch.einsum("thd,jhd,htj,jhe->the", q, k, weights, v)
    out += history[..., None] * torch.einsum("thd,hde->the", q, initial.double())
    state = torch.einsum("hj,jhd,jhe->hde", weights[:, -1], k, v)
    return out, state + history[-1, :, None, None] * initial.double()


def test_two_tokens_by_hand() -> None:
    """One head of one channel that forgets half at every step."""
    q, k, v = (torch.tensor(values).view(2, 1, 1) for values in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    out, state = recurrence(q, k, v, torch.tensor([math.log(2)], dtype=torch.float64), torch.full((1, 1, 1), 4.0))
    # S = 4 / 2 + 55 = 57, then 57 / 2 + 91 = 119.5.
    assert out.flatten().tolist() == pytest.approx([114.0, 358.5], rel=1e-15)
    assert state.item() == pytest.approx(119.5, rel=1e-15)


@pytest.mark.parametrize("function", [recurrence, reference.recurrence_fp64], ids=["oracle", "package"])
def test_recurrence_is_its_closed_form(function: object) -> None:
    qkv, slopes = torch.randn(40, 3, 15), torch.tensor([0.9, 0.01, 5e-5])
    initial = torch.randn(3, 5, 5)
    q, k, v = split_heads(qkv)
    torch.testing.assert_close(q, qkv[..., :5] * qkv[..., :5].sigmoid())
    for found, expected in zip(function(q, k, v, slopes, initial), closed_form(q, k, v, slopes, initial), strict=True):  # type: ignore[operator]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_token_leaves_the_state() -> None:
    q, k, v = torch.randn(3, 0, 2, 4)
    out, state = recurrence(q, k, v, torch.ones(2))
    assert out.shape == (0, 2, 4) and torch.equal(state, torch.zeros(2, 4, 4, dtype=torch.float64))


def test_heads_are_laid_out_as_q_k_v() -> None:
    qkv = torch.arange(12.0).view(1, 2, 6)
    q, k, v = split_heads(qkv, activate=False)
    assert [x.flatten().tolist() for x in (q, k, v)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
