# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a model may come from, checked before transformers opens any of them.

transformers joins the shard names of an index to the folder whatever they are, unpickles every file that does not end
in ``.safetensors``, and falls back to pickles where there is nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file, is_peft_available

from minimax_plugin.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_SUFFIX,
    CheckpointError,
    Fault,
    read_safetensors_header,
    require_safetensors,
    require_shard_names,
    require_sound_files,
    require_sound_index,
    weight_file_names,
)
from minimax_plugin.checkpoint_files import read_json

#: Arguments of ``from_pretrained`` that say where a repository lies.
_HUB_ARGUMENTS = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")

#: What transformers says of a repository without safetensors files, to users who never set it.
_WRONG_ADVICE = "Please do not set `use_safetensors=True`"


def require_safe_source(source: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Refuse what ``from_pretrained(source, **options)`` would read from outside the folder, or unpickle.

    Raises:
        CheckpointError: the files of the folder, or the index of the repository, are at fault.
        ValueError: an argument or the config asks for another file.
    """
    if options.get("use_safetensors") is False:
        raise ValueError("use_safetensors is False, expected True or nothing: reading a pickle runs code")
    source = str(source)
    source = _base_of_adapter(source, options) or source
    _require_no_other_file(source, options)
    variant = options.get("variant")
    if os.path.isdir(source):
        folder = Path(source, options.get("subfolder") or "")
        require_safetensors(folder, variant=variant)
        require_sound_files(folder, variant=variant)
    elif os.path.isfile(source):
        if not source.endswith(WEIGHTS_SUFFIX):
            expected = f"a folder, a repository or a {WEIGHTS_SUFFIX} file: reading a pickle runs code"
            raise ValueError(f"the model is the file {source}, expected {expected}")
        read_safetensors_header(source)
    else:
        index = _from_hub(source, weight_file_names(variant)[0], options)
        if index is not None:
            require_sound_index(index)


def require_safe_files(checkpoint_files: list[str], sharded_metadata: Mapping[str, Any] | None, source: str) -> None:
    """The same rule for the files that transformers has settled on, whichever way it came to them.

    Raises:
        CheckpointError: one of them is no safetensors file, or its index names a path.
    """
    if sharded_metadata is not None:
        require_shard_names(set(sharded_metadata["weight_map"].values()), source)
    for file in checkpoint_files:
        if not str(file).endswith(WEIGHTS_SUFFIX):
            raise CheckpointError(source, [Fault(Path(file).name, "", "a pickle", f"a {WEIGHTS_SUFFIX} file")])


def better_error(error: OSError, source: str) -> CheckpointError | None:
    """What to raise where transformers advises against safetensors, which would lead to pickles; None elsewhere."""
    if _WRONG_ADVICE not in str(error):
        return None
    expected = f"{' or '.join(weight_file_names())}: this package reads safetensors alone"
    return CheckpointError(source, [Fault(source, "", "no safetensors files", expected)])


def _require_no_other_file(source: str, options: Mapping[str, Any]) -> None:
    """``transformers_weights`` in a config makes transformers read that file, a pickle among others."""
    name = options.get("transformers_weights")
    config = options.get("config")
    if name is None and isinstance(config, PreTrainedConfig):
        name = getattr(config, "transformers_weights", None)
    elif name is None:
        if config is None and os.path.isfile(source):
            return
        try:
            found, _ = PreTrainedConfig.get_config_dict(config or source, **_hub_arguments(options))
            name = found.get("transformers_weights")
        except (OSError, ValueError):
            return  # reported when transformers loads it
    if name is not None:
        expected = f"it absent: weights are read from {' or '.join(weight_file_names())}"
        raise ValueError(f"transformers_weights is {name!r}, expected {expected}")


def _base_of_adapter(source: str, options: Mapping[str, Any]) -> str | None:
    """The model that transformers loads instead of ``source`` where that is an adapter without a model of its own."""
    if not is_peft_available() or os.path.isfile(source) or os.path.isfile(os.path.join(source, CONFIG_FILE)):
        return None
    path = _from_hub(source, "adapter_config.json", options)
    content = None if path is None else read_json(Path(path), [])
    base = (content or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def _from_hub(source: str, file: str, options: Mapping[str, Any]) -> str | None:
    """A file of a folder or a repository, downloaded into the cache if need be; None where there is none."""
    return cached_file(
        source,
        file,
        **_hub_arguments(options),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _hub_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _HUB_ARGUMENTS if options.get(key) is not None}
