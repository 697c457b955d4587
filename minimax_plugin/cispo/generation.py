# SPDX-License-Identifier: Apache-2.0
"""How the trainer makes completions: the repetition stop, and the check of the first rollout."""

from __future__ import annotations

from typing import Any

import torch
from trl import GRPOTrainer

from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.metrics import Mismatch
from minimax_plugin.cispo.repetition import RepetitionRule, strip_forced_end
from minimax_plugin.cispo.rollout import judge_first_rollout


class Generation(GRPOTrainer):
    """Makes completions that end where they start to repeat themselves."""

    args: CISPOConfig
    repetition_rule: RepetitionRule | None
    _rollout_is_judged: bool = False

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Completions of the prompts of this process, and the log-probabilities they were sampled with, if known."""
        rule = self.repetition_rule
        if rule is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.use_vllm:
            completions, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            stopped = self.vllm_generation.stopped
        else:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            with rule.in_generate(model, self.eos_token_ids[0]) as kept:
                completions, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            completions, stopped = strip_forced_end(completions, kept)
        shares = torch.tensor(stopped, device=self.accelerator.device).float()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["repetition/truncated_frac"].append(self.accelerator.gather(shares).mean().item())
        return completions, logps

    def _judge_rollout(self, mismatch: Mismatch, mode: str) -> None:
        """Check the first rollout of the training, whose weights the engine has just been given."""
        if mode == "train" and not self._rollout_is_judged:
            self._rollout_is_judged = True
            judge_first_rollout(mismatch, self.args)
