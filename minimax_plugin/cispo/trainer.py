# SPDX-License-Identifier: Apache-2.0
"""The CISPO trainer: a thin composition over TRL's ``GRPOTrainer``.

:mod:`~minimax_plugin.cispo.selection` makes rollouts, :mod:`~minimax_plugin.cispo.scoring` their log-probabilities,
:mod:`~minimax_plugin.cispo.objective` their loss,
:mod:`~minimax_plugin.cispo.stages` applies schedules, :mod:`~minimax_plugin.cispo.checkpoint` saves and resumes.

Every method of TRL that is overridden or relied on is listed in ``tests/cispo/test_trl_contract.py``, which fails when
TRL changes one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from minimax_plugin.cispo import metrics, sampling
from minimax_plugin.cispo.checks import check_before_loading
from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.objective import SkipEmptyUpdates
from minimax_plugin.cispo.repetition import RepetitionRule
from minimax_plugin.cispo.rollout import exact_generation
from minimax_plugin.cispo.scoring import Scoring
from minimax_plugin.cispo.selection import Selection
from minimax_plugin.cispo.stages import Stages

logger = logging.getLogger(__name__)

#: Endings of the names of metrics that are a maximum.
LARGEST = ("/ratio_max", "/logp_diff_max")


class CISPOTrainer(Stages, Selection, Scoring):
    """Trains with CISPO (arXiv 2506.13585, section 3.1) instead of GRPO.

    Arguments are those of ``trl.GRPOTrainer``; ``args`` is a :class:`~minimax_plugin.cispo.config.CISPOConfig`.

    Attributes:
        rollout_statistics: of the last rollout: ``perplexity`` of the generated text, ``length_p99`` in tokens,
            ``zero_variance`` share of groups; of the comparison with the engine those of
            :class:`~minimax_plugin.cispo.metrics.Mismatch`, where there is one.

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
        reward_funcs: Callable[..., Any] | list[Any] | None = None,
        args: CISPOConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = CISPOConfig(f"{name.rstrip('/').split('/')[-1]}-CISPO")
        if not isinstance(args, CISPOConfig):
            raise ValueError(f"args is a {type(args).__name__}, expected a CISPOConfig")
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        options = ("peft_config", "rollout_func", "environment_factory")
        check_before_loading(model, args, functions, train_dataset, **{name: kwargs.get(name) for name in options})
        if args.mismatch_plot_steps:
            metrics.require_matplotlib()
        self.repetition_rule = RepetitionRule.from_config(args)
        engine_arguments = cast("dict[str, Any] | None", args.vllm_llm_kwargs)  # text has become a dict by now
        with exact_generation(engine_arguments, self.repetition_rule, return_routes=args.router_replay == "rollout"):
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.rollout_statistics: dict[str, float] = {}
        self.prompt_pool = sampling.PromptPool(self.train_dataset, args.seed)
        if args.importance_base == "sampler":
            # One ratio and one cap: TRL must neither correct for the sampler nor score the old policy.
            self.vllm_importance_sampling_correction = False
        if args.zero_variance != "keep" and self.is_deepspeed_enabled:
            logger.warning("DeepSpeed cannot skip an update: batches without variance still move weights by momentum")
        self._old_pass_pending = False
        self._rewards = torch.empty(0)
        self._completion_lengths: list[int] = []
        self._generated_at_step: int | None = None
        self._compare_in_loss = False
        self._next_plot = 0
        self._window_tokens = 0.0
        self.start_schedules()
        self.install_scoring()
        self.add_callback(SkipEmptyUpdates(self))

    def resumable_state(self) -> dict[str, Any]:
        return super().resumable_state() | {"prompt_pool": self.prompt_pool.state_dict()}

    def load_resumable_state(self, state: Mapping[str, Any]) -> None:
        super().load_resumable_state(state)
        self.prompt_pool.load_state_dict(state["prompt_pool"])

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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities [B, T], entropies [B, T] and auxiliary loss of the last ``logits_to_keep`` = T tokens."""
        if self._old_pass_pending:  # the first pass of a rollout is the old policy's, which importance_base replaces
            self._old_pass_pending = False
            return None, None, None
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

    # Reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, which takes the mean of a metric since the last one; of a maximum, the largest is of interest."""
        recorded = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in recorded if name.endswith(LARGEST)]:
            recorded[name] = [max(recorded[name])]
        super().log(logs, start_time)
