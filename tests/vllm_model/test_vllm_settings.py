# SPDX-License-Identifier: Apache-2.0
"""What is read from a config, in both formats, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from oracle import tiny_config

from minimax_plugin.vllm_model.settings import ModelSettings, ResidualFactors


def _config(**changes: Any) -> SimpleNamespace:
    config = tiny_config(**changes)
    return SimpleNamespace(**config, rope_parameters={"rope_theta": config["rope_theta"], "rope_type": "default"})


def _converted(**changes: Any) -> SimpleNamespace:
    config = _config()
    for key in [key for key in vars(config) if key.startswith("layernorm_")] + ["attn_type_list", "postnorm"]:
        delattr(config, key)
    config.model_type = "minimax"
    config.layer_types = ["linear_attention"] * 3 + ["full_attention"]
    for i, part in enumerate(("full_attn", "linear_attn", "mlp")):
        setattr(config, f"{part}_alpha_factor", 1.5 + i)
        setattr(config, f"{part}_beta_factor", 0.5 + i)
    vars(config).update(changes)
    return config


def test_original_factors_keep_their_layer_type() -> None:
    settings = ModelSettings.from_config(
        _config(
            layernorm_full_attention_alpha=2.0,
            layernorm_full_attention_beta=3.0,
            layernorm_linear_attention_alpha=4.0,
            layernorm_linear_attention_beta=5.0,
            layernorm_mlp_alpha=6.0,
            layernorm_mlp_beta=7.0,
            postnorm=False,
        )
    )
    assert settings.attention_factors["full_attention"] == ResidualFactors(2.0, 3.0)
    assert settings.attention_factors["linear_attention"] == ResidualFactors(4.0, 5.0)
    assert settings.mlp_factors == ResidualFactors(6.0, 7.0)
    assert settings.postnorm is False


def test_converted_factors_and_leftover_rotary_dim() -> None:
    settings = ModelSettings.from_config(_converted())
    assert settings.attention_factors["full_attention"] == ResidualFactors(1.5, 0.5)
    assert settings.attention_factors["linear_attention"] == ResidualFactors(2.5, 1.5)
    assert settings.mlp_factors == ResidualFactors(3.5, 2.5)
    assert settings.postnorm is True
    assert settings.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("converted", [False, True], ids=["original", "converted"])
def test_what_a_config_leaves_out_has_the_defaults_of_its_format(converted: bool) -> None:
    config = _converted() if converted else _config()
    for key in list(vars(config)):
        if key.startswith("layernorm_") or key.endswith("_factor") or key == "postnorm":
            delattr(config, key)
    settings = ModelSettings.from_config(config)
    assert {*settings.attention_factors.values(), settings.mlp_factors} == {ResidualFactors(1.0, 1.0)}
    assert settings.postnorm is converted


@pytest.mark.parametrize("head_dim", [2, 6, 44, 48, 96, 128, 160])
def test_rotated_share_survives_truncation(head_dim: int) -> None:
    for rotary_dim in range(2, head_dim + 1, 2):
        settings = ModelSettings.from_config(_config(head_dim=head_dim, rotary_dim=rotary_dim))
        factor = settings.rope_parameters["partial_rotary_factor"]
        assert 0 < factor <= 1 and int(head_dim * factor) == rotary_dim


def test_the_callers_rope_parameters_are_left_alone() -> None:
    config = _config()
    ModelSettings.from_config(config)
    assert "partial_rotary_factor" not in config.rope_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_type_list": [0, 0, 1]}, "attn_type_list has 3 entries, expected num_hidden_layers = 4"),
        ({"rotary_dim": 64}, "rotary_dim = 64 exceeds head_dim = 32"),
        ({"rotary_dim": 15}, "rotary_dim = 15 is odd"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads = 3"),
        ({"num_experts_per_tok": 5}, "exceeds num_local_experts = 4"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"num_local_experts": -1}, "num_local_experts is -1"),
        ({"shared_moe_mode": "max"}, "shared_moe_mode is 'max'"),
        ({"layernorm_mlp_alpha": "big"}, "layernorm_mlp_alpha is 'big', expected a finite number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.from_config(_config(**changes))
