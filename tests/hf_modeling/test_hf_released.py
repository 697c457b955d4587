# SPDX-License-Identifier: Apache-2.0
"""The released configuration, without its weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import minimax_plugin  # noqa: F401
from minimax_plugin.architecture import Architecture


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(checkpoint_dir)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_parameters_of_the_released_model(model: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 456_089_655_296
    assert len(model.state_dict()) == 723


def test_dtypes_add_up_to_the_released_size(model: PreTrainedModel, checkpoint_dir: Path) -> None:
    index = json.loads((checkpoint_dir / "model.safetensors.index.json").read_text())
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert size == index["metadata"]["total_size"]


def test_every_tensor_of_the_index_has_a_place(model: PreTrainedModel, checkpoint_dir: Path) -> None:
    names = json.loads((checkpoint_dir / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert len(names) == 8243
    fused = {re.sub(r"experts\.\d+\.w[13]\.weight", "experts.gate_up_proj", name) for name in names}
    fused = {re.sub(r"experts\.\d+\.w2\.weight", "experts.down_proj", name) for name in fused}
    assert fused == model.state_dict().keys()


def test_shapes_hold_the_tensors_of_the_architecture(model: PreTrainedModel) -> None:
    specs = Architecture.from_config(model.config).tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, spec in specs.items():
        if ".experts." not in name:
            assert shapes[name] == spec.shape, name
    assert shapes["model.layers.0.block_sparse_moe.experts.gate_up_proj"] == (32, 2 * 9216, 6144)
    assert shapes["model.layers.0.block_sparse_moe.experts.down_proj"] == (32, 6144, 9216)


def test_derived_fields_of_the_released_config(checkpoint_dir: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint_dir)
    assert config.layer_types == (["linear_attention"] * 7 + ["full_attention"]) * 10
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.5}
    assert config.num_experts == config.num_local_experts == 32
    assert config.head_dtype == "float32"
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
