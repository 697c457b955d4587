# SPDX-License-Identifier: Apache-2.0
"""What MiniMax-M1 is, in pure Python: layer pattern, decay slopes, epsilons, tensor names and shapes, parameter counts.

Every constant that the Hugging Face and the vLLM model share is read from here, so the two cannot drift apart. The
module imports neither torch nor any model library and can be used to plan a deployment on a machine that has none.

Sources: the MiniMax-01 report (arXiv 2501.08313, section 2.2) for lightning attention and its decay, the MiniMax-M1
report (arXiv 2506.13585) for the model, the released ``config.json`` and safetensors index for names and dtypes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimax_plugin.config_fields import (
    LAYER_TYPES,
    REQUIRED_FIELDS,
    SHARED_MOE_MODES,
    LayerType,
    fields_of,
    head_dim_of,
    require_pattern,
    require_sound,
    rotary_dim_of,
)

#: ``architectures`` entry -> ``model_type`` of the checkpoints in the original format.
ORIGINAL_ARCHITECTURES: dict[str, str] = {
    "MiniMaxM1ForCausalLM": "minimax_m1",
    "MiniMaxText01ForCausalLM": "minimax_text_01",
}

#: Epsilon of the RMSNorm over all heads inside a lightning layer. The released module builds this norm with the class
#: default and not with ``rms_norm_eps`` (1e-5), which every other norm uses.
LIGHTNING_NORM_EPS = 1e-6

#: Why the recurrent state is fp32 in both backends, for the message that refuses another dtype (docs/kernels.md).
WHY_FP32_STATE = (
    "after 8,192 decode steps a bfloat16 lightning state has a relative output error of up to 0.42 and a float16 state "
    "of 1.9e-2, float32 stays below 4.4e-5"
)

#: Special tokens of the released tokenizer. The released config.json leaves bos and eos null.
RELEASED_VOCAB_SIZE = 200_064
BOS_TOKEN_ID = 200_019
EOS_TOKEN_ID = 200_020
PAD_TOKEN_ID = 200_000
UNK_TOKEN_ID = 200_021

#: From this id on the rows of the released embedding and LM head belong to no token: the tokenizer has about 200,030
#: entries. Sampling one of them shows as a missing word. Neither ``tokenizer.json`` nor the weights were at hand, so
#: the number is a guess on the safe side; :func:`minimax_plugin.vocabulary.padding_ids` adds what the weights show.
VOCAB_PADDING_START = 200_032


def layer_types_from_codes(attn_type_list: Sequence[int]) -> list[LayerType]:
    """Translate ``attn_type_list`` (0 = lightning, 1 = softmax) into layer types.

    Raises:
        ValueError: not a list, or an entry is neither 0 nor 1.
    """
    require_pattern("attn_type_list", attn_type_list)
    return [LAYER_TYPES[code] for code in attn_type_list]


def codes_from_layer_types(layer_types: Sequence[str]) -> list[int]:
    """Translate layer types into ``attn_type_list`` (0 = lightning, 1 = softmax).

    Raises:
        ValueError: not a list, or an entry is not one of the two layer types.
    """
    require_pattern("layer_types", layer_types)
    code_by_type: dict[str, int] = {layer_type: code for code, layer_type in LAYER_TYPES.items()}
    return [code_by_type[layer_type] for layer_type in layer_types]


def head_slopes(num_heads: int) -> list[float]:
    """Per-head decay rates before the layer factor, float64.

    A power of two gives ``2 ** (-8 * (h + 1) / num_heads)``. Any other count takes the rates of the next lower power
    of two and fills up with every second rate of the next higher one (the interpolation of ALiBi, arXiv 2108.12409).

    Raises:
        ValueError: ``num_heads`` is not a positive integer.
    """
    _require_positive("num_heads", num_heads)
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / lower) for h in range(lower)]
    if lower == num_heads:
        return slopes
    return slopes + head_slopes(2 * lower)[0::2][: num_heads - lower]


def lightning_slopes(
    num_heads: int, layer_idx: int, num_layers: int, *, tp_rank: int = 0, tp_size: int = 1
) -> list[float]:
    """Decay slopes of one lightning layer; one decode step multiplies the state of head h by ``exp(-slope[h])``.

    ``slope = head_slopes[h] * (1 - layer_idx / (num_layers - 1) + 1e-5)``, computed in float64 and rounded once to the
    nearest fp32 value. ``layer_idx`` counts all layers, softmax ones included. With a single layer the factor is
    ``1 + 1e-5``.

    Args:
        num_heads: heads of the whole layer.
        layer_idx: index of the layer among all layers.
        num_layers: number of all layers.
        tp_rank, tp_size: which contiguous share of the heads to return.

    Returns:
        ``num_heads / tp_size`` floats, each exactly representable in fp32.

    Raises:
        ValueError: ``layer_idx`` outside the model, or ``num_heads`` not divisible by ``tp_size``.
    """
    _require_positive("num_layers", num_layers)
    _require_positive("tp_size", tp_size)
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx is {layer_idx}, expected 0 <= layer_idx < num_layers = {num_layers}")
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank is {tp_rank}, expected 0 <= tp_rank < tp_size = {tp_size}")
    if num_heads % tp_size:
        raise ValueError(f"num_heads = {num_heads} is not divisible by tp_size = {tp_size}")
    depth = layer_idx / (num_layers - 1) if num_layers > 1 else 0.0
    factor = 1.0 - depth + 1e-5
    local = num_heads // tp_size
    return [_to_fp32(slope * factor) for slope in head_slopes(num_heads)[tp_rank * local : (tp_rank + 1) * local]]


def rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """``rotary_dim / head_dim``, rounded so that readers who truncate ``head_dim * factor`` get ``rotary_dim``."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors dtype (``BF16`` or ``F32``) of one checkpoint tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * {"BF16": 2, "F16": 2, "F32": 4}[self.dtype]


@dataclass(frozen=True)
class Architecture:
    """The sizes of one model of the MiniMax-M1 family. Construct with :meth:`from_config`; checked on construction.

    Raises:
        ValueError: any field that no such model can have; the message names the field, its value and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    layer_types: tuple[LayerType, ...]
    shared_intermediate_size: int = 0
    shared_moe_mode: str = "sigmoid"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        require_sound(vars(self))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any) -> Architecture:
        """Read the architecture from a ``config.json`` dictionary or a config object.

        Keys absent from the config take the defaults of the released modeling code: ``head_dim`` is
        ``hidden_size / num_attention_heads``, ``rotary_dim`` is ``head_dim``, no shared expert.

        Raises:
            ValueError: any field of the config is wrong, also one that the architecture does not depend on
                (:mod:`minimax_plugin.config_fields`).
        """
        fields = fields_of(config)
        require_sound(fields)
        codes = fields.get("attn_type_list")
        return cls(
            head_dim=head_dim_of(fields),
            rotary_dim=rotary_dim_of(fields),
            layer_types=tuple(fields["layer_types"] if codes is None else layer_types_from_codes(codes)),
            shared_intermediate_size=fields.get("shared_intermediate_size") or 0,
            shared_moe_mode=fields.get("shared_moe_mode", SHARED_MOE_MODES[0]),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            **{name: fields[name] for name in REQUIRED_FIELDS},
        )

    @property
    def lightning_layers(self) -> list[int]:
        return [i for i, layer_type in enumerate(self.layer_types) if layer_type == "linear_attention"]

    @property
    def softmax_layers(self) -> list[int]:
        return [i for i, layer_type in enumerate(self.layer_types) if layer_type == "full_attention"]

    def slopes(self, layer_idx: int, *, tp_rank: int = 0, tp_size: int = 1) -> list[float]:
        """:func:`lightning_slopes` of one layer of this model."""
        return lightning_slopes(
            self.num_attention_heads, layer_idx, self.num_hidden_layers, tp_rank=tp_rank, tp_size=tp_size
        )

    def state_shape(self, *, tp_size: int = 1) -> tuple[int, int, int]:
        """Shape ``(H / tp_size, D_k, D_v)`` of one sequence's recurrent state in one lightning layer, fp32."""
        return (self.num_attention_heads // tp_size, self.head_dim, self.head_dim)

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ValueError if the attention heads cannot be split over ``tp_size`` ranks."""
        _require_positive("tensor parallel size", tp_size)
        if self.num_attention_heads % tp_size:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by the tensor parallel size "
                f"{tp_size}; choose a divisor of {self.num_attention_heads}"
            )
        kv_heads = self.num_key_value_heads
        if kv_heads % tp_size and tp_size % kv_heads:
            raise ValueError(
                f"num_key_value_heads = {kv_heads} neither divides nor is divided by the tensor parallel size {tp_size}"
            )

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a checkpoint in the original format, by name, in layer order.

        ``self_attn.qkv_proj.weight`` of a lightning layer is laid out head by head, each head as ``[q | k | v]``.
        Router weights are F32, everything else is BF16.
        """
        return dict(self._iter_tensors())

    @property
    def num_parameters(self) -> int:
        return sum(spec.numel for spec in self.tensors().values())

    @property
    def num_activated_parameters(self) -> int:
        """Parameters that one token passes through, embedding and LM head left out (the "45.9B" of the M1 report)."""
        expert = 3 * self.hidden_size * self.intermediate_size
        idle = self.num_hidden_layers * (self.num_local_experts - self.num_experts_per_tok) * expert
        heads = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_parameters - idle - heads

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, the ``total_size`` of the safetensors index."""
        return sum(spec.nbytes for spec in self.tensors().values())

    def _iter_tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        hidden, inter = self.hidden_size, self.intermediate_size
        yield "model.embed_tokens.weight", TensorSpec((self.vocab_size, hidden), "BF16")
        for layer_idx, layer_type in enumerate(self.layer_types):
            prefix = f"model.layers.{layer_idx}"
            yield f"{prefix}.input_layernorm.weight", TensorSpec((hidden,), "BF16")
            for name, shape in self._attention_shapes(layer_type):
                yield f"{prefix}.self_attn.{name}.weight", TensorSpec(shape, "BF16")
            yield f"{prefix}.post_attention_layernorm.weight", TensorSpec((hidden,), "BF16")
            moe = f"{prefix}.block_sparse_moe"
            yield f"{moe}.gate.weight", TensorSpec((self.num_local_experts, hidden), "F32")
            for expert in range(self.num_local_experts):
                yield f"{moe}.experts.{expert}.w1.weight", TensorSpec((inter, hidden), "BF16")
                yield f"{moe}.experts.{expert}.w2.weight", TensorSpec((hidden, inter), "BF16")
                yield f"{moe}.experts.{expert}.w3.weight", TensorSpec((inter, hidden), "BF16")
            if self.shared_intermediate_size:
                shared = self.shared_intermediate_size
                yield f"{prefix}.shared_mlp.gate_proj.weight", TensorSpec((shared, hidden), "BF16")
                yield f"{prefix}.shared_mlp.up_proj.weight", TensorSpec((shared, hidden), "BF16")
                yield f"{prefix}.shared_mlp.down_proj.weight", TensorSpec((hidden, shared), "BF16")
                yield f"{prefix}.coefficient.weight", TensorSpec((1, hidden), "BF16")
        yield "model.norm.weight", TensorSpec((hidden,), "BF16")
        if not self.tie_word_embeddings:
            yield "lm_head.weight", TensorSpec((self.vocab_size, hidden), "BF16")

    def _attention_shapes(self, layer_type: LayerType) -> list[tuple[str, tuple[int, ...]]]:
        hidden = self.hidden_size
        inner = self.num_attention_heads * self.head_dim
        if layer_type == "linear_attention":
            return [
                ("qkv_proj", (3 * inner, hidden)),
                ("output_gate", (inner, hidden)),
                ("out_proj", (hidden, inner)),
                ("norm", (inner,)),
            ]
        kv_inner = self.num_key_value_heads * self.head_dim
        return [
            ("q_proj", (inner, hidden)),
            ("k_proj", (kv_inner, hidden)),
            ("v_proj", (kv_inner, hidden)),
            ("o_proj", (hidden, inner)),
        ]


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")


def _to_fp32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]
