# SPDX-License-Identifier: Apache-2.0
"""Values that a field of ``config.json`` may not have, and values that it may, written from the released config.

Nothing is read from the package: what is right and wrong about a field stands here a second time.
"""

from __future__ import annotations

import math
from typing import Any

HUGE = 10**5000
DEEP: list[Any] = []
for _ in range(2000):
    DEEP = [DEEP]

_NO_NUMBERS: tuple[Any, ...] = ("8", "", True, False, [8], [], {"a": 1}, {}, math.inf, -math.inf, math.nan)
_NO_INTEGERS: tuple[Any, ...] = (*_NO_NUMBERS, 3.5, 8.0, -1, HUGE, -HUGE)
_NO_CODES: tuple[Any, ...] = (2, -1, True, False, 1.0, "1", None, [1], {}, math.nan, HUGE, DEEP)
_NO_SIZES: tuple[Any, ...] = (*_NO_INTEGERS, 0, 10**12)
_NO_FLAGS: tuple[Any, ...] = ("false", "true", "", 0, 1, 1.0, math.nan, [], [True], {}, DEEP)
_NO_WORDS: tuple[Any, ...] = (5, 1.5, True, "", "gelu", "silu ", "\n", [], ["silu"], {}, DEEP)
_NO_LISTS: tuple[Any, ...] = ("0,0,0,1", "", 1, True, 1.5, {}, {"0": 1}, [], DEEP)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
FACTORS = tuple(
    f"layernorm_{part}_{kind}" for part in ("linear_attention", "full_attention", "mlp") for kind in ("alpha", "beta")
)
CONVERTED_FACTORS = tuple(
    f"{part}_{kind}_factor" for part in ("linear_attn", "full_attn", "mlp") for kind in ("alpha", "beta")
)
SHARES = ("attention_dropout", "router_jitter_noise")
FLAGS = ("postnorm", "tie_word_embeddings", "use_cache", "output_router_logits", "mask_vocab_padding")
_ROPE = ("rope_parameters", "rope_scaling")
_BAD_ROPE = (
    "yarn",
    5,
    True,
    1.5,
    [1],
    {"rope_type": 5},
    {"rope_type": None},
    {"rope_type": "spiral"},
    {"rope_type": ["linear"]},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": -2.0},
    {"rope_type": "linear", "factor": True},
    {"rope_type": "linear", "factor": math.inf},
    {"rope_type": "linear", "factor": None},
    {"rope_type": "linear", "factor": HUGE},
    {"type": "linear", "rope_type": "dynamic", "factor": 2.0},
    {"type": "spiral", "factor": 2.0},
    {"rope_type": "dynamic"},
    {"rope_type": "proportional", "rope_theta": 10_000_000},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": -1e4},
    {"rope_type": "default", "rope_theta": "1e4"},
    {"rope_type": "default", "rope_theta": math.nan},
    {"rope_type": "default", "partial_rotary_factor": 0},
    {"rope_type": "default", "partial_rotary_factor": 1.5},
    {"rope_type": "default", "partial_rotary_factor": True},
    {"rope_type": "default", "partial_rotary_factor": math.nan},
    {"rope_type": "default", "rope_dim": 8},
    {"rope_type": "default", "mrope_section": [4, 4]},
    {"full_attention": {"rope_type": "default"}},
    {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1},
    {"rope_type": "yarn", "factor": 2.0, "truncate": "no"},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1.5},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
    {"rope_type": "llama3", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": "1.0"},
    {"rope_type": "longrope", "short_factor": [1.0] * 7 + [0], "long_factor": [1.0] * 8},
    {"rope_type": DEEP},
)

#: Field -> values that no such model can have. The base is ``oracle.tiny_config()``.
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SIZES, (*_NO_SIZES, None, DEEP)),
    # In each of four layers; the sum is bounded too.
    "num_local_experts": (*_NO_SIZES, None, DEEP, 1, 40_000, 65_536),
    "num_experts": (*_NO_SIZES, None, 5),
    "head_dim": (*_NO_SIZES, 8, 15),
    "rotary_dim": (*_NO_SIZES, 15, 34, 64),
    "block_size": (*_NO_SIZES, None),
    "num_labels": (*_NO_SIZES, None, 10**9, 2**20),
    "shared_intermediate_size": (*_NO_INTEGERS, 10**12, [48, 48, 48, 48]),
    **dict.fromkeys((*FACTORS, *CONVERTED_FACTORS), (*_NO_NUMBERS, None, -1.0, -1, 1e308, -1e308, 1e30, HUGE, DEEP)),
    "rms_norm_eps": (*_NO_NUMBERS, None, 0, 0.0, -1e-5, 1e308, 10, 1e-300, HUGE),
    "rope_theta": (*_NO_NUMBERS, None, 0, -1, -1e4, 0.5, 1, 1e308, HUGE, DEEP),
    "partial_rotary_factor": (*_NO_NUMBERS, 0, -0.5, 1.5, 0.25, 1e-9, HUGE),
    **dict.fromkeys(_ROPE, _BAD_ROPE),
    **dict.fromkeys(SHARES, (*_NO_NUMBERS, None, -0.1, 1, 1.0, 1.5, 1e308, HUGE)),
    **dict.fromkeys(("router_aux_loss_coef", "initializer_range"), (*_NO_NUMBERS, None, -0.1, 1e308, HUGE)),
    **dict.fromkeys(FLAGS, (*_NO_FLAGS, None)),
    "return_dict": _NO_FLAGS,
    "output_attentions": _NO_FLAGS,
    "output_hidden_states": _NO_FLAGS,
    "is_encoder_decoder": (*_NO_FLAGS, True, None),
    "hidden_act": (*_NO_WORDS, None, "swish", "relu", "SiLU"),
    "head_dtype": (*_NO_WORDS, None, "fp32", "bfloat16"),
    "shared_moe_mode": (*_NO_WORDS, None, "mean", "Sigmoid"),
    **dict.fromkeys(("dtype", "torch_dtype"), (*_NO_WORDS, "int8", "fp8", "torch.float32", {"": "bfloat16"})),
    "problem_type": _NO_WORDS,
    "sliding_window": (0, 1, 4096, -1, True, False, "4096", "", [], {}, 1.5, math.nan, HUGE, DEEP),
    "attn_type_list": (
        *_NO_LISTS,
        [0, 0, 0],
        [0, 0, 0, 1, 0],
        *([0, 0, 0, wrong] for wrong in _NO_CODES),
    ),
    "layer_types": (*_NO_LISTS, ["linear_attention"] * 4, ["full"] * 4, [0, 0, 0, 1], [None] * 4, [["x"]] * 4),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (*_NO_INTEGERS, 128, 10**12, DEEP)),
    "eos_token_id": (
        *(value for value in _NO_INTEGERS if value != [8]),
        128,
        10**12,
        [],
        [1, 128],
        [1, -1],
        [1, "2"],
        [1, True],
        [None],
        [[1]],
        DEEP,
    ),
    "model_type": (5, None, True, [], {}, 1.5, DEEP),
    "architectures": ("MiniMaxM1ForCausalLM", 5, True, {}, [5], [None], DEEP),
    "transformers_version": (4, 4.45, True, [], {}),
    **dict.fromkeys(("id2label", "label2id"), ("a", 5, True, [], ["a"], 1.5, DEEP)),
    "chunk_size_feed_forward": (*_NO_INTEGERS, 1, None),
    "per_layer_config": ({"0": {"hidden_size": 8}}, {0: {}}, {}, [], 5, "x", True),
    "quantization_config": ("fp8", 5, True, [], 1.5),
    "attn_implementation": (5, True, 1.5, ["sdpa"], DEEP),
}

#: Every single wrong field.
WRONG_CASES: list[tuple[str, Any]] = [(field, value) for field, values in WRONG.items() for value in values]

#: Field -> values that a model of the family may have, in the tiny config.
RIGHT: dict[str, tuple[Any, ...]] = {
    "vocab_size": (1, 64, 200_064),
    "hidden_size": (1, 16, 8192),
    "intermediate_size": (1, 9216),
    "num_key_value_heads": (1, 2, 4),
    "head_dim": (16, 128, 256),
    "rotary_dim": (2, 32),
    "num_local_experts": (2, 32, 512),
    "num_experts": (4,),
    "num_experts_per_tok": (1, 4),
    "max_position_embeddings": (1, 10_240_000),
    "shared_intermediate_size": (None, 0, 48),
    "shared_moe_mode": ("sigmoid", "softmax"),
    "attn_type_list": ([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]),
    "layer_types": (["linear_attention"] * 3 + ["full_attention"],),
    **dict.fromkeys(FACTORS, (0, 1, 1.0, 3.5565588200778455, 100.0)),
    **dict.fromkeys(FLAGS, (True, False)),
    "rms_norm_eps": (1e-5, 1e-6, 1e-12, 1),
    "rope_theta": (10_000, 1e4, 10_000_000, 2.0),
    "partial_rotary_factor": (None, 0.5),
    "rope_scaling": (
        None,
        {},
        {"type": "linear", "factor": 2},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "truncate": True,
        },
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2] * 8, "factor": 4.0},
    ),
    "rope_parameters": (None, {}, {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.5}),
    **dict.fromkeys(SHARES, (0, 0.0, 0.1, 0.99)),
    "router_aux_loss_coef": (0, 0.001, 1),
    "initializer_range": (0, 0.02, 1),
    "hidden_act": ("silu",),
    "head_dtype": ("float32", "model"),
    "dtype": (None, "bfloat16", "float16", "float32"),
    "torch_dtype": (None, "bfloat16"),
    "sliding_window": (None,),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (None, 0, 127)),
    "eos_token_id": (None, 0, 127, [1], [1, 127]),
    "architectures": (None, ["MiniMaxM1ForCausalLM"], ["Other"]),
    "transformers_version": (None, "4.45.2"),
    "num_labels": (1, 7),
    "id2label": (None, {"0": "no", "1": "yes"}),
    "problem_type": (None, "regression"),
    "output_attentions": (None, False),
    "quantization_config": (None, {"quant_method": "fp8"}),
    # Keys of other readers are kept.
    "a_key_of_somebody_else": (None, 5, math.nan, "x", {"y": [1, {"z": None}]}),
}
