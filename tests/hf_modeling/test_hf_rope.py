# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary embeddings: what changes the frequencies, and what scales cos and sin."""

from __future__ import annotations

from typing import Any

import torch
from oracle import tiny_config
from torch import Tensor

from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.layers import MiniMaxM1RotaryEmbedding

THETA, ROTATED = 1e4, 8


def rotary(positions: int = 64, **rope: Any) -> MiniMaxM1RotaryEmbedding:
    changes = {"rotary_dim": ROTATED, "rope_theta": THETA, "max_position_embeddings": positions}
    return MiniMaxM1RotaryEmbedding(MiniMaxM1Config(**tiny_config(**changes, rope_parameters=rope)))


def frequencies(theta: float = THETA) -> Tensor:
    return theta ** -(torch.arange(ROTATED // 2, dtype=torch.float64) * 2 / ROTATED)


def test_linear_scaling_stretches_positions() -> None:
    embedding = rotary(rope_type="linear", factor=4.0)
    cos, sin = embedding(torch.zeros(1), torch.tensor([[40]]))
    angles = 10 * frequencies().repeat(2)
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), rtol=0, atol=1e-5)


def test_yarn_scales_cos_and_sin() -> None:
    """By the attention factor, so that the logits of the softmax grow by its square (arXiv 2309.00071, equation 22)."""
    embedding = rotary(rope_type="yarn", factor=4.0, attention_factor=1.25, original_max_position_embeddings=64)
    cos, sin = embedding(torch.zeros(1), torch.arange(50)[None])
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.25**2))
    assert torch.equal(cos[0, 0], torch.full((ROTATED,), 1.25))


def test_dynamic_scaling_follows_the_longest_position_seen() -> None:
    """The base grows with the length beyond the trained one; a short sequence afterwards has the trained base again."""
    embedding = rotary(rope_type="dynamic", factor=2.0)
    x = torch.zeros(1)
    embedding(x, torch.arange(64)[None])
    torch.testing.assert_close(embedding.inv_freq.double(), frequencies(), rtol=1e-5, atol=0)
    embedding(x, torch.arange(192)[None])
    grown = THETA * (2 * 192 / 64 - 1) ** (ROTATED / (ROTATED - 2))
    torch.testing.assert_close(embedding.inv_freq.double(), frequencies(grown), rtol=1e-5, atol=0)
    embedding(x, torch.arange(10)[None])
    torch.testing.assert_close(embedding.inv_freq.double(), frequencies(), rtol=1e-5, atol=0)
