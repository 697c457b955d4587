# SPDX-License-Identifier: Apache-2.0
"""Curves of a training run as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: Panels: title, unit of the vertical axis, and the logged names with their labels. Names end a logged key.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "mean reward", {"reward": "training rollouts", "eval_reward": "held out"}),
    ("Completion length", "tokens", {"completions/mean_length": "mean", "completions/max_length": "longest"}),
    (
        "Importance weights",
        "share of tokens",
        {"cispo/clamped_pos": "clamped, A > 0", "cispo/clamped_neg": "clamped, A < 0", "cispo/masked": "masked"},
    ),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Gradient norm before clipping", "norm", {"grad_norm": "gradient"}),
    ("Groups without reward variance", "share of groups", {"frac_reward_zero_std": "zero variance"}),
)

#: Blue, vermilion and green of Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw reward, length, clamping, entropy and gradient norm over updates to a PNG of 2,400 by 1,350 pixels.

    Args:
        log_history: ``trainer.state.log_history``.

    Returns:
        False, with a line in the log, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no curves are drawn: matplotlib is not installed (pip install 'minimax-plugin[bench]')")
        return False
    figure = Figure(figsize=(16, 9), dpi=150, layout="constrained")
    for axes, (title, unit, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for colour, (name, label) in zip(_COLOURS, names.items(), strict=False):
            points = [(row["step"], row[name]) for row in log_history if name in row and "step" in row]
            if points:
                marker = "o" if name.startswith("eval_") else ""
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel("updates")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    figure.savefig(path)
    return True
