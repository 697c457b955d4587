# SPDX-License-Identifier: Apache-2.0
"""Registration of the configuration, model and tokenizer classes with the auto classes of transformers.

transformers 5 has no entry point for plugins, so ``import minimax_plugin`` runs :func:`register`.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_registered = False


def register() -> None:
    """Make the auto classes of transformers resolve this plugin's classes; safe to call again.

    A locally registered class outside transformers wins over the ``auto_map`` of a checkpoint whatever
    ``trust_remote_code`` is, so users may keep or drop that argument.
    """
    global _registered
    if _registered:
        return
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from minimax_plugin.hf_modeling import modeling_minimax_m1 as modeling
    from minimax_plugin.hf_modeling.configuration_minimax_m1 import CONFIG_CLASSES
    from minimax_plugin.hf_modeling.tokenization import register_tokenizers
    from minimax_plugin.hf_modeling.weight_mapping import register_weight_mapping

    for config_class in CONFIG_CLASSES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model_classes in {
        AutoModel: (modeling.MiniMaxM1Model, modeling.MiniMaxText01Model),
        AutoModelForCausalLM: (modeling.MiniMaxM1ForCausalLM, modeling.MiniMaxText01ForCausalLM),
        AutoModelForSequenceClassification: (
            modeling.MiniMaxM1ForSequenceClassification,
            modeling.MiniMaxText01ForSequenceClassification,
        ),
    }.items():
        for model_class in model_classes:
            auto_class.register(model_class.config_class, model_class, exist_ok=True)
            register_weight_mapping(model_class.config_class.model_type)
    register_tokenizers()
    _registered = True
    logger.debug("registered %s with transformers", ", ".join(c.model_type for c in CONFIG_CLASSES))
