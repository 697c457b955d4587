# SPDX-License-Identifier: Apache-2.0
"""Figures about rollouts against numpy's."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimax_plugin.cispo import metrics
from minimax_plugin.cispo.metrics import Mismatch


def log_probs(rows: int = 6, tokens: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rollout = -4 * torch.rand(rows, tokens, generator=generator)
    train = rollout + 0.1 * torch.randn(rows, tokens, generator=generator)
    mask = (torch.rand(rows, tokens, generator=generator) > 0.3).long()
    rollout[2, 3], mask[2, 3] = math.nan, 1  # vLLM gave no probability
    train[mask == 0] = 7.0  # must not be read
    return train, rollout, mask


def test_mismatch_is_numpys() -> None:
    train, rollout, mask = log_probs()
    mismatch = Mismatch.between(train, rollout, mask)
    assert mismatch is not None
    used = mask.bool() & ~rollout.isnan()
    x, y = rollout[used].double().numpy(), train[used].double().numpy()
    assert mismatch.tokens == len(x) == int(mask.sum()) - 1
    assert mismatch.metrics() == pytest.approx(
        {
            "prob_pearson": np.corrcoef(np.exp(x), np.exp(y))[0, 1],
            "logp_diff_mean": np.abs(y - x).mean(),
            "logp_diff_p99": np.quantile(np.abs(y - x), 0.99),
            "logp_diff_max": np.abs(y - x).max(),
            "ratio_p01": np.quantile(np.exp(y - x), 0.01),
            "ratio_p50": np.quantile(np.exp(y - x), 0.50),
            "ratio_p99": np.quantile(np.exp(y - x), 0.99),
        },
        rel=1e-3,  # quantiles of log ratios and of ratios differ between two neighbours
    )
    assert mismatch.prob_pearson == pytest.approx(np.corrcoef(np.exp(x), np.exp(y))[0, 1], abs=1e-12)
    assert mismatch.logp_diff_mean == pytest.approx(np.abs(y - x).mean(), rel=1e-12)


def test_equal_probabilities_correlate_fully() -> None:
    train, _, mask = log_probs()
    mismatch = Mismatch.between(train, train, mask)
    assert mismatch is not None
    assert mismatch.prob_pearson == pytest.approx(1.0, abs=1e-12)
    assert (mismatch.logp_diff_max, mismatch.ratio_p01, mismatch.ratio_p99) == (0.0, 1.0, 1.0)


def test_nothing_to_compare() -> None:
    train, rollout, mask = log_probs()
    assert Mismatch.between(train, rollout, torch.zeros_like(mask)) is None
    one = torch.full((1, 3), -1.0)
    mismatch = Mismatch.between(one, one, torch.ones(1, 3))
    assert mismatch is not None and math.isnan(mismatch.prob_pearson), "a constant correlates with nothing"


def test_percentiles_of_many_tokens_are_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SAMPLE_TOKENS", 100)
    rollout = torch.zeros(10, 1000)
    train = torch.linspace(0, 1, 10_000).view(10, 1000)
    mismatch = Mismatch.between(train, rollout, torch.ones(10, 1000))
    assert mismatch is not None
    assert len(mismatch.sample) == 100 and mismatch.tokens == 10_000
    assert mismatch.logp_diff_p99 == pytest.approx(0.99, abs=0.01)
    assert mismatch.logp_diff_mean == pytest.approx(0.5, abs=1e-6), "means are of all tokens"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 101])
def test_quantile_is_numpys(share: float, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert metrics.quantile(values, share) == pytest.approx(np.quantile(values.double().numpy(), share), abs=1e-12)
    assert math.isnan(metrics.quantile(values[:0], share))


def test_perplexity() -> None:
    values = torch.tensor([[math.log(0.5), math.log(0.125), math.nan], [math.log(0.25), -99.0, math.nan]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert metrics.perplexity(values, mask) == pytest.approx(4.0)
    assert math.isnan(metrics.perplexity(values, torch.zeros(2, 3)))


def test_plot_is_wide_and_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def recorded(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recorded)
    mismatch = Mismatch.between(*log_probs())
    assert mismatch is not None
    path = tmp_path / "plots" / "step.png"
    metrics.plot_mismatch(mismatch, path, step=7)
    header = path.read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:24])
    assert header.startswith(b"\x89PNG") and width >= 1600 and height >= 1600
    (axes,) = figures[0].axes
    assert "rollout" in axes.get_xlabel() and "training" in axes.get_ylabel() and "step 7" in axes.get_title()
    points = np.asarray(axes.collections[0].get_offsets())
    assert len(points) == mismatch.tokens
    np.testing.assert_allclose(points, mismatch.sample.exp().numpy())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'minimax-plugin\[bench\]'"):
        metrics.require_matplotlib()
