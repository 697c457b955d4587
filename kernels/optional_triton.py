# SPDX-License-Identifier: Apache-2.0
"""Triton where it is installed, and just enough of a stand-in to define (never to run) the kernels where it is not.

Kernel modules import ``triton`` and ``tl`` from here, so that they can be imported on any machine.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any


def _define_only(function: Any = None, **_options: Any) -> Any:
    """What ``triton.jit`` does without Triton: keep the function, with or without options."""
    return function if function is not None else _define_only


triton: Any = SimpleNamespace(jit=_define_only)
tl: Any = SimpleNamespace(constexpr=object)
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

#: Read once: Triton decides at the definition of a kernel whether to interpret it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
