# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder made to mislead: nothing outside of it is opened, nothing hangs, every fault has a line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minimax_plugin.checkpoint import (
    CheckpointError,
    check_checkpoint,
    require_safetensors,
    require_shard_names,
    require_sound_files,
    require_sound_index,
)
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint
from minimax_plugin.side_files import side_file_faults

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
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00005.safetensors"

_opened: list[str] = []
_watching = False


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note_opening)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths of the files that Python opens during the test."""
    global _watching
    _opened.clear()
    _watching = True
    yield _opened
    _watching = False


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise AssertionError("waits for a file that never ends")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact") / "model"
    write_tiny_checkpoint(directory, OPTIONS)
    return directory


@pytest.fixture
def model_dir(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rename_in_index(directory: Path, shard: str, name: str) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] = {key: name if file == shard else file for key, file in index["weight_map"].items()}

    edit_json(directory / INDEX, edit)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "..\\outside.safetensors", "x.bin"]
)
def test_the_index_leads_nowhere_else(name: str, model_dir: Path, opened: list[str]) -> None:
    """The file is a whole shard, so a check that opens it finds nothing wrong."""
    outside = model_dir.parent / "outside.safetensors"
    shutil.move(model_dir / SHARD, outside)
    shutil.copy(outside, model_dir / "x.bin")
    (model_dir / "sub").mkdir()
    name = name.format(outside=outside)
    rename_in_index(model_dir, SHARD, name)
    opened.clear()
    report = check_checkpoint(model_dir)
    refused = [fault for fault in report.faults if fault.subject.startswith("shard ")]
    assert len(refused) == 1 and name[-12:] in refused[0].subject.replace("\\\\", "\\"), report.faults
    assert refused[0].expected == "the name of a .safetensors file in this folder"
    with pytest.raises(CheckpointError, match="found a (path|file that is no .safetensors), expected the name of"):
        require_sound_files(model_dir)
    with pytest.raises(CheckpointError, match="expected the name of a .safetensors file in this folder"):
        require_sound_index(model_dir / INDEX)
    with pytest.raises(CheckpointError, match="expected the name of a .safetensors file in this folder"):
        require_shard_names({name, "model-00000-of-00005.safetensors"}, "some/repository")
    checkpoint_files = [path for path in opened if Path(path).suffix in (".safetensors", ".bin", ".json")]
    assert checkpoint_files and all(Path(path).parent == model_dir for path in checkpoint_files), opened
    assert not any(path.endswith(".bin") for path in opened)


def test_links_of_a_hub_cache_are_fine(model_dir: Path) -> None:
    blobs, snapshot = model_dir.parent / "blobs", model_dir.parent / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model_dir.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert check_checkpoint(snapshot).complete
    require_sound_files(snapshot)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        INDEX,
        SHARD,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "merges.txt",
        "x",
    ],
)
def test_pipes_keep_nobody_waiting(name: str, model_dir: Path) -> None:
    (model_dir / name).unlink(missing_ok=True)
    os.mkfifo(model_dir / name)
    lines = check_checkpoint(model_dir).lines()
    assert [line for line in lines if line.startswith(f"{name}: found no regular file, expected ")], lines


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json"])
def test_folders_and_links_in_place_of_files(name: str, model_dir: Path) -> None:
    (model_dir / name).unlink()
    (model_dir / name).mkdir()
    assert any(line.startswith(f"{name}: found a folder") for line in check_checkpoint(model_dir).lines())
    (model_dir / name).rmdir()
    (model_dir / name).symlink_to("nowhere")
    assert any(
        line.startswith(f"{name}: found a link that leads nowhere") for line in check_checkpoint(model_dir).lines()
    )


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b"\xff\xfe", b"", b"[]"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
def test_contents_that_are_no_object(name: str, content: bytes, model_dir: Path) -> None:
    (model_dir / name).write_bytes(content)
    lines = check_checkpoint(model_dir).lines()
    assert len([line for line in lines if line.startswith(f"{name}: ")]) == 1, lines


def test_names_longer_than_any_file_system_takes(model_dir: Path) -> None:
    rename_in_index(model_dir, SHARD, "a" * 5_000 + ".safetensors")
    lines = check_checkpoint(model_dir).lines()
    assert any("found a name of 5012 bytes" in line for line in lines)
    assert all(len(line) < 3_000 for line in lines)
    (fault,) = check_checkpoint(Path("a" * 5_000)).faults
    assert "File name too long" in fault.found and fault.expected == "a checkpoint directory"


def test_names_that_would_move_the_cursor(model_dir: Path) -> None:
    edit_json(model_dir / INDEX, lambda index: index["weight_map"].update({"\x1b[2J\n\ud800": SHARD}))
    lines = check_checkpoint(model_dir).lines()
    assert any("tensor \\x1b[2J\\n\\ud800" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_absent_shards_share_a_line(model_dir: Path, checkpoint_dir: Path) -> None:
    for shard in model_dir.glob("*.safetensors"):
        shard.unlink()
    (line,) = check_checkpoint(model_dir).lines()
    names = ", ".join(f"model-{number:05d}-of-00005.safetensors" for number in range(3))
    assert line == (
        f"5 of 5 shards missing: {names} … and 2 more; the first: found no such file, expected a safetensors file in "
        f"{model_dir}"
    )
    (line,) = check_checkpoint(checkpoint_dir).lines()
    assert line.startswith("413 of 413 shards missing: model-00000-of-00413.safetensors, ")


def test_pointers_of_git_lfs_share_a_line(model_dir: Path) -> None:
    for shard in model_dir.glob("*.safetensors"):
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (line,) = check_checkpoint(model_dir).lines()
    assert line.startswith("5 of 5 shards Git LFS pointers: ") and "git lfs pull" in line


def test_millions_of_experts_cost_nothing(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(num_local_experts=10**6))
    report = check_checkpoint(model_dir)
    assert [str(fault) for fault in report.faults][0].startswith("config.json: num_local_experts is 1000000, expected")
    assert report.architecture is None


def test_an_index_of_many_tensors_that_are_nowhere_is_counted(model_dir: Path) -> None:
    edit_json(
        model_dir / INDEX,
        lambda index: index["weight_map"].update({f"model.extra.{number}": SHARD for number in range(50_000)}),
    )
    report = check_checkpoint(model_dir)
    assert report.num_faults == 50_000 and len(report.faults) == 10_000
    assert report.lines()[0].startswith(f"{SHARD}: 10,000 tensors are not where the index says: tensor model.extra.0, ")
    assert report.lines()[-1] == "… and 40,000 more faults"


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForCausalLM"], "architectures: found ['LlamaForCausalLM'], expected ['MiniMaxM1ForCausalLM']"),
        (None, "architectures: found nothing, expected ['MiniMaxM1ForCausalLM'], by which vLLM finds the model"),
        ([], "architectures: found nothing, expected"),
        ("MiniMaxM1ForCausalLM", "architectures is 'MiniMaxM1ForCausalLM', expected a list of strings"),
        ([1], "architectures[0] is 1, expected a string"),
    ],
)
def test_architectures(architectures: Any, expected: str, model_dir: Path) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(architectures=architectures))
    (fault,) = check_checkpoint(model_dir).faults
    assert expected in str(fault)


def test_models_that_only_transformers_has_are_noted(model_dir: Path) -> None:
    edit_json(
        model_dir / "config.json", lambda config: config.update(architectures=["MiniMaxM1ForSequenceClassification"])
    )
    report = check_checkpoint(model_dir)
    assert report.complete and "vLLM does not serve it" in report.notes[0]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda index: index.pop("metadata"), "metadata: found None, expected an object, which transformers reads"),
        (lambda index: index.update(metadata=[]), "metadata: found [], expected an object"),
        (lambda index: index["metadata"].update(dtype="int8"), "metadata: dtype is 'int8', expected one of"),
        (lambda index: index["metadata"].update(total_size=True), "metadata.total_size: found 1, expected"),
        (lambda index: index.update(weight_map={}), "weight_map: found no tensors, expected"),
    ],
)
def test_structure_of_an_index(edit: Callable[[dict[str, Any]], object], expected: str, model_dir: Path) -> None:
    edit_json(model_dir / INDEX, edit)
    assert str(check_checkpoint(model_dir).faults[0]).startswith(f"{INDEX}: {expected}")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}, "a file that the tokenizers library refuses ("),
        ("tokenizer.json", {"model": None}, "model: found None, expected an object"),
        (
            "generation_config.json",
            {"eos_token_id": 288},
            "eos_token_id: found 288, expected ids below vocab_size = 288",
        ),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2', expected an integer"),
        ("generation_config.json", {"pad_token_id": [1]}, "pad_token_id is [1], expected an integer"),
    ],
)
def test_files_beside_the_weights(file: str, content: Any, expected: str, model_dir: Path) -> None:
    (model_dir / file).write_text(json.dumps(content))
    (fault,) = check_checkpoint(model_dir).faults
    assert fault.file == file and expected in str(fault)


def test_tokens_without_a_row_in_the_embedding(model_dir: Path) -> None:
    from tokenizers import Tokenizer

    highest = max(Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab().values())
    assert not side_file_faults(model_dir, vocab_size=highest + 1)
    (fault,) = side_file_faults(model_dir, vocab_size=highest)
    assert fault.sentence == f"found a token of the id {highest}, expected ids below vocab_size = {highest}"


def test_pickles_alone_are_refused(model_dir: Path) -> None:
    require_safetensors(model_dir)
    for shard in model_dir.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".bin"))
    (model_dir / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=r"found only model-00000-of-00005.bin, .* …, expected .* safetensors alone"
    ):
        require_safetensors(model_dir)
    with pytest.raises(CheckpointError, match="found no weights, expected"):
        require_safetensors(model_dir.parent)
