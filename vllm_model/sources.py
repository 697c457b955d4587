# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a model may come from, checked before vLLM opens any of them.

vLLM refuses an index that leads out of the folder only after it has asked the hub for what the index names, and reads
pickles where there are no safetensors files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import huggingface_hub

from minimax_plugin.checkpoint import (
    INDEX_FILE,
    WEIGHTS_SUFFIX,
    require_safetensors,
    require_sound_files,
    require_sound_index,
)

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig

#: Values of ``--load-format`` that read pickles alone.
_PICKLE_FORMATS = ("pt", "npcache")

#: Values with which vLLM looks for the files of a repository on the hub.
_HUB_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")


def refuse_pickle_formats(load_config: LoadConfig) -> None:
    """Raise ValueError for a ``--load-format`` that unpickles."""
    stated = str(load_config.load_format)
    if stated in _PICKLE_FORMATS:
        raise ValueError(f"--load-format is {stated!r}, expected 'auto' or 'safetensors': reading a pickle runs code")


def require_safe_source(model_config: ModelConfig, load_config: LoadConfig) -> list[str] | None:
    """Check the files of a folder, or the index of a repository.

    Returns:
        Patterns of the files that vLLM may look for, None for its own choice: without an index, a repository could
        hold nothing but pickles.

    Raises:
        CheckpointError: with one line per fault.
    """
    source = model_config.model
    if model_config.model_weights:
        # In object storage, from where vLLM has fetched everything else.
        index = os.path.join(source, INDEX_FILE)
        if os.path.lexists(index):
            require_sound_index(index)
    elif os.path.isdir(source):
        require_safetensors(source, any_name=True)
        require_sound_files(source)
    elif str(load_config.load_format) in _HUB_FORMATS:
        cached = _index_of_repository(source, model_config.revision, load_config.download_dir)
        if cached is None:
            return [f"*{WEIGHTS_SUFFIX}"]
        require_sound_index(cached)
    return None


def _index_of_repository(source: str, revision: str | None, cache_dir: str | None) -> str | None:
    """The index in the cache of the hub, downloaded if need be; None where there is none or the hub is out of reach."""
    try:
        return huggingface_hub.hf_hub_download(source, INDEX_FILE, revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError):
        return None
