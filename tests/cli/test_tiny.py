# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin tiny``: a complete checkpoint in the released format, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from minimax_plugin.architecture import Architecture
from minimax_plugin.checkpoint import check_checkpoint
from minimax_plugin.cli import main
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint
from minimax_plugin.cli.tiny_tokenizer import build_tokenizer, printable_ids

#: SHA-256 over names and bytes of the default weights. They must not change with the machine or the version of torch.
WEIGHTS_SHA256 = "b6b32cdaa46ceeef1d7b37eb386e17c7502c7761242445b8e773037dad3892ca"


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_checkpoint(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_is_complete(tiny_dir: Path) -> None:
    report = check_checkpoint(tiny_dir)
    assert report.complete, report.faults
    assert report.num_files > 1, "the default has to exercise the index"
    expected = {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    }
    assert expected <= contents(tiny_dir).keys()


def test_same_seed_same_bytes(tiny_dir: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny_dir)
    write_tiny_checkpoint(tmp_path / "other", TinyOptions(seed=1))
    differing = {name for name, data in contents(tmp_path / "other").items() if data != contents(tiny_dir)[name]}
    assert differing == {name for name in contents(tiny_dir) if name.endswith(".safetensors")}


def test_weights_do_not_depend_on_the_machine(tiny_dir: Path) -> None:
    digest = hashlib.sha256()
    for file in sorted(tiny_dir.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256


def test_dtypes_are_those_of_the_released_checkpoint(tiny_dir: Path) -> None:
    for file in tiny_dir.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            expected = torch.float32 if name.endswith("block_sparse_moe.gate.weight") else torch.bfloat16
            assert tensor.dtype == expected, name


def test_config_has_the_keys_of_the_released_one(tiny_dir: Path, checkpoint_dir: Path) -> None:
    released = json.loads((checkpoint_dir / "config.json").read_text())
    config = json.loads((tiny_dir / "config.json").read_text())
    assert config.keys() == released.keys()
    assert config["auto_map"] == released["auto_map"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)
    same = {key for key in config if config[key] == released[key]}
    assert {"model_type", "architectures", "rope_theta", "layernorm_mlp_alpha", "postnorm", "rms_norm_eps"} <= same


def test_tokenizer_config_differs_from_the_released_one_in_the_template_only(
    tiny_dir: Path, checkpoint_dir: Path
) -> None:
    released = json.loads((checkpoint_dir / "tokenizer_config.json").read_text())
    config = json.loads((tiny_dir / "tokenizer_config.json").read_text())
    assert config.keys() == released.keys()
    assert {key for key in config if config[key] != released[key]} <= {"chat_template"}


def test_generation_config_names_the_special_tokens(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    assert json.loads((tiny_dir / "generation_config.json").read_text()) == {
        "bos_token_id": tokenizer.token_to_id("<beginning_of_sentence>"),
        "eos_token_id": tokenizer.token_to_id("<end_of_sentence>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
    }


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("company's", ["company's"]),
        ("camelCase", ["camel", "Case"]),
        ("a  b", ["a", " ", " b"]),
        ("价格 naïve", ["价格", " naïve"]),
    ],
)
def test_text_is_split_like_o200k(text: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(768)
    split = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in split] == pieces


@pytest.mark.parametrize("text", ["What do you see?", "1, 2, 3", "价格 naïve 🙂", "<beginning_of_sentence>user"])
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer(768)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("vocab_size", [288, 300, 768, 4096])
def test_every_token_has_a_row(vocab_size: int) -> None:
    tokenizer = build_tokenizer(vocab_size)
    assert max(tokenizer.get_vocab().values()) < vocab_size
    assert all(tokenizer.decode([i]).isprintable() for i in printable_ids(tokenizer))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--layers", "9"], {"layer_types": "LLLLLLLSS"}, id="default pattern"),
        pytest.param(["--layers", "3", "--attn-types", "1,0,0"], {"layer_types": "SLL"}, id="given pattern"),
        pytest.param(["--layers", "1"], {"layer_types": "S"}, id="one layer"),
        pytest.param(["--heads", "6", "--kv-heads", "3"], {"num_attention_heads": 6}, id="heads"),
        pytest.param(["--head-dim", "32", "--rotary-dim", "8"], {"head_dim": 32, "rotary_dim": 8}, id="head dim"),
        pytest.param(["--experts", "5", "--top-k", "3"], {"num_experts_per_tok": 3}, id="top 3"),
        pytest.param(["--hidden", "96", "--vocab", "400"], {"hidden_size": 96, "vocab_size": 400}, id="hidden, vocab"),
        pytest.param(
            ["--architecture", "text01", "--shared-expert", "64"], {"shared_intermediate_size": 64}, id="shared expert"
        ),
        pytest.param(["--shard-size", "1"], {}, id="one tensor per file"),
    ],
)
def test_options(arguments: list[str], expected: dict[str, object], tmp_path: Path) -> None:
    small = ["--intermediate", "32"]
    assert main(["tiny", str(tmp_path / "model"), *small, *arguments]) == 0
    report = check_checkpoint(tmp_path / "model")
    assert report.complete, report.faults
    assert isinstance(report.architecture, Architecture)
    for name, value in expected.items():
        found: object = getattr(report.architecture, name)
        if name == "layer_types":
            found = "".join("L" if layer == "linear_attention" else "S" for layer in report.architecture.layer_types)
        assert found == value


def test_text01_names_itself(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", TinyOptions(architecture="text01"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MiniMaxText01ForCausalLM"], "minimax_text_01")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rotary-dim", "66"], "rotary_dim = 66 exceeds head_dim = 64"),
        (["--rotary-dim", "7"], "rotary_dim = 7 is odd"),
        (["--kv-heads", "3"], "num_attention_heads = 4 is not divisible by num_key_value_heads = 3"),
        (["--top-k", "9"], "exceeds num_local_experts = 4"),
        (["--attn-types", "0,1"], "attn_type_list has 2 entries, expected num_hidden_layers = 4"),
        (["--attn-types", "0,1,2,0"], "attn_type_list[2] is 2"),
        (["--hidden", "1000000"], "make a checkpoint of 30,802,001,536 bytes, expected at most 2,147,483,648"),
        (
            ["--hidden", "1000000000000"],
            "hidden_size is 1000000000000, expected a positive integer of at most 1,048,576",
        ),
        (["--layers", "1000000000"], "num_hidden_layers is 1000000000, expected a positive integer of at most 10,000"),
        (["--experts", "1000000"], "num_local_experts is 1000000, expected a positive integer of at most 65,536"),
        (["--hidden", "0"], "hidden_size is 0, expected a positive integer"),
        (["--max-positions", "0"], "max_position_embeddings is 0, expected a positive integer"),
        (["--vocab", "287"], "vocab_size is 287, expected at least 288"),
        (["--shard-size", "0"], "shard_size is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_sizes_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny", str(tmp_path / "model"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_refuses_a_directory_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["tiny", str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty; choose another directory or pass --force" in capsys.readouterr().err
    assert contents(tmp_path).keys() == {"notes.txt"}


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, TinyOptions(shard_size=1))
    (tmp_path / "model.safetensors").touch()
    mine = {"notes.txt", "model_adapter.safetensors", "model-backup.safetensors"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_tiny_checkpoint(tmp_path, force=True)
    assert check_checkpoint(tmp_path).complete
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    weights = {file.name for file in tmp_path.glob("*.safetensors")} - mine
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert weights == set(index["weight_map"].values())


#: Writes no file of more than 400,000 bytes, as on a disk that is about to be full.
_ON_A_FULL_DISK = """
import resource, sys
from minimax_plugin.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
sys.exit(main(["tiny", *sys.argv[1:]]))
"""


def tiny_on_a_full_disk(*arguments: str) -> str:
    command = [sys.executable, "-c", _ON_A_FULL_DISK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent/model"):
        error = tiny_on_a_full_disk(str(tmp_path / name))
        assert "File too large" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, TinyOptions(num_hidden_layers=1))
    before = contents(tmp_path)
    tiny_on_a_full_disk(str(tmp_path), "--force")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["tiny"], ["tiny", "x", "--attn-types", "a,b"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: minimax-plugin" in capsys.readouterr().err
