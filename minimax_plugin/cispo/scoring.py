# SPDX-License-Identifier: Apache-2.0
"""How the trainer scores completions: the token-chunked head, packing, replayed routes.

Shapes: ``B`` completions of one process, ``S`` tokens of prompt and completion, ``L`` routers, ``K`` experts per token.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.objective import Objective
from minimax_plugin.cispo.packing import ScoringOptions, install_scoring
from minimax_plugin.cispo.router_replay import RouterReplay, rollout_routes

logger = logging.getLogger(__name__)

#: Entry of a rollout: routes [B, S, L, K] int16, -1 where unknown.
ROUTES = "expert_routes"

_FROM_ENGINE = "tokens keep the experts that they had in vLLM"
_FROM_OLD_PASS = "tokens keep the experts of the old-policy pass"
_LIVE = "nothing to replay: a rollout is used for one update, with the weights that made it and no old-policy pass"


class Scoring(Objective):
    """Scores completions as the arguments ask for; rollouts carry ``expert_routes`` where they are replayed."""

    args: CISPOConfig
    router_replay: RouterReplay | None = None
    _old_pass_comes = False
    _routes: Tensor | None = None
    _said: frozenset[str] = frozenset()

    def install_scoring(self) -> None:
        """Change how the policy and its reference model score.

        Raises:
            ValueError: a model that this cannot be done with.
        """
        args = self.args
        if args.pack_sequences and self._is_vlm:
            raise ValueError("pack_sequences packs text only, but the model takes images; set pack_sequences to False")
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        if args.head_chunk_tokens is not None:
            options = ScoringOptions(
                temperature=self.temperature,
                chunk_tokens=args.head_chunk_tokens,
                compute_dtype=torch.float32 if args.cast_lm_head_to_fp32 else None,
                pack=args.pack_sequences,
                max_tokens=args.pack_max_tokens,
            )
            install_scoring(policy, options)
            if self.ref_model is not None:
                install_scoring(self.accelerator.unwrap_model(self.ref_model), replace(options, with_entropy=False))
        if args.router_replay != "off":
            self.router_replay = RouterReplay(policy, args.router_module)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with routes where they are replayed."""
        if self.router_replay is None:
            return super()._generate_and_score_completions(inputs)
        generate_every = self.args.steps_per_generation * self.num_iterations
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        misaligned = self.args.gradient_accumulation_steps % generate_every != 0
        # As TRL decides; with importance_base "sampler" the pass is left out.
        self._old_pass_comes = corrects or (misaligned and self.args.importance_base == "train")
        self._routes = None
        try:
            rollout = super()._generate_and_score_completions(inputs)
            if self._routes is None:
                mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
                self._routes = self._engine_routes(mask)
                self._say(_LIVE if self._routes is None else _FROM_ENGINE)
            if self._routes is not None:
                rollout[ROUTES] = self._routes
        finally:
            self._old_pass_comes, self._routes = False, None
        return rollout

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        score = super()._get_per_token_logps_and_entropies
        if not self._old_pass_comes or self.router_replay is None:
            return score(model, input_ids, attention_mask, *args, **kwargs)
        self._old_pass_comes = False  # TRL's first pass of a rollout; any that follows is the reference model's
        self._routes = self._engine_routes(attention_mask)
        if self._routes is not None:
            self._say(_FROM_ENGINE)
            with self.router_replay.replaying(self._routes):
                return score(model, input_ids, attention_mask, *args, **kwargs)
        with self.router_replay.recording() as recorded:
            result = score(model, input_ids, attention_mask, *args, **kwargs)
        self._routes = torch.cat(recorded)
        self._say(_FROM_OLD_PASS)
        return result

    def _score_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.router_replay is None or ROUTES not in inputs:
            return super()._score_batch(model, inputs)
        with self.router_replay.replaying(inputs[ROUTES]):
            result = super()._score_batch(model, inputs)
        mode = "train" if self.model.training else "eval"
        counts = self.accelerator.reduce(self.router_replay.pop_counts(), reduction="sum")
        if counts[1]:
            self._metrics[mode]["router_replay/rerouted"].append(float(counts[0] / counts[1]))
        self._metrics[mode]["router_replay/from_vllm"].append(float(self._engine_returns_routes()))
        return result

    def _engine_returns_routes(self) -> bool:
        return self.args.router_replay == "rollout" and self.vllm_generation.returns_routes

    def _engine_routes(self, attention_mask: Tensor) -> Tensor | None:
        """Routes of the completions that the engine has just returned, None where it returns none."""
        if self.router_replay is None or not self._engine_returns_routes():
            return None
        return rollout_routes(self.vllm_generation.routes, attention_mask, self.router_replay.layers)

    def _say(self, source: str) -> None:
        """Log where routes come from, once for every source."""
        if source not in self._said:
            self._said |= {source}
            logger.info("router replay (router_replay=%r): %s", self.args.router_replay, source)
