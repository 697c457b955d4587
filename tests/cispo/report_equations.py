# SPDX-License-Identifier: Apache-2.0
"""Eq. 4 to 7 of arXiv 2506.13585 token by token in Python floats, and batches to evaluate them on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bounds of the token masks: 1 - LOW, 1 + HIGH, and the ratio of dual clipping.
LOW, HIGH, DUAL = 0.2, 0.28, 3.0


@dataclass
class Batch:
    """Completions of up to seven tokens, two per group, with ratios on every side of every bound.

    One group of three is not kept.
    """

    log_probs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    groups: list[int]
    kept: list[bool]

    @classmethod
    def random(cls, seed: int, dtype: torch.dtype = torch.float64, rows: int = 6) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        tokens = 7
        log_probs = -3 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64)
        shift = 1.5 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
        lengths = torch.tensor([7, 1, 4, 5, 2, 6]).repeat(rows)[:rows]
        return cls(
            log_probs=log_probs.to(dtype, copy=True).requires_grad_(),
            old=(log_probs - shift).to(dtype),
            advantages=torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype),
            mask=torch.arange(tokens) < lengths[:, None],
            groups=[row // 2 for row in range(rows)],
            kept=[row // 2 % 3 < 2 for row in range(rows)],
        )


def report_loss(batch: Batch, kind: str, high: float, low: float | None, aggregation: str, mix: float) -> float:
    """Eq. 4 to 7 as a sum over tokens; also fills ``log_probs.grad`` by hand: d(-w A log π) = -w A."""
    terms: dict[int, list[float]] = {}
    slopes: dict[int, list[float]] = {}
    for i, kept in enumerate(batch.kept):
        if not kept:
            continue
        terms[i], slopes[i] = [], []
        for t in range(int(batch.mask[i].sum())):
            new, advantage = batch.log_probs[i, t].item(), batch.advantages[i].item()
            r = math.exp(new - batch.old[i, t].item())
            weight = min(r, 1 + high)
            if low is not None:
                weight = max(weight, 1 - low)
            masked = (advantage > 0 and r > 1 + HIGH) or (advantage < 0 and r < 1 - LOW)
            if kind == "dual":
                masked = masked or (advantage < 0 and r > DUAL)
            if kind != "none" and masked:
                weight = 0.0
            terms[i].append(-weight * advantage * new)
            slopes[i].append(-weight * advantage)

    def share(i: int, how: str) -> float:
        if how == "token":
            return 1 / sum(len(tokens) for tokens in terms.values())
        if how == "sample":
            return 1 / len(terms[i]) / len(terms)
        mates = [j for j in terms if batch.groups[j] == batch.groups[i]]
        return 1 / sum(len(terms[j]) for j in mates) / len({batch.groups[j] for j in terms})

    shares = {i: (1 - mix) * share(i, aggregation) + mix * share(i, "sample") for i in terms}
    batch.log_probs.grad = torch.zeros_like(batch.log_probs)
    for i, values in slopes.items():
        batch.log_probs.grad[i, : len(values)] = torch.tensor(values, dtype=torch.float64) * shares[i]
    return sum(shares[i] * sum(values) for i, values in terms.items())
