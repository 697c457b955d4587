# SPDX-License-Identifier: Apache-2.0
"""How far the policy that generates is from the policy that is trained, and what it generates.

Shapes: ``B`` completions of one process, ``T`` tokens of the longest. With an ``accelerator`` every number is that of
all processes together, and all of them must call.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Quantiles and plots are taken from at most this many tokens of each process, evenly spaced.
SAMPLE_TOKENS = 65_536

#: Variance of probabilities that is rounding.
_NO_VARIANCE = 1e-24


@dataclass(frozen=True)
class Mismatch:
    """Log-probabilities of the same tokens by the trainer and by the engine that sampled them.

    Attributes:
        tokens: how many were compared.
        prob_pearson: correlation of the token probabilities (Figure 3 of the report: 0.9 before, 0.99 after the fp32
            head); NaN where one side does not vary.
        logp_diff_mean, logp_diff_max: of ``|log p_train - log p_rollout|`` over all tokens.
        logp_diff_p99: its 99th percentile.
        ratio_p01, ratio_p50, ratio_p99: percentiles of ``p_train / p_rollout``.
        sample: fp32 [n, 2] on the CPU, log-probabilities of the rollout and of the trainer that the percentiles are of.
    """

    tokens: int
    prob_pearson: float
    logp_diff_mean: float
    logp_diff_max: float
    logp_diff_p99: float
    ratio_p01: float
    ratio_p50: float
    ratio_p99: float
    sample: Tensor

    @classmethod
    def between(
        cls, train: Tensor, rollout: Tensor, mask: Tensor, accelerator: Accelerator | None = None
    ) -> Mismatch | None:
        """Compare log-probabilities.

        Args:
            train: by the trainer [B, T].
            rollout: by the engine [B, T]; NaN where it gave none, which leaves the token out.
            mask: tokens to compare [B, T].
            accelerator: to count all processes.

        Returns:
            None where there is no token to compare.
        """
        selected = mask.bool() & ~rollout.isnan()
        pairs = torch.stack([rollout[selected], train[selected]], dim=1).detach()
        logps = pairs.double()
        difference = (logps[:, 1] - logps[:, 0]).abs()
        x, y = logps.exp().unbind(1)
        sums = _total([torch.ones_like(x), x, y, difference], accelerator)
        count = sums[0].clamp(min=1.0)
        x, y = x - sums[1] / count, y - sums[2] / count
        moments = _total([x * x, y * y, x * y], accelerator) / count
        largest = difference.max() if len(difference) else difference.new_zeros(())
        sample = evenly_spaced(pairs.float(), SAMPLE_TOKENS)
        if accelerator is not None:
            largest = accelerator.gather(largest).max()
            padded = accelerator.pad_across_processes(sample, dim=0, pad_index=math.nan)
            sample = accelerator.gather(padded)
            sample = sample[~sample.isnan().any(dim=1)]
        if not sums[0]:
            return None
        ratios = (sample[:, 1] - sample[:, 0]).double()
        return cls(
            tokens=int(sums[0]),
            prob_pearson=_pearson(*moments.tolist()),
            logp_diff_mean=float(sums[3] / count),
            logp_diff_max=float(largest),
            logp_diff_p99=quantile(ratios.abs(), 0.99),
            ratio_p01=math.exp(quantile(ratios, 0.01)),
            ratio_p50=math.exp(quantile(ratios, 0.50)),
            ratio_p99=math.exp(quantile(ratios, 0.99)),
            sample=sample.cpu(),
        )

    def metrics(self) -> dict[str, float]:
        """Numbers by name."""
        names = (*("prob_pearson", "logp_diff_mean", "logp_diff_p99", "logp_diff_max"), "ratio_p01", "ratio_p50")
        return {name: getattr(self, name) for name in (*names, "ratio_p99")}


def perplexity(log_probs: Tensor, mask: Tensor, accelerator: Accelerator | None = None) -> float:
    """``exp(-mean log p)`` of the tokens in ``mask`` [B, T]; NaN without tokens. Tokens of log-probability NaN are out.

    The report moves to longer outputs once the perplexity of generated text has converged (section 5).
    """
    selected = mask.bool() & ~log_probs.isnan()
    values = log_probs[selected].detach().double()
    total, count = _total([values, torch.ones_like(values)], accelerator).tolist()
    return math.exp(min(-total / count, 700.0)) if count else math.nan


def quantile(values: Tensor, share: float) -> float:
    """The value below which ``share`` of the values lie, linear between neighbours; NaN of an empty tensor.

    ``torch.quantile`` refuses more than 2**24 values.
    """
    if not values.numel():
        return math.nan
    ordered = values.flatten().double().sort().values
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows of a tensor, evenly spaced over it."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device, dtype=torch.float64).long()]


def require_matplotlib() -> None:
    """
    Raises:
        ImportError: matplotlib is absent, with the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("mismatch_plot_steps needs matplotlib: pip install 'minimax-plugin[bench]'")


def plot_mismatch(mismatch: Mismatch, path: Path, step: int) -> None:
    """Scatter of token probabilities, rollout against training, as a PNG of 2,000 by 2,000 pixels.

    Args:
        mismatch: what to plot.
        path: file to write; its folder is made.
        step: number of updates so far, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rollout, train = mismatch.sample.exp().unbind(1)
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1)
    axes.scatter(rollout.numpy(), train.numpy(), s=6, alpha=0.3, linewidths=0, zorder=2)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("token probability in the rollout", fontsize=14)
    axes.set_ylabel("token probability in training", fontsize=14)
    axes.set_title(
        f"step {step}: Pearson {mismatch.prob_pearson:.6f}, mean |Δ log p| {mismatch.logp_diff_mean:.2e}, "
        f"largest {mismatch.logp_diff_max:.2e}",
        fontsize=14,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def _total(parts: list[Tensor], accelerator: Accelerator | None) -> Tensor:
    """Sums of tensors over all processes."""
    sums = torch.stack([part.sum() for part in parts])
    return sums if accelerator is None else accelerator.reduce(sums, reduction="sum")


def _pearson(variance_x: float, variance_y: float, covariance: float) -> float:
    if min(variance_x, variance_y) <= _NO_VARIANCE:
        return math.nan
    return covariance / math.sqrt(variance_x * variance_y)
