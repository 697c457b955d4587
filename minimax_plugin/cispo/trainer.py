# SPDX-License-Identifier: Apache-2.0
"""The CISPO trainer: a thin composition over TRL's ``GRPOTrainer``.

Every method that is overridden or relied on is listed in ``tests/cispo/test_trl_contract.py``, which fails when TRL
changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from minimax_plugin.cispo.config import CISPOConfig


class CISPOTrainer(GRPOTrainer):
    """Trains with CISPO (arXiv 2506.13585, section 3.1) instead of GRPO.

    Arguments are those of ``trl.GRPOTrainer``; ``args`` is a :class:`~minimax_plugin.cispo.config.CISPOConfig`.

    Raises:
        ValueError: arguments that do not fit together; raised before a model is loaded where that is possible.
    """

    _tag_names = ["trl", "cispo"]
    _name = "CISPO"
    _paper = {
        "title": "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        "id": "2506.13585",
    }

    args: CISPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable[..., list[float | None]] | list[Any] | None = None,
        args: CISPOConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = CISPOConfig(f"{name.rstrip('/').split('/')[-1]}-CISPO")
        if not isinstance(args, CISPOConfig):
            raise ValueError(f"args is a {type(args).__name__}, expected a CISPOConfig")
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.epsilon_high = args.importance_cap

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities [B, T], entropies [B, T] and auxiliary loss of the last ``logits_to_keep`` = T tokens."""
        return super()._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **multimodal,
        )

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Completions of the prompts of this process, and the log-probabilities they were sampled with, if known."""
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """One rollout of this process: prompts, completions, masks, advantages and old log-probabilities."""
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._compute_loss(model, inputs)
