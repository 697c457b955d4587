# SPDX-License-Identifier: Apache-2.0
"""Applies the schedules to the trainer: once per rollout, before it is generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from minimax_plugin.cispo.checkpoint import ExactResume
from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.sampling import total_rewards
from minimax_plugin.cispo.schedule import LengthBiasMonitor, LengthSchedule, RewardCurriculum


class Stages(ExactResume):
    """Moves the output window, sets the late stage and the reward weights, and watches length bias."""

    args: CISPOConfig
    length_schedule: LengthSchedule | None
    reward_curriculum: RewardCurriculum | None
    length_bias: LengthBiasMonitor

    def start_schedules(self) -> None:
        """Make the schedules that the arguments ask for.

        Raises:
            ValueError: an argument of theirs that cannot be meant.
        """
        args = self.args
        self.length_schedule = LengthSchedule.from_config(args)
        self.reward_curriculum = None
        if args.reward_weight_schedule is not None:
            # A string, as the command line gives it, has become a dictionary in TrainingArguments.
            steps = cast(Mapping[int | str, Sequence[float]], args.reward_weight_schedule)
            self.reward_curriculum = RewardCurriculum(steps, len(self.reward_funcs))
        self.length_bias = LengthBiasMonitor(args.length_bias_threshold)
        self._apply_schedules()

    def resumable_state(self) -> dict[str, Any]:
        schedule = self.length_schedule.state_dict() if self.length_schedule else None
        return super().resumable_state() | {"length_schedule": schedule, "length_bias": self.length_bias.state_dict()}

    def load_resumable_state(self, state: Mapping[str, Any]) -> None:
        super().load_resumable_state(state)
        if self.length_schedule is not None and state["length_schedule"] is not None:
            self.length_schedule.load_state_dict(state["length_schedule"])
        self.length_bias.load_state_dict(state["length_bias"])
        self._apply_schedules()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            if self.length_schedule is not None and self.rollout_statistics:
                # Of the last rollout: its perplexity is known only once its first batch has been scored.
                statistics = self.rollout_statistics
                self.length_schedule.observe(statistics["length_p99"], statistics.get("perplexity", math.nan))
            self._apply_schedules()
        return super()._generate_and_score_completions(inputs)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            lengths = gather_object([len(ids) for ids in completion_ids_list])
            totals = total_rewards(rewards, self.reward_weights).tolist()
            bias = self.length_bias.observe(totals, lengths, self.num_generations)
            if bias is not None:
                self._metrics["train"]["length/bias"].append(bias)
        return rewards

    def _apply_schedules(self) -> None:
        if self.reward_curriculum is not None:
            weights = self.reward_curriculum.weights(self.state.global_step)
            self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        if self.length_schedule is None:
            return
        self._set_window(self.length_schedule.window)
        self._metrics["train"]["length/window"].append(float(self.length_schedule.window))
        if self.length_schedule.is_last:
            if self.args.late_stage_epsilon_is_high is not None:
                self.args.epsilon_is_high = self.args.late_stage_epsilon_is_high
            if self.args.late_stage_max_grad_norm is not None:
                self.args.max_grad_norm = self.args.late_stage_max_grad_norm

    def _set_window(self, tokens: int) -> None:
        """Let both ways of generating write this many tokens."""
        self.max_completion_length = tokens
        if self.use_vllm:
            self.vllm_generation.max_completion_length = tokens
        else:
            self.generation_config.max_new_tokens = tokens
            self.generation_kwargs["max_new_tokens"] = tokens
