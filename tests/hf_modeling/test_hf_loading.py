# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are refused with a message; legitimate ones that look odd are not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_helpers import load_fp32, random_ids
from oracle import random_tensors, tiny_config, write_checkpoint
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from minimax_plugin.checkpoint import CheckpointError

SHARD = "model-00002-of-00003.safetensors"
OUT_PROJ = "model.layers.1.self_attn.out_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def remove_shard(path: Path) -> None:
    (path / SHARD).unlink()


def truncate_shard(path: Path) -> None:
    content = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(content[: len(content) // 2])


def name_absent_tensor(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.norm.weight"] = SHARD
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, f"{SHARD}: found no such file"),
        (truncate_shard, f"{SHARD}: found .* the file is truncated"),
        (name_absent_tensor, f"{SHARD}: tensor model.layers.9.norm.weight: found no such tensor"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_checkpoint(tmp_path, tiny_config(), num_shards=3))
    with pytest.raises(CheckpointError, match=message):
        load_fp32(tmp_path)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        (OUT_PROJ, None, f"tensor {OUT_PROJ}: found no such tensor, expected .48, 128."),
        (EXPERT, None, f"tensor {EXPERT}: found no such tensor"),
        ("lm_head.weight", None, "tensor lm_head.weight: found no such tensor"),
        (OUT_PROJ, torch.zeros(3, 5), f"tensor {OUT_PROJ}: found shape .3, 5., expected .48, 128."),
        (EXPERT, torch.zeros(3, 5), f"tensor {EXPERT}: found shape .3, 5., expected .40, 48."),
        (OUT_PROJ, torch.zeros(48, 128, dtype=torch.int8), f"tensor {OUT_PROJ}: found dtype I8, expected one of F32"),
    ],
    ids=["no-tensor", "no-expert", "no-head", "shape", "expert-shape", "dtype"],
)
def test_wrong_tensors_are_named(tmp_path: Path, name: str, replacement: Tensor | None, message: str) -> None:
    tensors = random_tensors(tiny_config())
    if replacement is None:
        del tensors[name]
    else:
        tensors[name] = replacement
    write_checkpoint(tmp_path, tiny_config(), tensors, num_shards=2)
    with pytest.raises(CheckpointError, match=message):
        load_fp32(tmp_path)


def test_absent_weights_of_a_given_state_dict_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    model_class = type(load_fp32(write_checkpoint(tmp_path, tiny_config(), tensors)))
    del tensors[OUT_PROJ]
    with pytest.raises(CheckpointError, match=OUT_PROJ):
        model_class.from_pretrained(None, config=model_class.config_class(**tiny_config()), state_dict=tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type_list": [0, 1]}, "attn_type_list has 2 entries, expected num_hidden_layers = 4"),
        ({"rotary_dim": 64}, "rotary_dim = 64 exceeds head_dim = 32"),
        ({"rotary_dim": 7}, "rotary_dim = 7 is odd"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not divisible by num_key_value_heads = 3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok .top_k. = 5 exceeds num_local_experts = 4"),
        ({"hidden_size": -48}, "hidden_size is -48, expected a positive integer"),
        ({"intermediate_size": 0}, "intermediate_size is 0, expected a positive integer"),
        ({"shared_moe_mode": "mean"}, "shared_moe_mode is 'mean'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"num_hidden_layers": None}, "config has no 'num_hidden_layers'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_config_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_checkpoint(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config() | change))
    with pytest.raises(ValueError, match=message):
        load_fp32(tmp_path)


def test_size_that_config_json_does_not_state_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    del config["hidden_size"]
    with pytest.raises(ValueError, match="config has no 'hidden_size'"):
        load_fp32(write_checkpoint(tmp_path, config, random_tensors(tiny_config())))


def test_more_layers_than_the_pattern_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attn_type_list has 4 entries, expected num_hidden_layers = 6"):
        load_fp32(write_checkpoint(tmp_path, tiny_config()), num_hidden_layers=6)


def test_fewer_layers_keep_the_first_of_the_pattern(tmp_path: Path) -> None:
    config = tiny_config(attn_type_list=[0, 1, 0, 0])
    model = load_fp32(write_checkpoint(tmp_path, config), num_hidden_layers=2)
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    model.generate(random_ids(1, 5), max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "short")
    assert load_fp32(tmp_path / "short").config.attn_type_list == [0, 1]


def test_buffers_of_the_class_in_transformers_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.zeros(4, 1, 1)
    write_checkpoint(tmp_path, tiny_config(), tensors)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_classifier_starts_from_a_language_model(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "lm", tiny_config(pad_token_id=0))
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype=torch.float32)
    assert model(random_ids(2, 9)).logits.shape == (2, 3)
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", dtype=torch.float32)
    assert torch.equal(again.score.weight, model.score.weight)


def test_decoder_without_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "lm", tiny_config())
    decoder = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    again = AutoModel.from_pretrained(tmp_path / "decoder", dtype=torch.float32).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, decoder(ids).last_hidden_state)


def test_embedding_can_be_resized(tmp_path: Path) -> None:
    model = load_fp32(write_checkpoint(tmp_path / "a", tiny_config()))
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path / "b")
    again = load_fp32(tmp_path / "b")
    # The class computes logits in fp32; transformers puts a plain nn.Linear in its place.
    assert type(again.lm_head) is type(model.lm_head)
    with torch.no_grad():
        logits = again(random_ids(1, 5)).logits
        assert logits.shape == (1, 5, 140)
        assert torch.equal(logits, model(random_ids(1, 5)).logits)


def test_weights_of_unknown_shape_load_on_request(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    tensors["lm_head.weight"] = torch.zeros(64, 48)
    write_checkpoint(tmp_path, tiny_config(), tensors)
    model = load_fp32(tmp_path, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (128, 48)


def test_offloaded_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = write_checkpoint(tmp_path / "model", tiny_config(shared_intermediate_size=24))
    ids = random_ids(1, 20)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    offloaded = load_fp32(path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    with torch.no_grad():
        assert (offloaded(ids).logits - load_fp32(path)(ids).logits).abs().max() <= 1e-4
