# SPDX-License-Identifier: Apache-2.0
"""The one description of the architecture, against the released config and index and against formulas of their own."""

from __future__ import annotations

import json
import math
import struct
from contextlib import suppress
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimax_plugin import architecture
from minimax_plugin.architecture import (
    Architecture,
    TensorSpec,
    head_slopes,
    layer_types_from_codes,
    lightning_slopes,
    rotary_factor,
)

#: The released sizes, as in the table of the MiniMax-M1 report.
RELEASED: dict[str, Any] = {
    "vocab_size": 200_064,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
}

SMALL: dict[str, Any] = RELEASED | {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "attn_type_list": [0, 1, 0],
}


def fp32(value: float | Decimal) -> float:
    return struct.unpack("<f", struct.pack("<f", float(value)))[0]


def test_released_sizes() -> None:
    released = Architecture.from_config(RELEASED)
    tensors = released.tensors()
    assert released.num_parameters == 456_089_655_296
    assert len(tensors) == 8_243
    assert released.total_size == 912_210_767_872
    assert released.num_activated_parameters == 45_944_920_064
    assert released.softmax_layers == list(range(7, 80, 8))
    assert len(released.lightning_layers) == 70
    assert released.state_shape(tp_size=8) == (8, 128, 128)


def test_released_config_and_index(checkpoint_dir: Path) -> None:
    config = json.loads((checkpoint_dir / "config.json").read_text())
    index = json.loads((checkpoint_dir / "model.safetensors.index.json").read_text())
    released = Architecture.from_config(config)
    assert released == Architecture.from_config(RELEASED)
    assert released.tensors().keys() == index["weight_map"].keys()
    assert released.total_size == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.embed_tokens.weight", (200_064, 6144), "BF16"),
        ("lm_head.weight", (200_064, 6144), "BF16"),
        ("model.norm.weight", (6144,), "BF16"),
        ("model.layers.0.self_attn.qkv_proj.weight", (24_576, 6144), "BF16"),
        ("model.layers.0.self_attn.output_gate.weight", (8192, 6144), "BF16"),
        ("model.layers.0.self_attn.out_proj.weight", (6144, 8192), "BF16"),
        ("model.layers.0.self_attn.norm.weight", (8192,), "BF16"),
        ("model.layers.7.self_attn.q_proj.weight", (8192, 6144), "BF16"),
        ("model.layers.7.self_attn.k_proj.weight", (1024, 6144), "BF16"),
        ("model.layers.7.self_attn.o_proj.weight", (6144, 8192), "BF16"),
        ("model.layers.79.block_sparse_moe.gate.weight", (32, 6144), "F32"),
        ("model.layers.79.block_sparse_moe.experts.31.w1.weight", (9216, 6144), "BF16"),
        ("model.layers.79.block_sparse_moe.experts.31.w2.weight", (6144, 9216), "BF16"),
    ],
)
def test_released_tensor(name: str, shape: tuple[int, ...], dtype: str) -> None:
    spec = Architecture.from_config(RELEASED).tensors()[name]
    assert (spec.shape, spec.dtype) == (shape, dtype)


@pytest.mark.parametrize(("num_heads", "layer_idx", "num_layers"), [(64, 0, 80), (64, 40, 80), (64, 78, 80), (4, 1, 3)])
def test_slopes_of_a_power_of_two_against_exact_arithmetic(num_heads: int, layer_idx: int, num_layers: int) -> None:
    with localcontext() as context:
        context.prec = 50
        factor = 1 - Decimal(layer_idx) / (num_layers - 1) + Decimal("1e-5")
        exact = [Decimal(2) ** (Decimal(-8 * (h + 1)) / num_heads) * factor for h in range(num_heads)]
    slopes = lightning_slopes(num_heads, layer_idx, num_layers)
    assert slopes == [fp32(value) for value in exact]


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        pytest.param(1, [8], id="one head"),
        pytest.param(3, [4, 8, 2], id="2 of 2, 1 of 4"),
        pytest.param(6, [2, 4, 6, 8, 1, 3], id="4 of 4, 2 of 8"),
        pytest.param(12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5], id="8 of 8, 4 of 16"),
    ],
)
def test_slopes_of_any_head_count(num_heads: int, exponents: list[float]) -> None:
    assert head_slopes(num_heads) == [2.0**-exponent for exponent in exponents]


@given(heads=st.integers(1, 200), layers=st.integers(1, 100), data=st.data())
def test_slopes_are_fp32_values_and_fall_with_depth(heads: int, layers: int, data: st.DataObject) -> None:
    layer_idx = data.draw(st.integers(0, layers - 1))
    slopes = lightning_slopes(heads, layer_idx, layers)
    assert len(slopes) == heads
    assert all(slope > 0 and slope == fp32(slope) for slope in slopes)
    if layer_idx:
        shallower = lightning_slopes(heads, layer_idx - 1, layers)
        assert all(deep < shallow for deep, shallow in zip(slopes, shallower, strict=True))


def test_single_layer_has_the_factor_of_the_first() -> None:
    assert lightning_slopes(8, 0, 1) == lightning_slopes(8, 0, 80) == [fp32(2.0**-h * (1 + 1e-5)) for h in range(1, 9)]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_tensor_parallel_ranks_hold_contiguous_slices(tp_size: int) -> None:
    released = Architecture.from_config(RELEASED)
    ranks = [released.slopes(3, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert sum(ranks, []) == released.slopes(3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [
        (64, 8, [1, 2, 4, 8, 16, 32, 64]),
        (6, 2, [1, 2, 6]),
        (12, 3, [1, 3, 6, 12]),
        (4, 4, [1, 2, 4]),
        (6, 1, [1, 2, 3, 6]),
    ],
)
def test_heads_split_over_these_numbers_of_ranks_only(heads: int, kv_heads: int, sizes: list[int]) -> None:
    """Fewer ranks than KV heads share those out, more ranks keep each of them several times."""
    model = Architecture.from_config(SMALL | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    accepted = []
    for size in range(1, heads + 2):
        with suppress(ValueError):
            model.check_tensor_parallel(size)
            accepted.append(size)
    assert accepted == sizes


@given(
    st.builds(
        lambda pattern, kv, group, **sizes: (
            SMALL
            | sizes
            | {
                "attn_type_list": pattern,
                "num_hidden_layers": len(pattern),
                "num_key_value_heads": kv,
                "num_attention_heads": kv * group,
            }
        ),
        st.lists(st.integers(0, 1), min_size=1, max_size=6),
        st.integers(1, 3),
        st.integers(1, 3),
        hidden_size=st.integers(1, 40),
        intermediate_size=st.integers(1, 40),
        vocab_size=st.integers(1, 40),
        shared_intermediate_size=st.integers(0, 9),
        tie_word_embeddings=st.booleans(),
    )
)
def test_counts_against_a_closed_formula(config: dict[str, Any]) -> None:
    hidden, inner = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv_inner = config["num_key_value_heads"] * config["head_dim"]
    softmax, layers = sum(config["attn_type_list"]), len(config["attn_type_list"])
    shared, experts = config["shared_intermediate_size"], config["num_local_experts"]
    expert = 3 * hidden * config["intermediate_size"]
    every_token = (
        (layers - softmax) * (5 * hidden * inner + inner)
        + softmax * (2 * hidden * inner + 2 * hidden * kv_inner)
        + layers * (2 * hidden + hidden * experts + (3 * hidden * shared + hidden if shared else 0))
        + hidden
    )
    heads = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    model = Architecture.from_config(config)
    assert model.num_parameters == every_token + layers * experts * expert + heads
    assert model.num_activated_parameters == every_token + layers * config["num_experts_per_tok"] * expert
    assert model.total_size == 2 * model.num_parameters + 2 * layers * hidden * experts  # routers are F32


def test_readers_who_truncate_get_the_rotary_dim() -> None:
    """Rounded to nearest, the share of 30 of 44 dimensions times 44 is 29.999999999999996."""
    for head_dim in range(2, 301, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            factor = rotary_factor(rotary_dim, head_dim)
            assert int(head_dim * factor) == rotary_dim and 0 < factor <= 1
            assert math.isclose(factor, rotary_dim / head_dim, rel_tol=1e-15)


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 2), ("F16", 2), ("F32", 4)])
def test_bytes_of_a_tensor(dtype: str, size: int) -> None:
    assert TensorSpec((3, 5), dtype).nbytes == 15 * size
    assert TensorSpec((), dtype).nbytes == size


def test_config_object_and_defaults_of_absent_keys() -> None:
    config = {key: value for key, value in SMALL.items() if key not in ("head_dim", "rotary_dim")}
    from_object = Architecture.from_config(SimpleNamespace(**config))
    assert from_object == Architecture.from_config(config)
    assert (from_object.head_dim, from_object.rotary_dim, from_object.shared_intermediate_size) == (8, 8, 0)


def test_layer_types_may_stand_for_codes() -> None:
    config = {key: value for key, value in SMALL.items() if key != "attn_type_list"}
    config["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
    assert Architecture.from_config(config) == Architecture.from_config(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type_list": [0, 1]}, "attn_type_list has 2 entries, expected num_hidden_layers = 3"),
        ({"attn_type_list": [0, 2, 0]}, r"attn_type_list\[1\] is 2, expected 0 .* or 1"),
        ({"attn_type_list": [0, True, 0]}, r"attn_type_list\[1\] is True"),
        ({"attn_type_list": None}, "neither 'attn_type_list' nor 'layer_types'"),
        ({"attn_type_list": None, "layer_types": ["full_attention", "mamba", "mamba"]}, r"layer_types\[1\] is 'mamba'"),
        ({"rotary_dim": 18}, "rotary_dim = 18 exceeds head_dim = 16"),
        ({"rotary_dim": 7}, "rotary_dim = 7 is odd"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not divisible by num_key_value_heads = 4"),
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok \(top_k\) = 6 exceeds num_local_experts = 5"),
        ({"shared_moe_mode": "mean"}, "shared_moe_mode is 'mean', expected one of"),
        ({"shared_moe_mode": ""}, "shared_moe_mode is '', expected one of"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size is -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a positive integer"),
        ({"attn_type_list": 1}, "attn_type_list is 1, expected a list"),
        ({"attn_type_list": [0, [1], 0]}, r"attn_type_list\[1\] is \[1\], expected 0"),
        ({"attn_type_list": None, "layer_types": "linear"}, "layer_types is 'linear', expected a list"),
        ({"layer_types": ["full_attention"] * 3}, "contradicts attn_type_list"),
        ({"head_dim": None, "hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
        *(
            ({name: value}, f"{name} is {value!r}, expected a positive integer")
            for name in SMALL
            if name != "attn_type_list"
            for value in (0, -1, 2.5, True)
        ),
        *(
            ({name: None}, f"config has no '{name}'")
            for name in SMALL
            if name not in ("attn_type_list", "head_dim", "rotary_dim")
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_impossible_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture.from_config(SMALL | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lightning_slopes(6, 0, 3, tp_size=4), "num_heads = 6 is not divisible by tp_size = 4"),
        (lambda: lightning_slopes(6, 3, 3), "layer_idx is 3, expected 0 <= layer_idx < num_layers = 3"),
        (lambda: lightning_slopes(6, -1, 3), "layer_idx is -1, expected 0 <= layer_idx < num_layers = 3"),
        (lambda: lightning_slopes(6, 0, 0), "num_layers is 0, expected a positive integer"),
        (lambda: lightning_slopes(6, 0, 3, tp_rank=2, tp_size=2), "tp_rank is 2, expected"),
        (lambda: lightning_slopes(6, 0, 3, tp_rank=-1, tp_size=2), "tp_rank is -1, expected"),
        (lambda: lightning_slopes(6, 0, 3, tp_size=0), "tp_size is 0, expected a positive integer"),
        (lambda: head_slopes(-4), "num_heads is -4, expected a positive integer"),
        (
            lambda: Architecture.from_config(SMALL).check_tensor_parallel(4),
            "not divisible by the tensor parallel size 4",
        ),
        (lambda: Architecture.from_config(SMALL).check_tensor_parallel(3), "neither divides nor is divided by"),
        (
            lambda: Architecture.from_config(SMALL).check_tensor_parallel(0),
            "tensor parallel size is 0, expected a positive integer",
        ),
        (lambda: layer_types_from_codes([0, -1]), r"attn_type_list\[1\] is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_request_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_constants_of_the_released_model() -> None:
    assert architecture.LIGHTNING_NORM_EPS == 1e-6
