# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: model classes as strings and the operator that splits compiled graphs.

vLLM calls this in every one of its processes (API server, engine core, each worker, the inspector of the registry), so
it is idempotent, touches no device and imports no model code.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

#: ``architectures`` entry of a checkpoint -> class, as ``package:Class``. "MiniMaxForCausalLM" are the converted
#: checkpoints whose names end in ``-hf``.
MODEL_CLASSES = {
    "MiniMaxM1ForCausalLM": "minimax_plugin.vllm_model:MiniMaxM1ForCausalLM",
    "MiniMaxText01ForCausalLM": "minimax_plugin.vllm_model:MiniMaxText01ForCausalLM",
    "MiniMaxForCausalLM": "minimax_plugin.vllm_model:MiniMaxForCausalLM",
}

_registered = False


def register() -> None:
    """Register the model classes and the splitting operator; safe to call again."""
    global _registered
    if _registered:
        return
    from vllm import ModelRegistry

    from minimax_plugin.vllm_model import compat

    compat.warn_if_untested()
    compat.add_splitting_op(compat.LIGHTNING_OP)
    for architecture, path in MODEL_CLASSES.items():
        ModelRegistry.register_model(architecture, path)
        compat.add_config_check(architecture, _check_engine_config)
    _registered = True
    logger.debug("registered %s with vLLM", ", ".join(MODEL_CLASSES))


def _check_engine_config(vllm_config: VllmConfig) -> None:
    from minimax_plugin.vllm_model.settings import require_fp32_state

    require_fp32_state(vllm_config.cache_config)
