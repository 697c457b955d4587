# SPDX-License-Identifier: Apache-2.0
"""What changes while training goes on: the length window and the mix of rewards (arXiv 2506.13585, sections 4 and 5).

Every class here is plain state that the trainer feeds once per rollout with figures of all processes, so that all of
them decide alike. ``state_dict`` and ``load_state_dict`` make a resumed run decide as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

#: Output windows of the report: 40K to 80K in steps of 8K.
REPORT_STAGES = (40_960, 49_152, 57_344, 65_536, 73_728, 81_920)


class LengthSchedule:
    """An output window that grows through ``stages``.

    It moves on when both conditions of the report hold: the perplexity of the generated text has converged, and the
    99th percentile of output lengths is near the window.

    Args:
        stages: ascending windows in tokens; a single one never moves.
        p99_share: the percentile is near when it is at least this share of the window.
        patience: rollouts over which perplexity is compared, at least 2.
        tolerance: perplexity has converged when the means of the older and the newer half of those rollouts differ by
            at most this share.

    Raises:
        ValueError: windows that do not ascend or are no positive integers, or a threshold out of range.
    """

    def __init__(
        self, stages: Sequence[int], *, p99_share: float = 0.9, patience: int = 8, tolerance: float = 0.02
    ) -> None:
        check_stages(stages)
        if not 0 < p99_share <= 1:
            raise ValueError(f"length_stage_p99_share is {p99_share}, expected a share above 0 and at most 1")
        if patience < 2:
            raise ValueError(f"length_stage_patience is {patience}, expected at least 2 rollouts")
        if not tolerance >= 0:
            raise ValueError(f"length_stage_tolerance is {tolerance}, expected a share of at least 0")
        self.stages = tuple(stages)
        self.stage = 0
        self._p99_share = p99_share
        self._patience = patience
        self._tolerance = tolerance
        self._perplexities: list[float] = []

    @classmethod
    def from_config(cls, config: Any) -> LengthSchedule | None:
        """The schedule that a ``CISPOConfig`` asks for, or None. Raises as the class does."""
        if config.length_stages is None:
            return None
        return cls(
            config.length_stages,
            p99_share=config.length_stage_p99_share,
            patience=config.length_stage_patience,
            tolerance=config.length_stage_tolerance,
        )

    @property
    def window(self) -> int:
        """Tokens that a completion may have."""
        return self.stages[self.stage]

    @property
    def is_last(self) -> bool:
        """Whether no longer window follows."""
        return self.stage == len(self.stages) - 1

    def observe(self, length_p99: float, perplexity: float) -> bool:
        """Take the figures of one rollout; True when the window has moved.

        Args:
            length_p99: 99th percentile of the completion lengths, in tokens.
            perplexity: ``exp(-mean log-probability)`` of the generated tokens.
        """
        if math.isfinite(perplexity):
            self._perplexities = [*self._perplexities, perplexity][-self._patience :]
        if self.is_last or length_p99 < self._p99_share * self.window or not self._has_converged():
            return False
        before = self.window
        self.stage += 1
        self._perplexities = []
        logger.info("the output window grows from %d to %d tokens", before, self.window)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "perplexities": list(self._perplexities), "stages": list(self.stages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the state belongs to other windows."""
        if list(state["stages"]) != list(self.stages):
            raise ValueError(
                f"the checkpoint was written with length_stages = {list(state['stages'])}, the run has "
                f"{list(self.stages)}; resume with the same"
            )
        self.stage = int(state["stage"])
        self._perplexities = [float(value) for value in state["perplexities"]]

    def _has_converged(self) -> bool:
        if len(self._perplexities) < self._patience:
            return False
        half = self._patience // 2
        older, newer = (sum(values) / len(values) for values in (self._perplexities[:half], self._perplexities[half:]))
        return abs(newer - older) <= self._tolerance * older


class RewardCurriculum:
    """Weights of the reward functions over time: linear between the steps given, constant before and after.

    The report starts with rewards that rules verify and mixes general ones in (section 4).

    Args:
        weights_at: update -> one weight per reward function, for example ``{0: [1, 0], 200: [0.7, 0.3]}``.
        num_rewards: number of reward functions.

    Raises:
        ValueError: no step, a step that is no integer from 0 on, another number of weights, a weight that is not
            finite.
    """

    def __init__(self, weights_at: Mapping[int | str, Sequence[float]], num_rewards: int) -> None:
        points: dict[int, list[float]] = {}
        for key, weights in weights_at.items():
            try:
                step = int(key)
            except ValueError:
                step = -1
            if step < 0:
                raise ValueError(f"reward_weight_schedule has the step {key!r}, expected an integer from 0 on")
            if len(weights) != num_rewards or not all(math.isfinite(weight) for weight in weights):
                raise ValueError(
                    f"reward_weight_schedule has {list(weights)} at step {step}, expected {num_rewards} finite "
                    "weights, one for each reward function"
                )
            points[step] = [float(weight) for weight in weights]
        if not points:
            raise ValueError("reward_weight_schedule is empty, expected at least one step")
        self._points = sorted(points.items())

    def weights(self, step: int) -> list[float]:
        """Weights at an update."""
        before = [point for point in self._points if point[0] <= step]
        after = [point for point in self._points if point[0] > step]
        if not before or not after:
            return list((before[-1] if before else after[0])[1])
        (low, start), (high, end) = before[-1], after[0]
        share = (step - low) / (high - low)
        return [(1 - share) * a + share * b for a, b in zip(start, end, strict=True)]


class LengthBiasMonitor:
    """Watches whether a reward pays for length (section 4.2: models that judge tend to prefer the longer answer).

    The figure is the correlation of reward and length within groups, averaged over rollouts with decay ``memory``. A
    verifiable reward has none by itself; one that stays high says that a judge wants recalibration.

    Args:
        threshold: correlation from which a warning is due, once per crossing.
        memory: share of the past in the running average.
    """

    def __init__(self, threshold: float = 0.5, memory: float = 0.9) -> None:
        if not 0 < threshold <= 1 or not 0 <= memory < 1:
            raise ValueError(
                f"length bias threshold {threshold} and memory {memory}, expected 0 < threshold <= 1, 0 <= memory < 1"
            )
        self.threshold = threshold
        self.value: float | None = None
        self._memory = memory
        self._warned = False

    def observe(self, rewards: Sequence[float], lengths: Sequence[int], group_size: int) -> float | None:
        """Take one rollout, groups in a row; the running average, or None while no group says anything.

        Rewards that are NaN (not applicable) are left out.
        """
        correlation = within_group_correlation(rewards, lengths, group_size)
        if correlation is not None:
            past = correlation if self.value is None else self.value
            self.value = self._memory * past + (1 - self._memory) * correlation
        if self.value is not None:
            if self.value >= self.threshold and not self._warned:
                logger.warning(
                    "rewards rise with length: correlation %.2f within groups (threshold %.2f). Check the reward for "
                    "length bias, or normalise it by length",
                    self.value,
                    self.threshold,
                )
            self._warned = self.value >= self.threshold
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]
        self._warned = bool(state["warned"])


def check_stages(stages: Sequence[int], context: int | None = None) -> None:
    """Check output windows, against the model's context (in tokens) if given.

    Raises:
        ValueError: windows that do not ascend, are no positive integers or exceed the context.
    """
    values = list(stages)
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"length_stages is {values}, expected ascending positive numbers of tokens")
    if any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"length_stages is {values}, expected ascending windows")
    if context is not None and values[-1] > context:
        raise ValueError(
            f"length_stages ends with {values[-1]}, expected at most {context}, the context of the model "
            "(max_position_embeddings)"
        )


def within_group_correlation(rewards: Sequence[float], lengths: Sequence[int], group_size: int) -> float | None:
    """Pearson correlation of reward and length after the mean of each group is taken off; None without variation."""
    if len(rewards) != len(lengths) or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"got {len(rewards)} rewards, {len(lengths)} lengths and groups of {group_size}, expected whole groups"
        )
    pairs: list[tuple[float, float]] = []
    for start in range(0, len(rewards), group_size):
        group = [
            (float(r), float(n))
            for r, n in zip(rewards[start : start + group_size], lengths[start : start + group_size], strict=True)
            if not math.isnan(r)
        ]
        if group:
            means = [sum(column) / len(group) for column in zip(*group, strict=True)]
            pairs += [(r - means[0], n - means[1]) for r, n in group]
    squares = [sum(pair[i] ** 2 for pair in pairs) for i in (0, 1)]
    if min(squares, default=0.0) <= 1e-12:
        return None
    return sum(r * n for r, n in pairs) / math.sqrt(squares[0] * squares[1])
