# SPDX-License-Identifier: Apache-2.0
"""The loss against the report's equations."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from report_equations import DUAL, HIGH, LOW, Batch, report_loss
from torch import Tensor

from minimax_plugin.cispo import losses


def loss_of(batch: Batch, kind: str, high: float, low: float | None, aggregation: str, mix: float) -> Tensor:
    ratio = losses.importance_ratio((batch.log_probs - batch.old).detach(), batch.mask)
    weights = losses.importance_weights(ratio, high, low)
    advantages = batch.advantages[:, None]
    unmasked = losses.token_mask(
        ratio,
        advantages,
        kind,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        dual_clip_ratio=DUAL if kind == "dual" else None,
    )
    terms = losses.token_losses(batch.log_probs, weights * unmasked, advantages)
    counts = losses.completion_weights(
        batch.mask.sum(-1), torch.tensor(batch.groups), torch.tensor(batch.kept), aggregation, mix
    )
    return losses.aggregate(terms, batch.mask, counts)


BOUNDS = [(4.0, None), (0.28, None), (0.5, 0.3), (math.inf, None)]


@pytest.mark.parametrize("kind", ["none", "ppo", "dual"])
@pytest.mark.parametrize("aggregation, mix", [("token", 0.0), ("sample", 0.0), ("prompt", 0.0), ("token", 0.3)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_loss_and_gradient_are_the_reports(
    kind: str, aggregation: str, mix: float, dtype: torch.dtype, bound: float
) -> None:
    for (high, low), seed in product(BOUNDS, range(3)):
        batch = Batch.random(seed, dtype)
        expected = report_loss(batch, kind, high, low, aggregation, mix)
        expected_gradient, batch.log_probs.grad = batch.log_probs.grad, None
        loss = loss_of(batch, kind, high, low, aggregation, mix)
        loss.backward()
        assert abs(loss.item() - expected) <= bound * max(1.0, abs(expected))
        torch.testing.assert_close(batch.log_probs.grad, expected_gradient, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind, ratio_cap", [("ppo", math.inf), ("dual", DUAL)])
def test_masked_and_uncapped_is_ppo(kind: str, ratio_cap: float) -> None:
    """PPO's own objective ``min(r A, clip(r) A)``, for dual-clip ``max(., c A)`` where A < 0, by autograd."""
    for seed in range(5):
        batch = Batch.random(seed)
        ratio = (batch.log_probs - batch.old).exp()
        advantages = batch.advantages[:, None]
        objective = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
        if kind == "dual":
            objective = torch.where(advantages < 0, torch.maximum(objective, ratio_cap * advantages), objective)
        kept = batch.mask & torch.tensor(batch.kept)[:, None]
        (-(objective * kept).sum() / kept.sum()).backward()
        expected, batch.log_probs.grad = batch.log_probs.grad, None
        loss_of(batch, kind, math.inf, None, "token", 0.0).backward()
        assert batch.log_probs.grad is not None and expected is not None
        assert (expected == 0).sum() > (~kept).sum(), "no token was clipped"
        assert float((batch.log_probs.grad - expected).abs().max()) <= 1e-12


def test_every_bound_is_crossed() -> None:
    """The batches above would prove little if no ratio crossed the bounds on either side."""
    batch = Batch.random(0)
    ratio = (batch.log_probs - batch.old).exp()[batch.mask]
    assert {a > 0 for a in batch.advantages[:4].tolist()} == {True, False}
    for bound in (1 - LOW, 1 + HIGH, DUAL, 5.0):
        assert 0 < int((ratio > bound).sum()) < len(ratio)


def test_ratios_stay_finite() -> None:
    extreme = torch.tensor([-1e4, 0.0, 1e4, math.nan])
    mask = torch.tensor([1, 1, 1, 0])
    assert losses.importance_ratio(extreme, mask).tolist() == pytest.approx([math.exp(-20), 1.0, math.exp(20), 1.0])
    assert losses.importance_ratio(extreme, mask, 2.0).tolist() == pytest.approx([math.exp(-2), 1.0, math.exp(2), 1.0])


def test_what_lies_outside_the_mask_is_not_read() -> None:
    batch = Batch.random(0)
    with torch.no_grad():
        batch.log_probs[~batch.mask] = math.nan
    loss = loss_of(batch, "ppo", 4.0, None, "token", 0.0)
    loss.backward()
    assert math.isfinite(loss.item()) and batch.log_probs.grad is not None
    assert torch.isfinite(batch.log_probs.grad).all()


@pytest.mark.parametrize("aggregation", ["token", "sample", "prompt"])
def test_dropping_completions_is_the_loss_of_the_rest(aggregation: str) -> None:
    lengths, groups = torch.tensor([3, 5, 2, 4]), torch.tensor([7, 7, -1, -1])
    kept = torch.tensor([True, True, False, False])
    part = losses.completion_weights(lengths, groups, kept, aggregation, 0.5)
    alone = losses.completion_weights(lengths[:2], groups[:2], kept[:2], aggregation, 0.5)
    assert part.tolist() == [*alone.tolist(), 0.0, 0.0]


@pytest.mark.parametrize("aggregation", ["token", "sample", "prompt"])
def test_nothing_kept_gives_zero(aggregation: str) -> None:
    none = torch.zeros(4, dtype=torch.bool)
    weights = losses.completion_weights(torch.tensor([3, 5, 2, 4]), torch.tensor([0, 0, 1, 1]), none, aggregation)
    assert weights.tolist() == [0.0] * 4


def test_statistics_by_hand() -> None:
    ratio = torch.tensor([[6.0, 1.0, 0.5, 9.0], [8.0, 0.7, 2.0, 1.0]])
    advantages = torch.tensor([[1.0], [-2.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    weights = losses.importance_weights(ratio, 4.0)
    unmasked = losses.token_mask(ratio, advantages, "ppo", epsilon_low=0.2, epsilon_high=0.2)
    assert unmasked.tolist() == [[False, True, True, False], [True, False, True, True]]
    metrics = losses.LossStatistics.of(ratio, weights, unmasked, advantages, mask).metrics()
    used = [1.0, 0.5, 5.0, 2.0, 1.0]
    assert metrics == pytest.approx(
        {
            "clamped_pos": 1 / 3,
            "clamped_neg": 1 / 4,
            "masked": 2 / 7,
            "ratio_mean": (6 + 1 + 0.5 + 8 + 0.7 + 2 + 1) / 7,
            "ratio_max": 8.0,
            "ess": sum(used) ** 2 / (7 * sum(w * w for w in used)),
        }
    )


def test_statistics_add_up_over_processes() -> None:
    batch = Batch.random(1)
    ratio = losses.importance_ratio((batch.log_probs - batch.old).detach(), batch.mask)
    advantages = batch.advantages[:, None]
    weights, unmasked = losses.importance_weights(ratio, 0.5), losses.token_mask(ratio, advantages, "ppo")

    def of(rows: slice) -> losses.LossStatistics:
        return losses.LossStatistics.of(ratio[rows], weights[rows], unmasked[rows], advantages[rows], batch.mask[rows])

    first, rest, whole = of(slice(0, 2)), of(slice(2, None)), of(slice(None))
    merged = losses.LossStatistics(first.sums + rest.sums, torch.maximum(first.ratio_max, rest.ratio_max))
    assert merged.metrics() == pytest.approx(whole.metrics())


def test_unknown_names_are_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="token mask is 'clip'"):
        losses.token_mask(one, one, "clip")
    with pytest.raises(ValueError, match="without dual_clip_ratio"):
        losses.token_mask(one, one, "dual")
    with pytest.raises(ValueError, match="loss aggregation is 'batch'"):
        losses.completion_weights(torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), "batch")
