# SPDX-License-Identifier: Apache-2.0
"""CISPO, the reinforcement learning recipe of the MiniMax-M1 report (arXiv 2506.13585), as a TRL trainer.

Nothing is imported before a name is used, so that ``minimax_plugin.cispo.losses`` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimax_plugin.cispo.config import CISPOConfig
    from minimax_plugin.cispo.trainer import CISPOTrainer

__all__ = ["CISPOConfig", "CISPOTrainer"]

_MODULES = {"CISPOConfig": "config", "CISPOTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in ("trl", "accelerate", "datasets"):
            raise
        raise ImportError(
            f"{name} needs {library}, which is not installed: pip install 'minimax-plugin[train]'", name=library
        ) from error
    return getattr(module, name)
