# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2 keeps for hybrid models, and which prompts run as decodes."""

from __future__ import annotations

from typing import Any

from minimax_plugin.vllm_model.compat import MambaHybridModelState


class LightningModelState(MambaHybridModelState):
    """vLLM's state of hybrid models, with prompts of one token and placeholder drafts marked as decodes.

    The scheduler pads a prompt of one token that starts beside running requests. vLLM lets such a row decode only if it
    has a state already; as a prefill, its state would absorb the placeholders.
    """

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is not None:
            padded = input_batch.is_prefilling_np & (drafts > 0)
            decodes = input_batch.prefill_runs_as_decode_np
            input_batch.prefill_runs_as_decode_np = padded if decodes is None else decodes | padded
        return super().prepare_attn(input_batch, *args, **kwargs)
