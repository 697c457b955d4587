# SPDX-License-Identifier: Apache-2.0
"""Every way in which a checkpoint can be broken is named: file, tensor or field, what was found, what was expected."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import golden_cases
from safetensors.torch import load_file, save_file

from minimax_plugin.architecture import Architecture
from minimax_plugin.checkpoint import CheckpointError, check_checkpoint, read_safetensors_header, require_complete
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

OPTIONS = TinyOptions(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=2,
    vocab_size=288,
    shard_size=20_000,
)
SHARD = "model-00001-of-00005.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"
INDEX = "model.safetensors.index.json"

Corruption = Callable[[Path], None]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact") / "model"
    write_tiny_checkpoint(directory, OPTIONS)
    return directory


@pytest.fixture
def model_dir(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Corruption:
    def corrupt(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        edit(content)
        (directory / name).write_text(json.dumps(content))

    return corrupt


def edit_config(**fields: Any) -> Corruption:
    return edit_json("config.json", lambda config: config.update(fields))


def edit_bytes(edit: Callable[[bytes], bytes]) -> Corruption:
    def corrupt(directory: Path) -> None:
        (directory / SHARD).write_bytes(edit((directory / SHARD).read_bytes()))

    return corrupt


def edit_tensor(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Corruption:
    def corrupt(directory: Path) -> None:
        file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        tensors[name] = edit(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})

    return corrupt


def test_intact(intact: Path) -> None:
    report = require_complete(intact)
    assert report.architecture == Architecture.from_config(json.loads((intact / "config.json").read_text()))
    assert (report.num_files, report.num_tensors) == (5, len(report.architecture.tensors()))
    assert report.total_size == report.architecture.total_size
    assert not report.notes


@golden_cases()
def test_goldens_are_complete(case: Path) -> None:
    assert require_complete(case).num_files == 1


def test_released_index_is_complete_but_for_the_shards(checkpoint_dir: Path) -> None:
    report = check_checkpoint(checkpoint_dir)
    assert [str(fault) for fault in report.faults] == [
        f"model-{number:05d}-of-00413.safetensors: found no such file, expected a safetensors file in {checkpoint_dir}"
        for number in range(413)
    ]


def test_released_layout_is_complete(checkpoint_dir: Path, tmp_path: Path) -> None:
    """All 413 shards with real headers; the 912 GB behind them are holes in sparse files."""
    for name in ("config.json", INDEX):
        shutil.copy(checkpoint_dir / name, tmp_path)
    specs = Architecture.from_config(json.loads((tmp_path / "config.json").read_text())).tensors()
    by_file: dict[str, dict[str, Any]] = {}
    for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        header = by_file.setdefault(file, {})
        begin = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        offsets = [begin, begin + specs[name].nbytes]
        header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": offsets}
    for file, header in by_file.items():
        encoded = json.dumps(header).encode()
        with (tmp_path / file).open("wb") as shard:
            shard.write(struct.pack("<Q", len(encoded)) + encoded)
            shard.truncate(8 + len(encoded) + max(entry["data_offsets"][1] for entry in header.values()))
    report = require_complete(tmp_path)
    assert (report.num_files, report.num_tensors, report.total_size) == (413, 8_243, 912_210_767_872)


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [
        pytest.param(
            lambda d: (d / SHARD).unlink(),
            f"{SHARD}: found no such file, expected a safetensors file",
            id="missing shard",
        ),
        pytest.param(edit_bytes(lambda data: data[:-1]), "the file is truncated", id="truncated data"),
        pytest.param(edit_bytes(lambda data: data[:50]), "found 50 bytes, expected at least", id="truncated header"),
        pytest.param(edit_bytes(lambda data: b""), f"{SHARD}: found 0 bytes, expected", id="empty shard"),
        pytest.param(edit_bytes(lambda data: data + b"x"), "longer than its header says", id="overlong shard"),
        pytest.param(
            edit_bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            "found a Git LFS pointer of 63 bytes",
            id="Git LFS pointer",
        ),
        pytest.param(
            edit_bytes(lambda data: b"<!DOCTYPE html>"), "expected a safetensors file", id="web page instead of a shard"
        ),
        pytest.param(
            edit_bytes(lambda data: struct.pack("<Q", 4) + b"{,,}"), "a header that cannot be read", id="broken header"
        ),
        pytest.param(
            edit_json(INDEX, lambda index: index["weight_map"].update({"model.extra.weight": SHARD})),
            f"{SHARD}: tensor model.extra.weight: found no such tensor, expected it here, as {INDEX} says",
            id="index names an absent tensor",
        ),
        pytest.param(
            edit_tensor(NORM, lambda tensor: tensor[:-1].clone()),
            f"tensor {NORM}: found shape [31], expected [32]",
            id="wrong shape",
        ),
        pytest.param(
            edit_tensor(NORM, torch.Tensor.float), f"tensor {NORM}: found dtype F32, expected BF16", id="wrong dtype"
        ),
        pytest.param(
            edit_tensor(GATE, torch.Tensor.bfloat16), f"tensor {GATE}: found dtype BF16, expected F32", id="bf16 router"
        ),
        pytest.param(
            lambda d: (d / INDEX).unlink(), f"{INDEX}: found no such file, expected {INDEX} or", id="no index"
        ),
        pytest.param(lambda d: (d / INDEX).write_text("{"), f"{INDEX}: found unreadable content", id="broken index"),
        pytest.param(
            edit_json(INDEX, lambda index: index.update(weight_map=[])),
            f"{INDEX}: weight_map: found a list, expected an object",
            id="weight map of another type",
        ),
        pytest.param(
            edit_json(INDEX, lambda index: index["metadata"].update(total_size=1)),
            f"{INDEX}: metadata.total_size: found 1, expected",
            id="wrong total size",
        ),
        pytest.param(
            edit_json(INDEX, lambda index: index["metadata"].update(total_size="much")),
            f"{INDEX}: metadata.total_size: found 'much', expected a number of bytes",
            id="total size of another type",
        ),
        pytest.param(
            lambda d: shutil.copy(d / SHARD, d / "model.safetensors"),
            f"model.safetensors: found it beside {INDEX}, which does not name it alone, expected one of",
            id="single file beside an index",
        ),
        pytest.param(
            lambda d: (d / "config.json").unlink(),
            "config.json: found no such file, expected config.json in",
            id="no config",
        ),
        pytest.param(
            lambda d: (d / "config.json").write_text("[]"),
            "config.json: found a JSON list, expected",
            id="config is a list",
        ),
        pytest.param(
            edit_config(model_type="llama"), "config.json: model_type: found 'llama', expected one of", id="model type"
        ),
        pytest.param(edit_config(attn_type_list=[0]), "attn_type_list has 1 entries, expected", id="attn_type_list"),
        pytest.param(edit_config(rotary_dim=20), "rotary_dim = 20 exceeds head_dim = 16", id="rotary_dim too large"),
        pytest.param(edit_config(rotary_dim=7), "rotary_dim = 7 is odd", id="odd rotary_dim"),
        pytest.param(edit_config(num_key_value_heads=4), "not divisible by num_key_value_heads = 4", id="KV heads"),
        pytest.param(edit_config(num_experts_per_tok=3), "exceeds num_local_experts = 2", id="top-k"),
        pytest.param(
            edit_config(shared_moe_mode="mean"), "shared_moe_mode is 'mean', expected one of", id="shared mode"
        ),
        pytest.param(edit_config(shared_moe_mode=""), "shared_moe_mode is '', expected one of", id="empty shared mode"),
        pytest.param(
            edit_config(layer_types=["full_attention"] * 2), "contradicts attn_type_list", id="contradicting layers"
        ),
        pytest.param(
            edit_config(attn_type_list=5), "attn_type_list is 5, expected a list", id="attn_type_list of another type"
        ),
        pytest.param(
            edit_config(max_position_embeddings=-1), "max_position_embeddings is -1, expected", id="negative positions"
        ),
        pytest.param(edit_config(hidden_size=0), "hidden_size is 0, expected a positive integer", id="zero size"),
        pytest.param(
            edit_config(hidden_size="32"), "hidden_size is '32', expected a positive integer", id="string size"
        ),
    ],
)
def test_one_fault_gives_one_line(corrupt: Corruption, expected: str, model_dir: Path) -> None:
    corrupt(model_dir)
    report = check_checkpoint(model_dir)
    assert len(report.faults) == 1, report.faults
    line = str(report.faults[0])
    assert expected in line
    assert "\n" not in line
    with pytest.raises(CheckpointError, match=r"1 fault\(s\):\n  \S"):
        require_complete(model_dir)


def test_every_fault_is_reported(model_dir: Path) -> None:
    edit_config(rotary_dim=7)(model_dir)
    (model_dir / SHARD).unlink()
    edit_json(INDEX, lambda index: index["weight_map"].update(extra="model-00000-of-00005.safetensors"))(model_dir)
    assert [fault.file for fault in check_checkpoint(model_dir).faults] == [
        "config.json",
        "model-00000-of-00005.safetensors",
        SHARD,
    ]


def test_tensor_that_the_index_forgot(model_dir: Path) -> None:
    edit_json(INDEX, lambda index: index["weight_map"].pop(NORM))(model_dir)
    lines = [str(fault) for fault in check_checkpoint(model_dir).faults]
    assert any(line.startswith(f"{INDEX}: tensor {NORM}: found no such tensor, expected BF16 [32]") for line in lines)
    assert any(f"tensor {NORM}: found it here, but {INDEX} places it in no file" in line for line in lines)


def test_tensor_of_another_architecture(model_dir: Path) -> None:
    edit_config(num_local_experts=1, num_experts_per_tok=1)(model_dir)
    lines = [str(fault) for fault in check_checkpoint(model_dir).faults]
    assert any("experts.1.w1.weight: found an unknown tensor" in line for line in lines)
    assert any(f"tensor {GATE}: found shape [2, 32], expected [1, 32]" in line for line in lines)


def merge_shards(directory: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("model-*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (directory / INDEX).unlink()
    save_file(tensors, directory / "model.safetensors")


def test_single_file_needs_no_index(intact: Path, model_dir: Path) -> None:
    merge_shards(model_dir)
    assert require_complete(model_dir).total_size == require_complete(intact).total_size


def test_index_over_a_single_file(model_dir: Path) -> None:
    """Some converters write an index that places every tensor in the one file that there is."""
    merge_shards(model_dir)
    weight_map = dict.fromkeys(read_safetensors_header(model_dir / "model.safetensors"), "model.safetensors")
    (model_dir / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert require_complete(model_dir).num_files == 1


def test_config_dtype_of_another_type_is_a_fault(model_dir: Path) -> None:
    edit_config(dtype={"": "bfloat16"})(model_dir)
    (fault,) = check_checkpoint(model_dir).faults
    assert "dtype is {'': 'bfloat16'}, expected one of 'bfloat16', 'float16'" in str(fault)


def test_config_dtype_is_expected_of_everything_but_the_router(model_dir: Path) -> None:
    edit_config(dtype="float32")(model_dir)
    faults = check_checkpoint(model_dir).faults
    assert {fault.expected for fault in faults} == {"F32"}
    assert f"tensor {GATE}" not in {fault.subject for fault in faults}


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config is present"),
        ({"model_type": "minimax"}, "converted -hf format"),
    ],
    ids=["quantised", "-hf format"],
)
def test_what_is_not_checked_is_said(fields: dict[str, Any], note: str, model_dir: Path) -> None:
    edit_config(**fields)(model_dir)
    edit_tensor(NORM, torch.Tensor.half)(model_dir)
    report = check_checkpoint(model_dir)
    assert len(report.notes) == 1 and note in report.notes[0]
    assert report.complete


def test_no_directory(tmp_path: Path) -> None:
    assert str(check_checkpoint(tmp_path / "none").faults[0]).endswith("expected a checkpoint directory")


def test_header_of_one_file(intact: Path) -> None:
    header = read_safetensors_header(intact / SHARD)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(intact / SHARD).items()} == {
        name: spec.shape for name, spec in header.items()
    }
    with pytest.raises(CheckpointError, match="nowhere.safetensors: found no such file"):
        read_safetensors_header(intact / "nowhere.safetensors")


@pytest.mark.parametrize("shape", [[31], [32, 2], [], [16]])
def test_a_shape_that_its_offsets_do_not_hold_is_refused(shape: list[int], tmp_path: Path) -> None:
    """A file of the right length throughout: only the header contradicts itself."""
    file = tmp_path / "one.safetensors"
    header = json.dumps({NORM: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 64]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(CheckpointError, match=f"one.safetensors: .*{NORM}"):
        read_safetensors_header(file)
