# SPDX-License-Identifier: Apache-2.0
"""Rollouts, and which of their completions take part in the loss.

Shapes: ``B`` completions of one process, ``N`` completions of a rollout on all processes, ``P`` prompts with ``G``
completions each.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from minimax_plugin.cispo import losses, metrics, sampling
from minimax_plugin.cispo.checks import checked_reward
from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.generation import Generation
from minimax_plugin.cispo.objective import loss_mask

logger = logging.getLogger(__name__)


class Selection(Generation):
    """Makes rollouts with ``kept`` and ``loss_weights``."""

    args: CISPOConfig
    prompt_pool: sampling.PromptPool
    rollout_statistics: dict[str, float]
    reward_funcs: list[Any]
    _next_plot: int
    _is_refilling: bool = False

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        """Rewards [N, F] of all processes, checked for NaN and number."""
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = [checked_reward(function, name) for function, name in zip(functions, names, strict=True)]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        for column, (function, name) in enumerate(zip(functions, names, strict=True)):
            if isinstance(function, nn.Module) and not rewards[:, column].isfinite().all():
                raise ValueError(
                    f"reward model {name!r} returned {rewards[:, column].tolist()}, expected finite numbers"
                )
        self._rewards = rewards
        self._completion_lengths = [len(ids) for ids in completion_ids_list]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """One rollout of this process: prompts, completions, masks, advantages, old log-probabilities.

        Besides TRL's entries: ``kept`` bool [B], completions that take part in the loss, and ``loss_weights`` [B],
        which make the sum over a generation batch the mean over it (:func:`losses.completion_weights`).
        """
        if not self.model.training:
            return self._weighted(self._score_rollout(inputs))
        self._generated_at_step = self.state.global_step
        inputs = self._without_solved(inputs)
        rollout = self._score_rollout(inputs)
        if self.args.zero_variance == "refill":
            rollout = self._refilled(rollout, inputs)
        if self.args.retire_solved_at is not None:
            self._metrics["train"]["sampling/solved_prompts"].append(float(len(self.prompt_pool.solved)))
        return self._weighted(rollout)

    def _score_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout of these prompts, with the group of each completion and whether it is kept."""
        mode = "train" if self.model.training else "eval"
        generate_every = self.args.steps_per_generation * self.num_iterations
        misaligned = self.args.gradient_accumulation_steps % generate_every != 0
        self._old_pass_pending = self.args.importance_base == "sampler" and misaligned
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self._old_pass_pending = False
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        zero = sampling.zero_variance_groups(
            self._rewards,
            self.reward_weights,
            group_size,
            each=self.multi_objective_aggregation == "normalize_then_sum",
        )
        rows = torch.arange(len(inputs), device=zero.device) + self.accelerator.process_index * len(inputs)
        groups = rows // group_size
        keep_all = mode == "eval" or self.args.zero_variance == "keep"
        rollout |= {"group": groups, "kept": torch.ones_like(groups, dtype=torch.bool) if keep_all else ~zero[groups]}
        self._describe_rollout(rollout, float(zero.double().mean()), mode)
        if mode == "train" and self.args.retire_solved_at is not None:
            rates = sampling.pass_rates(self._rewards, self.reward_weights, group_size, self.args.solved_reward)
            keys = gather_object([sampling.prompt_key(row) for row in inputs])[::group_size]
            self.prompt_pool.retire(keys, rates, self.args.retire_solved_at)
        return rollout

    def _without_solved(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The prompts with those that are solved replaced; ends the training when there are no others."""
        if self.args.retire_solved_at is None or not self.prompt_pool.solved:
            return inputs
        keys = gather_object([sampling.prompt_key(row) for row in inputs])
        first_row = self.accelerator.process_index * len(inputs)
        inputs, left = self.prompt_pool.replace_solved(inputs, keys, first_row, self.num_generations)
        if left:
            logger.warning("Every prompt of the dataset is solved: the training ends")
            self.control.should_training_stop = True
        return inputs

    def _refilled(self, rollout: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The rollout with groups without variance replaced by new prompts' (DAPO's dynamic sampling)."""
        processes, group_size = self.accelerator.num_processes, self.num_generations
        rounds = 0
        free = self._free_rows(rollout)
        seen = set(gather_object([sampling.prompt_key(row) for row in inputs]))
        while sum(free) and rounds < self.args.max_refill_rounds:
            wanted = sampling.groups_to_draw(sum(free), group_size, processes)
            rows = self.prompt_pool.draw(wanted, avoid=seen)
            if not rows:
                break
            rounds += 1
            seen.update(sampling.prompt_key(row) for row in rows)
            repeated = [dict(row) for row in rows for _ in range(group_size)]
            share = len(repeated) // processes
            first = self.accelerator.process_index * share
            self._is_refilling = True
            try:
                fresh = self._score_rollout(repeated[first : first + share])
            finally:
                self._is_refilling = False
            usable = self.accelerator.gather(fresh["kept"])[::group_size].tolist()
            taken = sampling.groups_that_fit(usable, free, group_size)
            chosen = torch.tensor(taken, device=fresh["group"].device)[fresh["group"]]
            fresh["group"] = fresh["group"] + rounds * self.args.generation_batch_size
            sources = chosen.nonzero().flatten()
            slots = (~rollout["kept"]).nonzero().flatten()[: len(sources)]
            rollout = sampling.replace_rows(rollout, slots, fresh, sources, self._tokenizer.pad_token_id)
            free = self._free_rows(rollout)
        self._metrics["train"]["sampling/refill_rounds"].append(float(rounds))
        if sum(free):
            logger.warning(
                "%d of %d completions have no variance in their group after %d rounds of refilling",
                sum(free),
                self.args.generation_batch_size,
                rounds,
            )
        return rollout

    def _free_rows(self, rollout: dict[str, Any]) -> list[int]:
        return self.accelerator.gather((~rollout["kept"]).sum()[None]).tolist()

    def _weighted(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """The rollout with the weight of every completion in the loss."""
        lengths = loss_mask(rollout).sum(-1)
        groups, kept = self.accelerator.gather(rollout.pop("group")), self.accelerator.gather(rollout["kept"])
        weights = losses.completion_weights(
            self.accelerator.gather(lengths), groups, kept, self.args.loss_aggregation, self.args.sample_loss_weight
        )
        first = self.accelerator.process_index * len(lengths)
        rollout["loss_weights"] = weights[first : first + len(lengths)].float()
        return rollout

    def _describe_rollout(self, rollout: dict[str, Any], zero_variance: float, mode: str) -> None:
        """Log lengths, perplexity and, where both log-probabilities are known, the mismatch."""
        lengths = torch.tensor(self._completion_lengths, device=self.accelerator.device)
        length_p99 = metrics.quantile(self.accelerator.gather(lengths), 0.99)
        self._record(mode, "length", {"p99": length_p99}, {"length_p99": length_p99})
        self._record(mode, "sampling", {"zero_variance": zero_variance})
        train, sampler = rollout.get("old_per_token_logps"), rollout.get("sampling_per_token_logps")
        self._compare_in_loss = train is None
        known = sampler if train is None else train
        if known is not None:
            value = metrics.perplexity(known, loss_mask(rollout), self.accelerator)
            self._record(mode, "rollout", {"perplexity": value})
        if train is not None and sampler is not None:
            self._compare(train, sampler, loss_mask(rollout), mode)

    def _compare(self, train: Tensor, sampler: Tensor, mask: Tensor, mode: str) -> None:
        """Log how far the engine's log-probabilities are from the trainer's, and plot them when it is time."""
        mismatch = metrics.Mismatch.between(train, sampler, mask, self.accelerator)
        if mismatch is None:
            return
        self._record(mode, "rollout", mismatch.metrics())
        self._judge_rollout(mismatch, mode)
        step, every = self.state.global_step, self.args.mismatch_plot_steps
        if mode == "train" and every and step >= self._next_plot:
            self._next_plot = (step // every + 1) * every
            if self.accelerator.is_main_process:
                path = Path(self.args.output_dir) / "mismatch" / f"step-{step:06d}.png"
                metrics.plot_mismatch(mismatch, path, step)

    def _record(
        self, mode: str, prefix: str, values: dict[str, float], statistics: dict[str, float] | None = None
    ) -> None:
        for name, value in values.items():
            self._metrics[mode][f"{prefix}/{name}"].append(value)
        if mode == "train" and not self._is_refilling:  # refills are of the prompts that are left, not of all
            self.rollout_statistics |= values if statistics is None else statistics
