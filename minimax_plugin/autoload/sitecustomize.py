# SPDX-License-Identifier: Apache-2.0
"""Imports the plugin in every Python process that a program under ``minimax-plugin run`` starts.

``run`` puts this folder on ``PYTHONPATH``, for its own children and for nobody else; ``trl`` and ``accelerate launch``
train in such children. Python imports a module of this name at its start. It is on no path otherwise.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

_HERE = os.path.realpath(os.path.dirname(__file__))

# The one that this file hides, if there is one.
_hidden = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != _HERE])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))

# A child may be another Python, which does not have the plugin.
if importlib.util.find_spec("minimax_plugin") is not None:
    import minimax_plugin  # noqa: F401
