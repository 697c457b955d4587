# SPDX-License-Identifier: Apache-2.0
"""vLLM reads safetensors files of the folder or repository that was asked for, and nothing is ever unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import load_checkpoint, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from minimax_plugin.checkpoint import CheckpointError  # noqa: E402

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: What the weights outside of the folder are filled with.
BAIT = 7.0

Load = Callable[..., set[str]]


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that reached ``torch.load``."""
    files: list[str] = []

    def load(file: Any, *_: Any, **__: Any) -> dict[str, Any]:
        files.append(str(file))
        return {}

    monkeypatch.setattr(torch, "load", load)
    return files


@pytest.fixture
def model_dir(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", *load_checkpoint(tiny_checkpoint), num_shards=3)


@pytest.fixture
def load(tiny_config_of_vllm: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a folder or repository into the tiny model as vLLM's own loader does."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def load(source: str | Path, **options: Any) -> set[str]:
        config = tiny_config_of_vllm.model_config
        monkeypatch.setattr(config, "model", str(source))
        load_config = LoadConfig(**options)
        monkeypatch.setattr(tiny_model, "_load_config", load_config)
        monkeypatch.setattr(tiny_model, "_expects_whole_checkpoint", True)
        weights = DefaultModelLoader(load_config).get_all_weights(config, tiny_model)
        loaded: set[str] = tiny_model.load_weights(weights)
        return loaded

    return load


def rename_shard(directory: Path, name: str) -> None:
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"] = {key: name if file == SHARD else file for key, file in content["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(content))


def bait(directory: Path) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, BAIT) for name, tensor in load_file(directory / SHARD).items()}


def outside(directory: Path) -> None:
    save_file(bait(directory), directory.parent / "outside.safetensors")
    rename_shard(directory, "../outside.safetensors")


def absolute(directory: Path) -> None:
    save_file(bait(directory), directory.parent / "outside.safetensors")
    rename_shard(directory, str(directory.parent / "outside.safetensors"))


def pickled_shard(directory: Path) -> None:
    torch.save(bait(directory), directory / "a.bin")
    rename_shard(directory, "a.bin")


def only_pickles(directory: Path) -> None:
    torch.save(bait(directory), directory / "pytorch_model.bin")
    torch.save(bait(directory), directory / "model.pt")
    for file in (*directory.glob("*.safetensors"), directory / INDEX):
        file.unlink()


def pickles_by_the_index(directory: Path) -> None:
    names = json.loads((directory / INDEX).read_text())["weight_map"]
    only_pickles(directory)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (directory / INDEX).write_text(json.dumps(index))


def consolidated(directory: Path) -> None:
    save_file(bait(directory), directory / "consolidated.safetensors")


REFUSED = [
    (outside, "shard '../outside.safetensors': found a path, expected the name of a .safetensors file"),
    (absolute, "outside.safetensors': found a path, expected"),
    (pickled_shard, "shard 'a.bin': found a file that is no .safetensors"),
    (pickles_by_the_index, "shard 'pytorch_model.bin': found a file that is no .safetensors"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSED,
        (only_pickles, "found only model.pt, pytorch_model.bin, expected .* safetensors alone"),
        (consolidated, "consolidated.safetensors: found it beside the weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_local_folders(
    change: Callable[[Path], None], message: str, model_dir: Path, load: Load, tiny_model: Any, unpickled: list[str]
) -> None:
    change(model_dir)
    with pytest.raises(CheckpointError, match=message):
        load(model_dir)
    assert not unpickled
    assert not any((parameter == BAIT).any() for parameter in tiny_model.parameters())


def test_an_intact_folder_loads(model_dir: Path, load: Load, tiny_model: Any) -> None:
    torch.save({}, model_dir / "pytorch_model.bin")
    assert load(model_dir) >= {"lm_head.weight"}
    stored = load_checkpoint(model_dir)[1]["lm_head.weight"].float()
    assert torch.equal(tiny_model.lm_head.weight[: len(stored)], stored)


def as_cached_repository(directory: Path, cache: Path) -> None:
    """Lay the files out as the hub client does; what lies beside the folder comes to lie beside the snapshot."""
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


@pytest.mark.parametrize(
    ("change", "message"),
    [*REFUSED, (only_pickles, "some/model has no safetensors files, the only format that this package reads")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_repositories_in_the_cache(
    change: Callable[[Path], None],
    message: str,
    model_dir: Path,
    tmp_path: Path,
    load: Load,
    tiny_model: Any,
    unpickled: list[str],
) -> None:
    change(model_dir)
    as_cached_repository(model_dir, tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load("some/model", download_dir=str(tmp_path / "cache"))
    assert not unpickled
    assert not any((parameter == BAIT).any() for parameter in tiny_model.parameters())


def test_an_intact_repository_in_the_cache_loads(model_dir: Path, tmp_path: Path, load: Load) -> None:
    """Its files are symbolic links that lead out of their folder."""
    as_cached_repository(model_dir, tmp_path / "cache")
    assert load("some/model", download_dir=str(tmp_path / "cache")) >= {"lm_head.weight"}


def test_a_repository_of_one_file_in_the_cache_loads(tiny_checkpoint: Path, tmp_path: Path, load: Load) -> None:
    as_cached_repository(tiny_checkpoint, tmp_path / "cache")
    assert load("some/model", download_dir=str(tmp_path / "cache")) >= {"lm_head.weight"}


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_formats_of_pickles_are_refused(load_format: str, tiny_config_of_vllm: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = tiny_config_of_vllm.with_hf_config(tiny_config_of_vllm.model_config.hf_config)
    config.load_config = type(config.load_config)(load_format=load_format)
    with (
        set_current_vllm_config(config),
        torch.device("meta"),
        pytest.raises(ValueError, match=f"--load-format is '{load_format}', expected 'auto' or 'safetensors'"),
    ):
        initialize_model(vllm_config=config)


def test_weights_in_object_storage(model_dir: Path, tmp_path: Path) -> None:
    """vLLM fetches everything but the weights into a folder and streams the rest."""
    from minimax_plugin.vllm_model.sources import require_safe_source

    for file in model_dir.glob("*.safetensors"):
        file.rename(tmp_path / file.name)
    config: Any = SimpleNamespace(model=str(model_dir), model_weights="s3://bucket/model", revision=None)
    load_config: Any = SimpleNamespace(load_format="runai_streamer", download_dir=None)
    assert require_safe_source(config, load_config) is None
    rename_shard(model_dir, "../a.safetensors")
    with pytest.raises(CheckpointError, match="shard '../a.safetensors': found a path"):
        require_safe_source(config, load_config)
