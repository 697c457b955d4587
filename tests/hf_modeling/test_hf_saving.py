# SPDX-License-Identifier: Apache-2.0
"""What is saved is what was loaded: names, dtypes, bits, and a config.json that other loaders read the same way."""

import json
from pathlib import Path

import pytest
import torch
from goldens import M1, TEXT01
from hf_helpers import load_fp32, random_ids
from oracle import Oracle, load_checkpoint, random_tensors, tensor_shapes, tiny_config, write_checkpoint
from transformers import AutoModelForCausalLM

from minimax_plugin.architecture import Architecture
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1ForCausalLM


def assert_same_tensors(actual: Path, expected: Path) -> None:
    actual_tensors, expected_tensors = load_checkpoint(actual)[1], load_checkpoint(expected)[1]
    assert actual_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert actual_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(actual_tensors[name], tensor), name


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", ["default", "auto", torch.bfloat16])
def test_save_and_load_are_bit_equal(tmp_path: Path, dtype: object, max_shard_size: str) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_config(shared_intermediate_size=24), num_shards=2)
    kwargs = {} if dtype == "default" else {"dtype": dtype}
    path = source
    for step in ("once", "twice"):
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        path = tmp_path / step
        model.save_pretrained(path, max_shard_size=max_shard_size)
        assert len(list(path.glob("*.safetensors"))) == 1 or max_shard_size == "60KB"
        assert_same_tensors(path, source)


@pytest.mark.parametrize("case", [M1, TEXT01], ids=["m1", "text01"])
def test_golden_checkpoints_survive_a_round_trip(tmp_path: Path, case: Path) -> None:
    AutoModelForCausalLM.from_pretrained(case).save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, case)
    before, after = (json.loads((path / "config.json").read_text()) for path in (case, tmp_path))
    assert before["architectures"] == after["architectures"]
    assert before["model_type"] == after["model_type"]


def test_saved_config_says_the_same_to_other_loaders(tmp_path: Path) -> None:
    config = tiny_config(rope_theta=12345, rotary_dim=6, attn_type_list=[0, 1, 1, 0])
    load_fp32(write_checkpoint(tmp_path / "a", config)).save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "auto_map" not in saved
    ignored = {"auto_map", "bos_token_id", "eos_token_id"}
    assert {key: saved[key] for key in config.keys() - ignored} == {key: config[key] for key in config.keys() - ignored}
    # The oracle reads config.json as the loaders of the original format do.
    ids = random_ids(1, 12)
    with torch.no_grad():
        logits = load_fp32(tmp_path / "b")(ids).logits[0]
    assert (logits - Oracle.from_dir(tmp_path / "b")(ids[0].tolist()).logits).abs().max() <= 1e-3


def test_new_model_saves_original_names(tmp_path: Path) -> None:
    config = tiny_config()
    model = MiniMaxM1ForCausalLM(MiniMaxM1Config(**config)).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_checkpoint(tmp_path)[1]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(config)
    specs = Architecture.from_config(config).tensors()
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: dtypes[s.dtype] for n, s in specs.items()}


def test_fused_names_load_again(tmp_path: Path) -> None:
    model = load_fp32(write_checkpoint(tmp_path / "a", tiny_config()))
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    assert "model.layers.0.block_sparse_moe.experts.gate_up_proj" in load_checkpoint(tmp_path / "b")[1]
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(load_fp32(tmp_path / "b")(ids).logits, model(ids).logits)


def test_fp32_weights_stay_fp32(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in random_tensors(tiny_config()).items()}
    source = write_checkpoint(tmp_path / "a", tiny_config(dtype="float32"), tensors)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "b", source)
