# SPDX-License-Identifier: Apache-2.0
"""Windows move when both conditions hold, reward weights follow their points, length bias is what numpy says."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimax_plugin.cispo.schedule import (
    REPORT_STAGES,
    LengthBiasMonitor,
    LengthSchedule,
    RewardCurriculum,
    check_stages,
    within_group_correlation,
)


def feed(schedule: LengthSchedule, p99: float, perplexities: list[float]) -> list[bool]:
    return [schedule.observe(p99, value) for value in perplexities]


def test_the_report_s_windows() -> None:
    assert tuple(1024 * k for k in (40, 48, 56, 64, 72, 80)) == REPORT_STAGES
    check_stages(REPORT_STAGES, context=10_240_000)


def test_moves_when_perplexity_is_flat_and_lengths_near_the_window() -> None:
    schedule = LengthSchedule([100, 200, 300], patience=4, p99_share=0.9, tolerance=0.02)
    assert feed(schedule, 90, [2.0, 2.0, 2.0, 2.0]) == [False, False, False, True]
    assert (schedule.window, schedule.is_last) == (200, False)
    # Figures of the shorter window do not count for the next.
    assert feed(schedule, 180, [2.0, 2.0, 2.0]) == [False] * 3
    assert schedule.observe(180, 2.0)
    assert (schedule.window, schedule.is_last) == (300, True)
    assert not any(feed(schedule, 300, [2.0] * 20))


def test_short_outputs_keep_the_window() -> None:
    schedule = LengthSchedule([100, 200], patience=4, p99_share=0.9)
    assert not any(feed(schedule, 89.9, [2.0] * 20))
    assert schedule.observe(90.0, 2.0)


def test_moving_perplexity_keeps_the_window() -> None:
    schedule = LengthSchedule([100, 200], patience=4, tolerance=0.02)
    assert not any(feed(schedule, 100, [4.0 * 0.95**i for i in range(20)]))
    assert not any(feed(LengthSchedule([100, 200], patience=4), 100, [math.nan] * 20))
    # The means of the halves are 1.75 % and 2.5 % apart.
    near, far = (LengthSchedule([100, 200], patience=4, tolerance=0.02) for _ in range(2))
    assert feed(near, 100, [2.0, 2.0, 2.03, 2.04])[-1]
    assert not feed(far, 100, [2.0, 2.0, 2.05, 2.05])[-1]


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(1, 4)), max_size=40), st.integers(0, 40))
def test_a_resumed_schedule_decides_as_an_uninterrupted_one(rollouts: list[tuple[float, float]], cut: int) -> None:
    whole = LengthSchedule([100, 200, 300], patience=3, tolerance=0.3)
    moves = [whole.observe(*rollout) for rollout in rollouts]
    first, second = (LengthSchedule([100, 200, 300], patience=3, tolerance=0.3) for _ in range(2))
    parts = [first.observe(*rollout) for rollout in rollouts[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert parts + [second.observe(*rollout) for rollout in rollouts[cut:]] == moves
    assert second.state_dict() == whole.state_dict()


def test_state_of_other_windows_is_refused() -> None:
    state = LengthSchedule([100, 200]).state_dict()
    with pytest.raises(ValueError, match=r"written with length_stages = \[100, 200\], the run has \[100, 300\]"):
        LengthSchedule([100, 300]).load_state_dict(state)


@pytest.mark.parametrize("stages", [[], [0], [-1, 5], [True], [1.5], ["4"], [4, 4], [8, 4], [1, 3, 2]])
def test_windows_that_do_not_ascend_are_refused(stages: Any) -> None:
    with pytest.raises(ValueError, match="length_stages is .*, expected ascending"):
        LengthSchedule(stages)


def test_windows_beyond_the_context_are_refused() -> None:
    check_stages([10, 20], context=20)
    with pytest.raises(ValueError, match="length_stages ends with 21, expected at most 20, the context of the model"):
        check_stages([10, 21], context=20)


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ({"p99_share": 0}, "p99_share"),
        ({"p99_share": 1.1}, "p99_share"),
        ({"patience": 1}, "patience"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_thresholds_out_of_range_are_named(argument: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"length_stage_{name} is"):
        LengthSchedule([1, 2], **argument)


def test_reward_weights_are_linear_between_points() -> None:
    curriculum = RewardCurriculum({"10": [1, 0], 30: [0.5, 0.5], 40: [0, 2]}, 2)
    expected = {0: (1, 0), 10: (1, 0), 20: (0.75, 0.25), 30: (0.5, 0.5), 35: (0.25, 1.25), 40: (0, 2), 99: (0, 2)}
    for step, weights in expected.items():
        assert curriculum.weights(step) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "is empty"),
        ({-1: [1]}, "step -1"),
        ({"x": [1]}, "step 'x'"),
        ({0: [1, 2]}, "expected 1 finite"),
        ({0: [math.nan]}, "expected 1 finite"),
    ],
)
def test_bad_reward_weights_are_named(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward_weight_schedule .*{message}|{message}"):
        RewardCurriculum(weights, 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=8, max_size=8))
def test_length_bias_is_the_partial_correlation(rows: list[tuple[int, int]]) -> None:
    rewards, lengths = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    centred = [values - np.repeat(values.reshape(2, 4).mean(1), 4) for values in (rewards, lengths)]
    actual = within_group_correlation(list(rewards), [int(n) for n in lengths], 4)
    if min(np.abs(values).max() for values in centred) < 1e-9:
        assert actual is None
    else:
        assert actual == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-9)


def test_length_between_groups_is_no_bias() -> None:
    """A hard prompt with long answers and low rewards says nothing about the reward."""
    assert within_group_correlation([0, 1, 0, 1], [900, 900, 10, 10], 2) is None
    assert within_group_correlation([math.nan, 1, 0, 1], [5, 20, 10, 30], 2) == pytest.approx(1.0)


def test_length_bias_warns_once_per_crossing(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LengthBiasMonitor(threshold=0.5, memory=0.0)
    with caplog.at_level(logging.WARNING):
        for rewards in ([0, 1], [0, 1], [1, 0], [0, 1], [1, 1]):
            monitor.observe(rewards, [1, 2], 2)
    assert len(caplog.records) == 2 and "rewards rise with length" in caplog.text
    other = LengthBiasMonitor(threshold=0.5, memory=0.0)
    other.load_state_dict(monitor.state_dict())
    assert other.state_dict() == monitor.state_dict() == {"value": pytest.approx(1.0), "warned": True}


def constant(value: float) -> Any:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [value * sum(ids) / len(ids) for ids in completion_ids]

    reward.__name__ = f"reward_{value:g}"
    return reward


def test_the_trainer_moves_its_window_and_its_rewards(make_trainer: Any) -> None:
    """Completions of an untrained model fill every window, and a tolerance of 100 % calls any perplexity converged."""
    trainer = make_trainer(
        reward=[constant(1.0), constant(2.0)],
        max_steps=5,
        max_completion_length=4,
        length_stages=[4, 6, 9],
        length_stage_patience=2,
        length_stage_tolerance=1.0,
        length_stage_p99_share=0.5,
        late_stage_epsilon_is_high=1.5,
        late_stage_max_grad_norm=0.25,
        reward_weight_schedule={0: [1, 0], 4: [0, 1]},
        generation_kwargs={"min_new_tokens": 9},
        epsilon_is_high=4.0,
        max_grad_norm=1.0,
    )
    seen: list[tuple[Any, ...]] = []
    generate = trainer._score_rollout

    def watch(inputs: Any) -> Any:
        rollout = generate(inputs)
        lengths = rollout["completion_mask"].sum(-1)
        weights = [round(weight, 3) for weight in trainer.reward_weights.tolist()]
        seen.append((int(lengths.max()), trainer.args.epsilon_is_high, trainer.args.max_grad_norm, weights))
        return rollout

    trainer._score_rollout = watch
    trainer.train()
    assert [row[0] for row in seen] == [4, 4, 6, 6, 9]
    assert [row[1:3] for row in seen] == [(4.0, 1.0)] * 4 + [(1.5, 0.25)]
    assert [row[3] for row in seen] == [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
    state = trainer.resumable_state()
    assert state["length_schedule"]["stage"] == 2


def test_windows_beyond_the_model_are_refused_before_it_is_loaded(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="length_stages ends with 4096, expected at most 1024"):
        make_trainer(length_stages=[64, 4096])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"length_stages": [8, 4]}, "length_stages is"),
        ({"length_stages": [4, 8], "length_stage_patience": 0}, "length_stage_patience is 0"),
        ({"late_stage_max_grad_norm": 0.5}, "without length_stages there is no last stage"),
        ({"length_stages": [8], "late_stage_epsilon_is_high": 0.0}, "late_stage_epsilon_is_high is 0.0"),
        ({"length_bias_threshold": 0.0}, "length bias threshold 0.0"),
        ({"reward_weight_schedule": {0: [1, 2]}}, "expected 1 finite weights"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(make_trainer: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**config)
