# SPDX-License-Identifier: Apache-2.0
"""One step's loss: the report's objective with what TRL's trainer adds to any of its own.

Shapes: ``B`` completions of one process in one step, ``T`` tokens of the longest.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from minimax_plugin.cispo import losses, metrics, sampling
from minimax_plugin.cispo.config import CISPOConfig

logger = logging.getLogger(__name__)

#: Entries of a rollout that models of images take.
_MULTIMODAL = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


class Objective(GRPOTrainer):
    """Computes the loss of rollouts that carry ``kept`` and ``loss_weights``."""

    args: CISPOConfig
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None
    _window_tokens: float

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Eq. 4 to 7 of the report with TRL's additions: KL, entropy bonus, auxiliary loss and masks of tokens."""
        mode = "train" if self.model.training else "eval"
        args = self.args
        inputs = self._live_rows(inputs)
        mask = loss_mask(inputs) * inputs["kept"][:, None]
        log_probs, entropies, aux_loss = self._score_batch(model, inputs)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        base = self._base_log_probs(inputs, log_probs)
        ratio = losses.importance_ratio(log_probs.detach() - base, mask, args.log_ratio_bound)
        weights = losses.importance_weights(ratio, args.epsilon_is_high, args.epsilon_is_low)
        unmasked = losses.token_mask(
            ratio,
            advantages,
            args.token_mask,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            dual_clip_ratio=args.dual_clip_ratio,
        )
        factor, entropy_mask = self._trl_factor(inputs, log_probs, base, advantages, entropies, mask)
        terms = losses.token_losses(log_probs, weights * unmasked * factor, advantages)
        kl = self._kl(inputs, log_probs, base) if self.beta != 0.0 else torch.zeros_like(log_probs)
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        scale = self.accelerator.num_processes * (args.steps_per_generation if mode == "train" else 1) / accumulation
        loss = losses.aggregate(terms + self.beta * kl, mask, inputs["loss_weights"]) * scale
        if self._entropy_bonus_enabled:
            self._metrics[mode]["policy_loss"].append(self.accelerator.gather(loss.detach()).nanmean().item())
            loss = loss - self._entropy_bonus(entropies, mask * entropy_mask, mode) / accumulation
        if self.aux_loss_enabled:
            assert aux_loss is not None
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        statistics = losses.LossStatistics.of(ratio, weights, unmasked, advantages, mask)
        self._log_loss(statistics, entropies, kl, mask, mode)
        if mode == "train" and self._compare_in_loss and self.state.global_step == self._generated_at_step:
            self._describe_first_pass(inputs, log_probs, mask)
        return loss

    def _live_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The completions that take part in the loss: the others need no forward pass. One stays if there is none."""
        rows = inputs["kept"].nonzero().flatten()
        if len(rows) == len(inputs["kept"]) or "pixel_values" in inputs:
            return inputs
        return sampling.select_rows(inputs, rows if len(rows) else rows.new_zeros(1))

    def _score_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities [B, T], entropies [B, T] and auxiliary loss under the policy, with gradients."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _MULTIMODAL},
        )

    def _base_log_probs(self, inputs: dict[str, Any], log_probs: Tensor) -> Tensor:
        """Denominator of the ratio [B, T]: the old policy's log-probabilities, or the sampler's."""
        if self.args.importance_base == "sampler":
            if "sampling_per_token_logps" not in inputs:
                raise ValueError(
                    "importance_base is 'sampler', but the rollout has no log-probabilities; return them as 'logprobs' "
                    "from rollout_func, or use importance_base='train'"
                )
            sampler = inputs["sampling_per_token_logps"]
            return torch.where(sampler.isnan(), log_probs.detach(), sampler)  # vLLM gives NaN where it has none
        old = inputs.get("old_per_token_logps")
        return log_probs.detach() if old is None else old

    def _trl_factor(
        self,
        inputs: dict[str, Any],
        log_probs: Tensor,
        base: Tensor,
        advantages: Tensor,
        entropies: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What TRL multiplies token losses with, outside the cap [B, T], and its mask of high-entropy tokens [B, T]."""
        factor = torch.ones_like(base)
        entropy_mask = torch.ones_like(mask)
        if self.off_policy_mask_threshold is not None:
            factor = factor * self.get_off_policy_mask(
                advantages=advantages,
                per_token_logps=log_probs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", base),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile).to(mask.dtype)
            factor = factor * entropy_mask
        if self.vllm_importance_sampling_correction and "importance_sampling_ratio" in inputs:
            factor = factor * inputs["importance_sampling_ratio"]
        return factor, entropy_mask

    def _kl(self, inputs: dict[str, Any], log_probs: Tensor, base: Tensor) -> Tensor:
        """Estimate of the KL divergence to the reference model per token [B, T], as TRL's."""
        difference = inputs["ref_per_token_logps"] - log_probs
        kl = difference.exp() - difference - 1
        return kl * (log_probs - base).exp() if self.args.use_bias_correction_kl else kl

    def _entropy_bonus(self, entropies: Tensor, mask: Tensor, mode: str) -> Tensor:
        """Coefficient times mean entropy; in train mode the coefficient of the next update is adapted, as in TRL."""
        sums = torch.stack([(entropies * mask).sum(), mask.sum()])
        low = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        bonus = (self.entropy_coef if low else 0.0) * sums[0] / sums[1].clamp(min=1.0)
        if mode == "eval":
            return bonus
        if self.use_adaptive_entropy:
            earlier = self._entropy_window_stats
            self._entropy_window_stats = sums.detach() if earlier is None else earlier + sums.detach()
            if self.accelerator.sync_gradients:
                total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
                self._last_world_entropy = total / max(count, 1.0)
                self._entropy_window_stats = None
                args = self.args
                if self._last_world_entropy <= args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        if self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        return bonus

    def _log_loss(
        self, statistics: losses.LossStatistics, entropies: Tensor, kl: Tensor, mask: Tensor, mode: str
    ) -> None:
        """Log the statistics of all processes, and count the tokens of this update."""
        others = torch.stack([(entropies.detach() * mask).double().sum(), (kl.detach() * mask).double().sum()])
        sums = self.accelerator.reduce(torch.cat([statistics.sums, others]), reduction="sum")
        largest = self.accelerator.gather(statistics.ratio_max).max()
        tokens = float(sums[0])
        if mode == "train":
            self._window_tokens += tokens
        if not tokens:
            return
        for name, value in losses.LossStatistics(sums[:-2], largest).metrics().items():
            self._metrics[mode][f"cispo/{name}"].append(value)
        entropy, divergence = (sums[-2:] / tokens).tolist()
        self._metrics[mode]["entropy"].append(entropy)
        if self.beta != 0.0:
            self._metrics[mode]["kl"].append(divergence)

    def _describe_first_pass(self, inputs: dict[str, Any], log_probs: Tensor, mask: Tensor) -> None:
        """Log what could not be known of a rollout before the first pass of the loss over it."""
        sampler = inputs.get("sampling_per_token_logps")
        if sampler is None:
            value = metrics.perplexity(log_probs, mask, self.accelerator)
            self._record("train", "rollout", {"perplexity": value})
        else:
            self._compare(log_probs.detach(), sampler, mask, "train")


class SkipEmptyUpdates(TrainerCallback):
    """Leaves weights and moments alone where no token of an update took part in the loss.

    AdamW would else move weights by momentum and weight decay. An optimizer passes over parameters without gradient.
    """

    def __init__(self, trainer: Objective) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        skipped = not trainer._window_tokens and trainer.args.zero_variance != "keep"
        trainer._window_tokens = 0.0
        trainer._metrics["train"]["cispo/skipped_updates"].append(float(skipped))
        if not skipped:
            return
        logger.warning("Update %d is skipped: no group has any variance in its rewards", state.global_step + 1)
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def loss_mask(rollout: dict[str, Any]) -> Tensor:
    """Tokens [B, T] that the policy generated and that may take part in the loss."""
    mask: Tensor = rollout["completion_mask"]
    return mask * rollout["tool_mask"] if "tool_mask" in rollout else mask
