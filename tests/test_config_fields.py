# SPDX-License-Identifier: Apache-2.0
"""The rules of config fields by themselves; what both backends make of them is in ``test_config_refusals.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from goldens import golden_cases
from oracle import tiny_config

from minimax_plugin.architecture import Architecture
from minimax_plugin.config_fields import config_faults, require_sound


@golden_cases()
def test_configs_of_the_original_code_have_no_faults(case: Path) -> None:
    assert config_faults(json.loads((case / "config.json").read_text())) == []


def test_the_released_config_has_no_faults(checkpoint_dir: Path) -> None:
    assert config_faults(json.loads((checkpoint_dir / "config.json").read_text())) == []


def test_every_fault_is_listed_and_the_first_is_raised() -> None:
    config = tiny_config(hidden_size="48", postnorm=None, num_experts_per_tok=5, vocab_size=None)
    assert config_faults(config) == [
        "config has no 'vocab_size'; every MiniMax-M1 config.json states it",
        "hidden_size is '48', expected a positive integer of at most 1,048,576",
        "postnorm is None, expected true or false",
        "num_experts_per_tok (top_k) = 5 exceeds num_local_experts = 4",
    ]
    with pytest.raises(ValueError, match="config has no 'vocab_size'"):
        require_sound(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, expected a positive integer of at most 10,000",
        ),
        ({"num_local_experts": 10**6}, "num_local_experts is 1000000, expected a positive integer of at most 65,536"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected a positive integer of at most 1,048,576"),
        ({"num_local_experts": 65_536}, "makes 262,144, expected at most 131,072"),
        ({"layernorm_mlp_alpha": 1e308}, "layernorm_mlp_alpha is 1e+308, expected a finite number of at least 0"),
        ({"hidden_size": 10**5000}, "hidden_size is or holds an integer of 16,610 bits"),
    ],
    ids=["layers", "experts", "width", "all experts", "factor", "digits"],
)
def test_absurd_values_are_refused_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    assert message in config_faults(tiny_config() | changes)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 0}},
            "rope_parameters.rope_theta is 0, expected a finite",
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters['rope_theta'] = 5.0 contradicts rope_theta = 10000000",
        ),
        (
            {"postnorm": False, "num_hidden_layers": 40, "attn_type_list": [0] * 40},
            "enlarge the residual by 1e44 over 40",
        ),
        ({"rotary_dim": None, "partial_rotary_factor": 0.1}, "rotary_dim = 3 is odd, expected an even number"),
        (
            {"head_dim": None, "hidden_size": 3},
            "head_dim is absent and 0 by hidden_size = 3 and num_attention_heads = 4",
        ),
    ],
    ids=["inner theta", "two thetas", "growth", "odd share", "no head"],
)
def test_fields_against_each_other(changes: dict[str, Any], message: str) -> None:
    """3.5566 twice in each of 40 layers is 80 * log10(3.5566) = 44.08 decades."""
    config = {
        name: value for name, value in (tiny_config() | changes).items() if value is not None or name != "rope_theta"
    }
    assert any(message in fault for fault in config_faults(config))


def test_rotated_share_stands_for_the_rotary_dim() -> None:
    config = tiny_config(rotary_dim=None, partial_rotary_factor=0.25)
    assert Architecture.from_config(config).rotary_dim == 8
