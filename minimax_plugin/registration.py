# SPDX-License-Identifier: Apache-2.0
"""What makes an installed plugin take effect: the entry point of vLLM and the call made by ``import minimax_plugin``.

Both are idempotent and name modules as strings, so neither backend is imported before it is needed.
"""

from __future__ import annotations

import importlib
import importlib.util

HF_REGISTRATION = "minimax_plugin.hf_modeling.registration"
VLLM_REGISTRATION = "minimax_plugin.vllm_model.registration"


def register_hf() -> None:
    """Register the Hugging Face side; imports transformers, never vLLM."""
    importlib.import_module(HF_REGISTRATION).register()


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; vLLM calls it in every one of its processes.

    Registers the Hugging Face side always and the vLLM side where vLLM is installed.
    """
    register_hf()
    if importlib.util.find_spec("vllm") is not None:
        importlib.import_module(VLLM_REGISTRATION).register()
