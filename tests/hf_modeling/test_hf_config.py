# SPDX-License-Identifier: Apache-2.0
"""The configuration class: derived fields, later assignments, what is written."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import tiny_config, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1Model


@given(data=st.data())
def test_readers_who_truncate_get_the_rotary_dim(data: st.DataObject) -> None:
    """vLLM takes ``int(head_dim * partial_rotary_factor)``, which must not lose a dimension to rounding."""
    head_dim = 2 * data.draw(st.integers(1, 300))
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    config = MiniMaxM1Config(**tiny_config(head_dim=head_dim, rotary_dim=rotary_dim))
    factor = config.rope_parameters["partial_rotary_factor"]
    assert int(head_dim * factor) == rotary_dim
    assert math.isclose(factor, rotary_dim / head_dim)


def test_defaults_are_those_of_the_released_code() -> None:
    config = tiny_config()
    keys = ["layernorm_mlp_alpha", "layernorm_mlp_beta", "postnorm", "rotary_dim", "shared_moe_mode", "rope_theta"]
    keys += ["shared_intermediate_size", "layernorm_linear_attention_alpha", "layernorm_full_attention_beta"]
    built = MiniMaxM1Config.from_dict({key: value for key, value in config.items() if key not in keys})
    assert [getattr(built, key) for key in keys] == [1.0, 1.0, False, 32, "sigmoid", 1e6, 0, 1.0, 1.0]


def test_later_assignments_keep_derived_fields_in_step() -> None:
    config = MiniMaxM1Config(**tiny_config(attn_type_list=[0, 1, 0, 1]))
    config.update({"num_hidden_layers": 2, "rotary_dim": 8, "rope_theta": 77.0})
    assert config.attn_type_list == [0, 1]
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25}
    config.layer_types = ["full_attention", "linear_attention"]
    assert config.attn_type_list == [1, 0]
    config.check()


def test_other_scaling_assigned_later_keeps_base_and_rotary_dim(tmp_path: Path) -> None:
    """Without the share of the head in it, transformers' scaled variants would rotate the whole head."""
    path = write_checkpoint(tmp_path, tiny_config())
    linear = {"rope_type": "linear", "factor": 2.0}
    from_file = tiny_config(rope_parameters=linear)
    expected = linear | {"rope_theta": 10_000_000, "partial_rotary_factor": 0.5}
    for config in (
        AutoConfig.from_pretrained(path, rope_parameters=linear),
        AutoConfig.from_pretrained(path, rope_scaling=linear),
        MiniMaxM1Config.from_dict(from_file),
    ):
        assert config.rope_parameters == expected
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.model.rotary_emb.inv_freq.shape == (8,)


def test_rotary_share_follows_the_head_size(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_checkpoint(tmp_path, tiny_config()), head_dim=64)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    config.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").rotary_dim == 16


def test_contradiction_assigned_later_is_refused() -> None:
    config = MiniMaxM1Config(**tiny_config())
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    with pytest.raises(ValueError, match="rotates 32 of 32 dimensions, but rotary_dim = 16"):
        MiniMaxM1Model(config)


def test_pattern_may_come_from_layer_types() -> None:
    fields = tiny_config(layer_types=["full_attention", "linear_attention"], num_hidden_layers=2)
    del fields["attn_type_list"]
    assert MiniMaxM1Config.from_dict(fields).attn_type_list == [1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"] * 4}, "contradicts attn_type_list"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, "but rotary_dim = 16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "contradicts rope_theta"),
        ({"layernorm_mlp_alpha": math.nan}, "layernorm_mlp_alpha is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"router_jitter_noise": 1.5}, "router_jitter_noise is 1.5"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a positive integer"),
        ({"head_dtype": "fp32"}, "head_dtype is 'fp32', expected 'float32' or 'model'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type is 'spiral', expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniMaxM1Config(**tiny_config(**fields))


def test_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = MiniMaxM1Config(**tiny_config(rotary_dim=6, rope_theta=123.0))
    config.save_pretrained(tmp_path)
    again = MiniMaxM1Config.from_pretrained(tmp_path)
    assert {**again.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}


def test_caller_keeps_his_rope_parameters() -> None:
    parameters = {"rope_type": "default"}
    MiniMaxM1Config(**tiny_config(rope_parameters=parameters))
    assert parameters == {"rope_type": "default"}
