# SPDX-License-Identifier: Apache-2.0
"""Weights come from safetensors files in the folder that was asked for, and nothing is ever unpickled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minimax_plugin.checkpoint import CheckpointError
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1ForCausalLM
from minimax_plugin.hf_modeling.sources import require_safe_files

SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that reached ``torch.load``."""
    files: list[str] = []

    def load(file: Any, *_: Any, **__: Any) -> dict[str, Any]:
        files.append(str(file))
        return {}

    monkeypatch.setattr(torch, "load", load)
    return files


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1])
    assert not {"dtype", "torch_dtype"} & config.keys(), "transformers looks into the first shard only without a dtype"
    return write_checkpoint(path, config, random_tensors(config), num_shards=3)


@pytest.fixture
def model_dir(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def rename_shard(directory: Path, name: str, *, index: str = INDEX) -> None:
    content = json.loads((directory / index).read_text())
    content["weight_map"] = {key: name if file == SHARD else file for key, file in content["weight_map"].items()}
    (directory / index).write_text(json.dumps(content))


def merged(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def remove_weights(directory: Path) -> None:
    for file in (*directory.glob("*.safetensors"), directory / INDEX):
        file.unlink()


def outside(directory: Path) -> None:
    shutil.move(directory / SHARD, directory.parent / "outside.safetensors")
    rename_shard(directory, "../outside.safetensors")


def absolute(directory: Path) -> None:
    shutil.move(directory / SHARD, directory.parent / "outside.safetensors")
    rename_shard(directory, str(directory.parent / "outside.safetensors"))


def below(directory: Path) -> None:
    (directory / "sub").mkdir()
    shutil.move(directory / SHARD, directory / "sub" / SHARD)
    rename_shard(directory, f"sub/{SHARD}")


def pickled_shard(directory: Path) -> None:
    torch.save(load_file(directory / SHARD), directory / "a.bin")
    rename_shard(directory, "a.bin")


def only_pickle(directory: Path) -> None:
    torch.save(merged(directory), directory / "pytorch_model.bin")
    remove_weights(directory)


def only_pickled_shards(directory: Path) -> None:
    weight_map = dict.fromkeys(merged(directory), "pytorch_model-00001-of-00001.bin")
    only_pickle(directory)
    (directory / "pytorch_model.bin").rename(directory / "pytorch_model-00001-of-00001.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def explicit_pickle(directory: Path) -> None:
    torch.save(merged(directory), directory / "adapter_model.bin")
    add_to_config(directory, transformers_weights="adapter_model.bin")


def explicit_index(directory: Path) -> None:
    shutil.copy(directory / INDEX, directory / "other.safetensors.index.json")
    shutil.move(directory / SHARD, directory.parent / "outside.safetensors")
    rename_shard(directory, "../outside.safetensors", index="other.safetensors.index.json")
    shutil.copy(directory.parent / "outside.safetensors", directory / SHARD)
    add_to_config(directory, transformers_weights="other.safetensors.index.json")


def add_to_config(directory: Path, **fields: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | fields))


REFUSED = [
    (outside, "shard '../outside.safetensors': found a path, expected the name of a .safetensors file"),
    (absolute, "outside.safetensors': found a path, expected"),
    (below, "found a path, expected"),
    (pickled_shard, "shard 'a.bin': found a file that is no .safetensors, expected"),
    (only_pickle, "found only pytorch_model.bin, expected .*this package reads safetensors alone"),
    (only_pickled_shards, "found only pytorch_model-00001-of-00001.bin, expected .* safetensors alone"),
    (remove_weights, "found no weights, expected model.safetensors.index.json or model.safetensors"),
    (explicit_pickle, "transformers_weights is 'adapter_model.bin', expected it absent"),
    (explicit_index, "transformers_weights is 'other.safetensors.index.json', expected it absent"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, MiniMaxM1ForCausalLM.from_pretrained])
def test_local_folders(
    change: Callable[[Path], None], message: str, load: Callable[..., Any], model_dir: Path, unpickled: list[str]
) -> None:
    change(model_dir)
    with pytest.raises(ValueError, match=message):
        load(model_dir)
    assert not unpickled


NONE_THERE = "found no safetensors files, expected model.safetensors.index.json or model.safetensors: .* alone"
REFUSED_THERE = [
    *(case for case in REFUSED if case[0] in (outside, absolute, pickled_shard, explicit_pickle, explicit_index)),
    *((change, NONE_THERE) for change in (only_pickle, only_pickled_shards, remove_weights)),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_THERE, ids=lambda value: getattr(value, "__name__", ""))
def test_repositories_in_the_cache(
    change: Callable[[Path], None], message: str, model_dir: Path, tmp_path: Path, unpickled: list[str]
) -> None:
    change(model_dir)
    cache = as_cached_repository(model_dir, tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained("some/model", cache_dir=cache, local_files_only=True)
    assert not unpickled


def test_an_intact_repository_in_the_cache_loads(model_dir: Path, tmp_path: Path) -> None:
    """Its files are symbolic links that lead out of their folder."""
    cache = as_cached_repository(model_dir, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained("some/model", cache_dir=cache, local_files_only=True)
    assert torch.equal(model.lm_head.weight, merged(model_dir)["lm_head.weight"])


def as_cached_repository(directory: Path, cache: Path) -> Path:
    """Lay the files out as the hub client does. What lies beside the folder comes to lie beside the snapshot."""
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    for file in directory.parent.glob("*.safetensors"):
        shutil.copy(file, snapshot.parent)
    return cache


def test_a_pickle_beside_the_weights_is_not_looked_at(model_dir: Path, unpickled: list[str]) -> None:
    expected = merged(model_dir)["lm_head.weight"]
    torch.save({}, model_dir / "pytorch_model.bin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model_dir).lm_head.weight, expected)
    assert not unpickled


def test_pickles_are_refused_when_asked_for(model_dir: Path, unpickled: list[str]) -> None:
    torch.save(merged(model_dir), model_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match="use_safetensors is False, expected True or nothing"):
        AutoModelForCausalLM.from_pretrained(model_dir, use_safetensors=False)
    config = MiniMaxM1Config.from_pretrained(model_dir)
    with pytest.raises(ValueError, match="pytorch_model.bin, expected a folder, a repository or a .safetensors file"):
        MiniMaxM1ForCausalLM.from_pretrained(str(model_dir / "pytorch_model.bin"), config=config)
    with pytest.raises(ValueError, match="transformers_weights is 'pytorch_model.bin', expected it absent"):
        MiniMaxM1ForCausalLM.from_pretrained(model_dir, transformers_weights="pytorch_model.bin")
    assert not unpickled


def test_variants(model_dir: Path, unpickled: list[str]) -> None:
    """``variant`` names other files, which the same rule holds for."""
    expected = merged(model_dir)["lm_head.weight"]
    index = "model.safetensors.index.fp16.json"
    (model_dir / INDEX).rename(model_dir / index)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model_dir, variant="fp16").lm_head.weight, expected)
    shutil.move(model_dir / SHARD, model_dir.parent / "outside.safetensors")
    rename_shard(model_dir, "../outside.safetensors", index=index)
    with pytest.raises(CheckpointError, match=f"{index}: shard '../outside.safetensors': found a path"):
        AutoModelForCausalLM.from_pretrained(model_dir, variant="fp16")
    (model_dir / index).unlink()
    torch.save({}, model_dir / "pytorch_model.fp16.bin")
    with pytest.raises(CheckpointError, match=f"expected {index} or model.fp16.safetensors"):
        AutoModelForCausalLM.from_pretrained(model_dir, variant="fp16")
    assert not unpickled


def test_subfolders(model_dir: Path, tmp_path: Path, unpickled: list[str]) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(model_dir, folder / "part")
    shutil.copy(model_dir / "config.json", folder)
    model = MiniMaxM1ForCausalLM.from_pretrained(folder, subfolder="part")
    assert torch.equal(model.lm_head.weight, merged(model_dir)["lm_head.weight"])
    outside(folder / "part")
    with pytest.raises(CheckpointError, match="shard '../outside.safetensors': found a path"):
        MiniMaxM1ForCausalLM.from_pretrained(folder, subfolder="part")
    only_pickle(folder / "part")
    with pytest.raises(CheckpointError, match="found only pytorch_model.bin"):
        MiniMaxM1ForCausalLM.from_pretrained(folder, subfolder="part")
    assert not unpickled


def test_the_base_of_an_adapter(model_dir: Path, tmp_path: Path, unpickled: list[str]) -> None:
    """An adapter's folder holds no model and names another folder that does."""
    pytest.importorskip("peft")
    pickled_shard(model_dir)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_dir)}))
    with pytest.raises(CheckpointError, match="shard 'a.bin': found a file that is no .safetensors"):
        MiniMaxM1ForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not unpickled


def test_files_that_transformers_settled_on_by_another_way() -> None:
    require_safe_files(["a/b.safetensors"], {"weight_map": {"x": "b.safetensors"}}, "some/model")
    with pytest.raises(CheckpointError, match="shard '../b.safetensors': found a path"):
        require_safe_files(["a/b.safetensors"], {"weight_map": {"x": "../b.safetensors"}}, "some/model")
    with pytest.raises(CheckpointError, match="b.bin: found a pickle, expected a .safetensors file"):
        require_safe_files(["a/b.bin"], None, "some/model")


def test_that_way_is_watched(model_dir: Path, unpickled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pickled_shard(model_dir)
    monkeypatch.setattr("minimax_plugin.hf_modeling.loading.require_safe_source", lambda *_: None)
    with pytest.raises(CheckpointError, match="shard 'a.bin': found a file that is no .safetensors"):
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert not unpickled
