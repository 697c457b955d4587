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
    from transformers import AutoConfig

    from minimax_plugin.hf_modeling.configuration_minimax_m1 import CONFIG_CLASSES

    for config_class in CONFIG_CLASSES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    _registered = True
    logger.debug("registered %s with transformers", ", ".join(c.model_type for c in CONFIG_CLASSES))
