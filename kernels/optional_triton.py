# SPDX-License-Identifier: Apache-2.0
"""Triton where it is installed, and just enough of a stand-in to define (never to run) the kernels where it is not.

Kernel modules import ``triton`` and ``tl`` from here, so that they can be imported on any machine.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

triton: Any = SimpleNamespace(jit=lambda function: function)
tl: Any = SimpleNamespace(constexpr=object)
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

#: Read once: Triton decides at the definition of a kernel whether to interpret it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
