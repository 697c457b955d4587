# SPDX-License-Identifier: Apache-2.0
"""Architectures outside the golden data, against the float64 oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import assert_matches_oracle, load_fp32, make_pair, random_ids
from oracle import Oracle, random_tensors, tiny_config, write_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "released-pattern": {"num_hidden_layers": 8, "attn_type_list": [0] * 7 + [1]},
    "pre-norm": {"postnorm": False, "layernorm_linear_attention_alpha": 1.0, "layernorm_full_attention_alpha": 1.0},
    "six-factors": {
        "layernorm_full_attention_alpha": 1.3,
        "layernorm_full_attention_beta": 0.7,
        "layernorm_linear_attention_alpha": 2.1,
        "layernorm_linear_attention_beta": 1.4,
        "layernorm_mlp_alpha": 0.9,
        "layernorm_mlp_beta": 1.7,
    },
    "six-factors-pre-norm": {
        "postnorm": False,
        "layernorm_full_attention_alpha": 1.3,
        "layernorm_full_attention_beta": 0.7,
        "layernorm_linear_attention_alpha": 1.1,
        "layernorm_linear_attention_beta": 1.4,
        "layernorm_mlp_alpha": 0.9,
        "layernorm_mlp_beta": 1.2,
    },
    "six-heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "three-heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "twelve-heads": {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16},
    "top-three": {"num_experts_per_tok": 3, "num_local_experts": 5},
    "top-one": {"num_experts_per_tok": 1},
    "one-expert": {"num_experts_per_tok": 1, "num_local_experts": 1},
    "small-rotary": {"rotary_dim": 6},
    "whole-head-rotary": {"rotary_dim": 32},
    "other-theta": {"rope_theta": 500.0},
    "one-lightning-layer": {"num_hidden_layers": 1, "attn_type_list": [0]},
    "one-softmax-layer": {"num_hidden_layers": 1, "attn_type_list": [1]},
    "all-lightning": {"num_hidden_layers": 3, "attn_type_list": [0, 0, 0]},
    "all-softmax": {"num_hidden_layers": 2, "attn_type_list": [1, 1]},
    "softmax-first": {"attn_type_list": [1, 0, 0, 1]},
    "wide-hidden": {"hidden_size": 160},
    "tied-embeddings": {"tie_word_embeddings": True},
    "shared-sigmoid": {"shared_intermediate_size": 56},
    "shared-softmax": {"shared_intermediate_size": 56, "shared_moe_mode": "softmax"},
    "other-eps": {"rms_norm_eps": 1e-3},
    "no-grouped-queries": {"num_key_value_heads": 4},
    "odd-sizes": {"hidden_size": 47, "intermediate_size": 39, "head_dim": 20, "rotary_dim": 2, "vocab_size": 129},
    "every-expert": {"num_experts_per_tok": 4, "num_key_value_heads": 1},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1, "attn_type_list": [0, 1, 1, 0]},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_oracle(tmp_path: Path, name: str) -> None:
    model, oracle = make_pair(tmp_path, **ARCHITECTURES[name])
    rows = random_ids(2, 70).tolist()
    assert_matches_oracle(model, oracle, rows, input_ids=torch.tensor(rows))
    generated = model.generate(torch.tensor(rows), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generated[0, 70:].tolist() == oracle.greedy(rows[0], 8)


def test_epsilon_of_the_lightning_norm(tmp_path: Path) -> None:
    """Outputs so small that the epsilon decides: 1e-6 here, whatever ``rms_norm_eps`` is."""
    config = tiny_config(rms_norm_eps=1e-5)
    tensors = random_tensors(config)
    for name in tensors:
        if name.endswith("qkv_proj.weight"):
            tensors[name] = tensors[name] * 0.1
    model = load_fp32(write_checkpoint(tmp_path, config, tensors))
    rows = random_ids(1, 20).tolist()
    assert_matches_oracle(model, Oracle(config, tensors), rows, input_ids=torch.tensor(rows))


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_new_model_is_random_in_every_parameter(auto_class: Any) -> None:
    """``from_config`` leaves what no rule initialises as the memory was, and that often looks like weights."""
    config = MiniMaxM1Config(**tiny_config(initializer_range=0.3, shared_intermediate_size=24))
    model = auto_class.from_config(config)
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        if name.endswith("norm.weight"):
            assert bool((values == 1).all()), name
            continue
        spread = 4 / values.numel() ** 0.5  # four standard errors of the mean, in standard deviations
        assert abs(values.mean()) <= 0.3 * spread, name
        assert values.std().item() == pytest.approx(0.3, rel=spread), name
        assert values.unique().numel() > 0.9 * values.numel(), name
