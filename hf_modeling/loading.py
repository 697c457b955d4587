# SPDX-License-Identifier: Apache-2.0
"""Loading that refuses a damaged or incomplete checkpoint instead of filling the gaps with random weights.

transformers warns about tensors that are absent and goes on, casts integers to weights, and does not say which shard
is truncated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minimax_plugin.architecture import Architecture, TensorSpec
from minimax_plugin.checkpoint import (
    INDEX_FILE,
    CheckpointError,
    Fault,
    read_safetensors_header,
)
from minimax_plugin.hf_modeling.compat import EXPERT_PARALLEL_TRAINS
from minimax_plugin.hf_modeling.sources import better_error, require_safe_files, require_safe_source

logger = logging.getLogger(__name__)

#: Dtypes that hold plain weights. Anything else needs a quantisation config that says how to read it.
PLAIN_DTYPES = ("F32", "BF16", "F16", "F64")

_EXPERT_PART = ".block_sparse_moe.experts."


class StrictLoadingMixin:
    """Goes before ``PreTrainedModel`` in the bases of a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model, see ``PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: a shard is absent or truncated, the index names a file elsewhere or a tensor that is not
                there, a tensor is absent or has another shape or dtype than the architecture says, the weights are no
                safetensors files. One line per fault.
            ValueError: the arguments or the config ask for weights in another format, or the heads cannot be split
                over the tensor parallel size.
        """
        path = pretrained_model_name_or_path
        if not isinstance(path, (str, os.PathLike)) or kwargs.get("gguf_file"):
            return super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]
        require_safe_source(path, kwargs)
        try:
            return super().from_pretrained(path, *args, **kwargs | {"use_safetensors": True})  # type: ignore[misc]
        except OSError as error:
            better = better_error(error, str(path))
            if better is None:
                raise
            raise better from error

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        architecture = Architecture.from_config(model.config)
        _check_tensor_parallel(model, architecture)
        if state_dict is None:
            source = str(load_config.pretrained_model_name_or_path)
            require_safe_files(checkpoint_files or [], load_config.sharded_metadata, source)
        files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files and state_dict is None and not load_config.is_quantized:
            needs_head = hasattr(model, "lm_head")
            faults = list(_tensor_faults(files, architecture, needs_head, load_config.ignore_mismatched_sizes))
            _raise_if(faults, files[0].parent)
        parent = _parent_of(model)
        return parent._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        parent = _parent_of(model)
        loading_info = parent._finalize_model_loading(model, load_config, loading_info)
        # A head that is trained anew (classification) is legitimately absent; the decoder and its LM head are not.
        absent = sorted(key for key in loading_info.missing_keys if key.startswith((_prefix(model), "lm_head.")))
        if absent and not load_config.is_quantized:
            source = Path(str(load_config.pretrained_model_name_or_path or "given as a state_dict"))
            faults = [Fault("weights", f"parameter {key}", "nothing to load", "its values") for key in absent]
            _raise_if(faults, source)
        return loading_info


def _check_tensor_parallel(model: Any, architecture: Architecture) -> None:
    distributed_config = getattr(model.config, "distributed_config", None)
    if getattr(distributed_config, "enable_expert_parallel", False) and not EXPERT_PARALLEL_TRAINS:
        logger.warning(
            "expert parallelism of this transformers release gives wrong gradients; use it for inference only"
        )
    tp_size = getattr(distributed_config, "tp_size", None)
    if not tp_size:
        return
    architecture.check_tensor_parallel(tp_size)
    kv_heads = architecture.num_key_value_heads
    if kv_heads % tp_size:
        raise ValueError(
            f"num_key_value_heads = {kv_heads} is not divisible by the tensor parallel size {tp_size}; transformers "
            f"keeps no head twice, choose a divisor of {kv_heads}"
        )


def _tensor_faults(
    files: Iterable[Path], architecture: Architecture, needs_head: bool, ignore_mismatched_sizes: bool
) -> Iterable[Fault]:
    """Compare the tensors of a checkpoint in the original format with the architecture; headers only."""
    stored: dict[str, tuple[str, TensorSpec]] = {}
    for file in files:
        stored |= {name: (file.name, spec) for name, spec in read_safetensors_header(file).items()}
    expected = architecture.tensors()
    for name, (file_name, spec) in stored.items():
        if name not in expected:
            continue
        if spec.dtype not in PLAIN_DTYPES:
            dtypes = f"one of {', '.join(PLAIN_DTYPES)} (or a quantization_config in config.json)"
            yield Fault(file_name, f"tensor {name}", f"dtype {spec.dtype}", dtypes)
        if spec.shape != expected[name].shape and not ignore_mismatched_sizes:
            yield Fault(file_name, f"tensor {name}", f"shape {list(spec.shape)}", str(list(expected[name].shape)))
    if not any(name.startswith("model.layers.") for name in stored):
        return  # Saved from the bare decoder under other names; what is absent is found after loading.
    source = INDEX_FILE if len({file for file, _ in stored.values()}) > 1 else next(iter(stored.values()))[0]
    fused = any(name.endswith("experts.gate_up_proj") for name in stored)
    for name in expected:
        optional = (fused and _EXPERT_PART in name) or (name == "lm_head.weight" and not needs_head)
        if name not in stored and not optional:
            yield Fault(source, f"tensor {name}", "no such tensor", str(list(expected[name].shape)))


def _parent_of(model: Any) -> Any:
    """The next class after the mixin, for static methods, which have no ``super()``."""
    return super(StrictLoadingMixin, model)


def _prefix(model: Any) -> str:
    prefix = model.base_model_prefix
    return f"{prefix}." if hasattr(model, prefix) else ""


def _raise_if(faults: list[Fault], source: Path) -> None:
    if faults:
        raise CheckpointError(source, faults)
