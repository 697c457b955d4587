# SPDX-License-Identifier: Apache-2.0
"""Prints, as the last line of stdout, a JSON object: architecture -> class that vLLM resolves it to.

Run by ``minimax-plugin doctor`` in a process of its own. Loads plugins the way every vLLM process does.
"""

from __future__ import annotations

import json

from minimax_plugin.vllm_model.registration import MODEL_CLASSES


def resolve() -> dict[str, str]:
    """Load vLLM's plugins and import the class behind each architecture of this package."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    resolved = {}
    for architecture in MODEL_CLASSES:
        entry = ModelRegistry.models.get(architecture)
        if entry is None:
            resolved[architecture] = "nothing"
            continue
        model_class = entry.load_model_cls()
        resolved[architecture] = f"{model_class.__module__}:{model_class.__qualname__}"
    return resolved


if __name__ == "__main__":
    print(json.dumps(resolve()))
