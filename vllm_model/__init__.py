# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 and MiniMax-Text-01 for vLLM.

vLLM's registry refers to the classes by the name of this package, not of a module in it: vLLM caches what it learns
about a model class under a hash of the named file, and only for a package does the hash cover every file below it.
Nothing is imported before a class is asked for, so that registration stays cheap and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimax_plugin.vllm_model.model import (
        MiniMaxForCausalLM,
        MiniMaxM1ForCausalLM,
        MiniMaxText01ForCausalLM,
    )

__all__ = ["MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("minimax_plugin.vllm_model.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
