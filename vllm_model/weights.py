# SPDX-License-Identifier: Apache-2.0
"""Checkpoint names of either backend to vLLM's modules, and the check that a checkpoint was whole.

vLLM notices a parameter that was never touched, but all experts of a layer share two parameters: a missing expert would
leave uninitialised weights without a word. It also reads every safetensors file of a folder without an index, and a
tensor that two of them hold takes the value that comes last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from minimax_plugin.architecture import Architecture

#: Original names, names of converted (``-hf``) checkpoints, and the names that transformers holds in memory, which is
#: what a trainer sends one by one. Patterns carry no trailing dot, so they also rewrite the module names in LoRA
#: adapters and in the ignore lists of quantization configs.
NAME_MAPPER = WeightsMapper(
    orig_to_new_substr={
        ".self_attn.qkv_proj": ".self_attn.in_proj",
        # transformers calls the expert block `mlp` in its own model of the family.
        ".mlp.": ".block_sparse_moe.",
        ".experts.gate_up_proj": ".experts.w13",
        ".experts.down_proj": ".experts.w2",
    },
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".shared_mlp.gate_proj": (".shared_mlp.gate_up_proj", 0),
        ".shared_mlp.up_proj": (".shared_mlp.gate_up_proj", 1),
    },
    # Tables of decay powers that transformers' own model saves; they follow from the config.
    orig_to_new_suffix={
        ".self_attn.slope_rate": None,
        ".self_attn.query_decay": None,
        ".self_attn.key_decay": None,
        ".self_attn.diagonal_decay": None,
    },
)

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FUSED_EXPERTS = re.compile(r"(.*\.block_sparse_moe\.experts)\.(gate_up_proj|down_proj)$")
_SHOWN = 5

#: What vLLM says where it finds no file of the patterns it was given (0.31 to 0.33).
_NO_FILES = "Cannot find any model weights"


class WeightLedger:
    """Watches the tensors of one loading pass and says what was wrong or missing.

    Args:
        architecture: of the model.
        quantized: the checkpoint may hold packed weights under other names, of other shapes and dtypes.
        source: where the checkpoint is, for messages.
    """

    def __init__(self, architecture: Architecture, *, quantized: bool, source: str) -> None:
        self._specs = architecture.tensors()
        self._num_experts = architecture.num_local_experts
        self._quantized = quantized
        self._source = source
        self._names: set[str] = set()
        self._seen: set[str] = set()

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass ``(name, tensor)`` pairs through, checked.

        Raises:
            ValueError: a tensor has another shape or an unusable dtype or comes twice, or a file cannot be read.
        """
        try:
            for name, tensor in weights:
                if name in self._names:
                    raise ValueError(
                        f"tensor {name} of the checkpoint {self._source} comes twice; remove the files that "
                        "do not belong to it"
                    )
                self._names.add(name)
                original = name.replace(".mlp.", ".block_sparse_moe.")
                if not self._quantized:
                    self._check(name, original, tensor)
                self._record(original)
                yield name, tensor
        except SafetensorError as error:
            raise ValueError(f"cannot read the checkpoint {self._source}: {error}") from error
        except RuntimeError as error:
            if _NO_FILES not in str(error):
                raise
            raise ValueError(
                f"the checkpoint {self._source} has no safetensors files, the only format that this package reads"
            ) from error

    def require_complete(self, is_elsewhere: Callable[[str], bool]) -> None:
        """Raise ValueError naming the tensors that never came.

        Args:
            is_elsewhere: whether a tensor belongs to another rank.
        """
        missing = [name for name in self._specs if name.rsplit(".", 1)[0] not in self._seen and not is_elsewhere(name)]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise ValueError(
                f"the checkpoint {self._source} lacks {len(missing)} of the {len(self._specs)} tensors of this model: "
                f"{shown}"
            )

    def _check(self, name: str, original: str, tensor: Tensor) -> None:
        if tensor.dtype not in _FLOAT_DTYPES:
            raise ValueError(
                f"tensor {name} of the checkpoint {self._source} is {tensor.dtype}, expected one of {_FLOAT_DTYPES}: "
                "its config.json has no quantization_config"
            )
        spec = self._specs.get(original)
        if spec is not None and tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"tensor {name} of the checkpoint {self._source} has shape {tuple(tensor.shape)}, expected {spec.shape}"
            )

    def _record(self, name: str) -> None:
        fused = _FUSED_EXPERTS.match(name.removesuffix(".weight"))
        if fused is None:
            self._seen.add(name.rsplit(".", 1)[0])
            return
        parts = ("w1", "w3") if fused.group(2) == "gate_up_proj" else ("w2",)
        self._seen.update(f"{fused.group(1)}.{expert}.{part}" for expert in range(self._num_experts) for part in parts)
