# SPDX-License-Identifier: Apache-2.0
"""Between the tensors of a checkpoint in the original format and the parameters of the model, in both directions.

All names are kept except those of the experts: ``experts.{e}.w1``, ``w2`` and ``w3`` of a layer become two tensors.
The conversion moves data and changes none, so what is loaded and saved again is equal bit for bit.
"""

from __future__ import annotations

from minimax_plugin.hf_modeling.compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    register_checkpoint_conversion_mapping,
)

#: Decay buffers that transformers' own MiniMax class writes into the checkpoints it saves; computed here instead.
IGNORED_CHECKPOINT_KEYS = [r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"]


def expert_converters() -> list[WeightConverter]:
    """w1 and w3 -> ``gate_up_proj`` [E, 2 * inter, hidden]; w2 -> ``down_proj`` [E, hidden, inter]."""
    return [
        WeightConverter(
            source_patterns=[".experts.*.w1.weight", ".experts.*.w3.weight"],
            target_patterns=".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=".experts.*.w2.weight",
            target_patterns=".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register_weight_mapping(model_type: str) -> None:
    """Make ``from_pretrained`` and ``save_pretrained`` convert the checkpoints of a model type.

    transformers applies mappings to classes from outside only where they are registered explicitly.
    """
    register_checkpoint_conversion_mapping(model_type, expert_converters(), overwrite=True)
