# SPDX-License-Identifier: Apache-2.0
"""Everything private or moving of transformers that the model relies on, each with the versions it was checked on.

The names below are the same in 5.16.1, 5.19 and 5.23, but are not part of the documented interface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.models.auto import tokenization_auto
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# transformers 5.16 runs the experts of each rank on all tokens and adds up; later ones send tokens to their experts.
# The gradients of 5.16 are wrong, those of its own Mixtral by a third; its logits are right.
EXPERT_PARALLEL_TRAINS = "ep_dispatch_experts" in ALL_PARALLEL_STYLES

_MOE = "layers.*.block_sparse_moe"
EXPERT_PARALLEL_PLAN = {
    f"{_MOE}.experts.gate_up_proj": "grouped_gemm",
    f"{_MOE}.experts.down_proj": "grouped_gemm",
}
if EXPERT_PARALLEL_TRAINS:
    EXPERT_PARALLEL_PLAN |= {f"{_MOE}.experts": "ep_dispatch_experts"}
else:
    EXPERT_PARALLEL_PLAN |= {f"{_MOE}.gate": "ep_router", f"{_MOE}.experts": "moe_tp_experts"}

__all__ = [
    "ALL_PARALLEL_STYLES",
    "EXPERT_PARALLEL_PLAN",
    "EXPERT_PARALLEL_TRAINS",
    "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
    "TOKENIZER_MAPPING_NAMES",
    "TensorParallelLayer",
    "Concatenate",
    "MergeModulelist",
    "OutputRecorder",
    "WeightConverter",
    "capture_outputs",
    "merge_with_config_defaults",
    "register_checkpoint_conversion_mapping",
    "use_experts_implementation",
    "wrap_tokenizer_config",
]


def wrap_tokenizer_config(change: Callable[..., dict[str, Any]]) -> None:
    """Let ``change(path, tokenizer_config, **kwargs)`` alter what ``AutoTokenizer`` reads; safe to call again.

    ``AutoTokenizer.from_pretrained`` chooses the class by the file's ``auto_map`` before it asks any table that can be
    registered with, and has no other seam (5.16.1 to 5.23).
    """
    read = getattr(tokenization_auto.get_tokenizer_config, "__wrapped__", tokenization_auto.get_tokenizer_config)

    @functools.wraps(read)
    def get_tokenizer_config(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        tokenizer_config = read(pretrained_model_name_or_path, *args, **kwargs)
        return change(pretrained_model_name_or_path, tokenizer_config, **kwargs)

    tokenization_auto.get_tokenizer_config = get_tokenizer_config
