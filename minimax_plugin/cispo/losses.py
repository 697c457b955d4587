# SPDX-License-Identifier: Apache-2.0
"""The CISPO loss (arXiv 2506.13585, section 3.1) on tensors, without a trainer.

With ``r`` the probability of a token under the policy over that under the old policy, ``A`` the advantage of its
completion and ``sg`` a stop of the gradient, a token adds

    -sg(clip(r, 1 - ε_low, 1 + ε_high) · M) · A · log π

to the loss: eq. 4 with the weights of eq. 5 and the mask ``M`` of eq. 7. :func:`completion_weights` says how much each
completion counts.

Shapes: ``B`` completions, ``T`` tokens of the longest, ``N`` completions of the whole rollout over all processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bound of ``log r`` before ``exp``. At a high learning rate ratios of 1e5 were seen.
LOG_RATIO_BOUND = 20.0


def importance_ratio(log_ratio: Tensor, mask: Tensor, bound: float = LOG_RATIO_BOUND) -> Tensor:
    """``r = exp(log_ratio)`` with ``log_ratio`` kept within ``±bound``, and 1 outside ``mask``. Both [B, T]."""
    return torch.where(mask.bool(), log_ratio, 0.0).clamp(-bound, bound).exp()


def importance_weights(ratio: Tensor, epsilon_is_high: float, epsilon_is_low: float | None = None) -> Tensor:
    """``clip(r, 1 - epsilon_is_low, 1 + epsilon_is_high)``, eq. 5, without gradient.

    Args:
        ratio: ``r``, any shape.
        epsilon_is_high: the cap is ``1 + epsilon_is_high``; infinity for none. TRL's ``epsilon_high`` of the cispo
            loss is the cap itself.
        epsilon_is_low: the lower bound is ``1 - epsilon_is_low``; None for none.
    """
    low = None if epsilon_is_low is None else 1.0 - epsilon_is_low
    return ratio.detach().clamp(low, 1.0 + epsilon_is_high)


def token_mask(
    ratio: Tensor,
    advantages: Tensor,
    kind: str = "none",
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip_ratio: float | None = None,
) -> Tensor:
    """Which tokens have a gradient, True for those that do.

    Args:
        ratio: ``r`` [B, T].
        advantages: [B, 1] or [B, T].
        kind: "none" for all; "ppo" for eq. 7, the tokens that PPO's clipping leaves a gradient; "dual" for those that
            dual-clip PPO (arXiv 1912.09729, eq. 5) leaves one, which drops ``A < 0 and r > dual_clip_ratio`` too.
        epsilon_low, epsilon_high: the ratio is trusted in ``[1 - epsilon_low, 1 + epsilon_high]``.
        dual_clip_ratio: needed for "dual".

    Returns:
        bool [B, T].

    Raises:
        ValueError: an unknown ``kind``, or "dual" without a ratio.
    """
    if kind == "none":
        return torch.ones_like(ratio, dtype=torch.bool)
    if kind not in ("ppo", "dual"):
        raise ValueError(f"token mask is {kind!r}, expected 'none', 'ppo' or 'dual'")
    dropped = ((advantages > 0) & (ratio > 1 + epsilon_high)) | ((advantages < 0) & (ratio < 1 - epsilon_low))
    if kind == "dual":
        if dual_clip_ratio is None:
            raise ValueError("token mask is 'dual' without dual_clip_ratio, expected a ratio above 1")
        dropped |= (advantages < 0) & (ratio > dual_clip_ratio)
    return ~dropped


def token_losses(log_probs: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:
    """``-sg(weights) · A · log π`` per token [B, T]; the gradient flows through ``log_probs`` only.

    Args:
        log_probs: log-probabilities under the policy [B, T].
        weights: what the loss weighs tokens with, clipped and masked [B, T].
        advantages: [B, 1] or [B, T].
    """
    return -(weights * advantages).detach() * log_probs


def completion_weights(
    lengths: Tensor,
    groups: Tensor,
    kept: Tensor,
    aggregation: str = "token",
    sample_loss_weight: float = 0.0,
) -> Tensor:
    """Weights ``w`` [N] that make ``Σ_i w_i · Σ_t loss_it`` the mean that ``aggregation`` names.

    Means run over kept completions only, so that leaving completions out gives the loss of the rest by itself.

    Args:
        lengths: tokens of each completion that take part in the loss [N].
        groups: id of the group of each completion [N], any integers.
        kept: completions that take part in the loss, bool [N].
        aggregation: "token": over tokens. "sample": over completions of the mean over their tokens; a completion
            without tokens counts as zero. "prompt": over groups of the mean over the tokens of the group, eq. 4 to the
            letter.
        sample_loss_weight: share of the mean over samples, mixed into that of ``aggregation``.

    Returns:
        float64 [N], zero where ``kept`` is False.

    Raises:
        ValueError: an unknown ``aggregation``.
    """
    kept_lengths = torch.where(kept, lengths, 0).double()
    if aggregation == "token":
        weights = torch.ones_like(kept_lengths) / kept_lengths.sum().clamp(min=1.0)
    elif aggregation == "sample":
        weights = _sample_weights(kept_lengths, kept)
    elif aggregation == "prompt":
        _, index = groups.unique(return_inverse=True)
        tokens = torch.zeros(len(groups), dtype=torch.float64, device=lengths.device).index_add(0, index, kept_lengths)
        present = torch.zeros_like(tokens).index_add(0, index, kept.double()) > 0
        weights = 1.0 / (tokens[index].clamp(min=1.0) * present.sum().clamp(min=1))
    else:
        raise ValueError(f"loss aggregation is {aggregation!r}, expected 'token', 'sample' or 'prompt'")
    if sample_loss_weight:
        samples = _sample_weights(kept_lengths, kept)
        weights = (1.0 - sample_loss_weight) * weights + sample_loss_weight * samples
    return torch.where(kept, weights, 0.0)


def aggregate(losses: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """``Σ_i w_i · Σ_t losses_it`` over the tokens in ``mask``, a scalar.

    Args:
        losses: [B, T]; what lies outside the mask is not read.
        mask: tokens that take part in the loss [B, T].
        weights: of :func:`completion_weights` [B].
    """
    return (torch.where(mask.bool(), losses, 0.0).sum(-1) * weights.to(losses.dtype)).sum()


@dataclass
class LossStatistics:
    """Sums over the tokens of the loss that add up over processes, and the largest ratio.

    Attributes:
        sums: float64 [9]: tokens; tokens with A > 0 and with A < 0; of these, tokens whose weight was clipped; tokens
            masked; Σ r; Σ w and Σ w², w the weights of the loss, clipped and masked.
        ratio_max: scalar.
    """

    sums: Tensor
    ratio_max: Tensor

    @classmethod
    def of(cls, ratio: Tensor, weights: Tensor, unmasked: Tensor, advantages: Tensor, mask: Tensor) -> LossStatistics:
        """Statistics of one batch.

        Args:
            ratio: ``r`` [B, T].
            weights: of :func:`importance_weights` [B, T].
            unmasked: of :func:`token_mask` [B, T].
            advantages: [B, 1] or [B, T].
            mask: tokens that take part in the loss [B, T].
        """
        mask = mask.bool()
        ratio, weights = ratio.detach().double(), weights.double()
        clipped = (weights != ratio) & mask
        positive, negative = (advantages > 0) & mask, (advantages < 0) & mask
        used = torch.where(unmasked & mask, weights, 0.0)
        ratio = torch.where(mask, ratio, 0.0)
        parts = (mask, positive, negative, clipped & positive, clipped & negative, mask & ~unmasked, ratio, used)
        sums = torch.stack([part.double().sum() for part in (*parts, used.square())])
        return cls(sums, ratio.max() if ratio.numel() else ratio.new_zeros(()))

    def metrics(self) -> dict[str, float]:
        """Shares, mean and maximum by name.

        ``clamped_pos`` and ``clamped_neg``: share of the tokens with a positive (negative) advantage whose weight was
        clipped. ``masked``: share of tokens that the mask leaves out. ``ess``: effective sample size of the weights,
        ``(Σw)² / (n Σw²)``, 1 where all tokens count alike.
        """
        tokens, positive, negative, clamped_pos, clamped_neg, masked, ratios, weights, squares = self.sums.tolist()
        count = max(tokens, 1.0)
        return {
            "clamped_pos": clamped_pos / max(positive, 1.0),
            "clamped_neg": clamped_neg / max(negative, 1.0),
            "masked": masked / count,
            "ratio_mean": ratios / count,
            "ratio_max": float(self.ratio_max),
            "ess": weights**2 / (count * squares) if squares else 0.0,
        }


def _sample_weights(kept_lengths: Tensor, kept: Tensor) -> Tensor:
    return 1.0 / (kept_lengths.clamp(min=1.0) * kept.sum().clamp(min=1))
