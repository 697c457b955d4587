# SPDX-License-Identifier: Apache-2.0
"""The doctor calls a folder sound exactly where transformers loads it, and survives folders made to break it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_plugin.checkpoint import check_checkpoint
from minimax_plugin.cli import main
from minimax_plugin.cli.load_check import loading_faults
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
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00005.safetensors"

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact") / "model"
    write_tiny_checkpoint(directory, OPTIONS)
    return directory


@pytest.fixture
def model_dir(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def edited(name: str, **fields: Any) -> Change:
    def change(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | fields))

    return change


def written(name: str, content: str) -> Change:
    return lambda directory: (directory / name).write_text(content)


def removed(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def config(**fields: Any) -> Change:
    return edited("config.json", **fields)


def retyped(name: str, dtype: torch.dtype) -> Change:
    def change(directory: Path) -> None:
        file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def loads(directory: Path) -> str:
    """What transformers says to a folder: empty, or the error."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        AutoConfig.from_pretrained(directory)
        AutoModelForCausalLM.from_pretrained(directory)
        AutoTokenizer.from_pretrained(directory)
        if (directory / "generation_config.json").exists():
            GenerationConfig.from_pretrained(directory)
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


SOUND: dict[str, Change] = {
    "as written": lambda directory: None,
    "no generation config": removed("generation_config.json"),
    "unknown key": config(made_up={"a": [1]}),
    "integer for a float": config(rope_theta=10_000, attention_dropout=0),
    "dtype stated": config(dtype="bfloat16"),
    "released spelling": config(model_type="MiniMaxM1"),
    "other template": edited("tokenizer_config.json", chat_template="{{ 1 }}"),
    "sampling": edited("generation_config.json", temperature=0.5, do_sample=True, top_p=0.9),
}
UNSOUND: dict[str, Change] = {
    "activation": config(hidden_act="gelu"),
    "epsilon is a string": config(rms_norm_eps="1e-5"),
    "negative theta": config(rope_theta=-1),
    "postnorm is a string": config(postnorm="false"),
    "postnorm is null": config(postnorm=None),
    "residual factor": config(layernorm_mlp_alpha=1e308),
    "window": config(sliding_window=5),
    "layers": config(num_hidden_layers=3),
    "experts": config(num_local_experts=10**6),
    "heads": config(num_key_value_heads=3),
    "deep": config(made_up=json.loads("[" * 200 + "]" * 200)),
    "model type": config(model_type="no_such_model"),
    "dtype": config(torch_dtype="int8"),
    "config is a list": written("config.json", "[]"),
    "config breaks off": written("config.json", "{"),
    "no config": removed("config.json"),
    "tokenizer breaks off": written("tokenizer.json", "{"),
    "tokenizer without model": written("tokenizer.json", "{}"),
    "tokenizer of another kind": edited("tokenizer.json", model={"type": "BPE", "vocab": 1}),
    "tokenizer config breaks off": written("tokenizer_config.json", "{"),
    "tokenizer config is a list": written("tokenizer_config.json", "[1]"),
    "token of a wrong type": edited("tokenizer_config.json", bos_token=[5]),
    "template of a wrong type": edited("tokenizer_config.json", chat_template=[1]),
    "generation config breaks off": written("generation_config.json", "{"),
    "generation config is a list": written("generation_config.json", "[1]"),
    "tokens to generate": edited("generation_config.json", max_new_tokens=-1),
    "no shard": removed(SHARD),
    "shard breaks off": lambda directory: os.truncate(directory / SHARD, 100),
    "integer weights": retyped("model.norm.weight", torch.int8),
    "no index": removed(INDEX),
    "index breaks off": written(INDEX, "{"),
    "index without metadata": lambda directory: written(
        INDEX, json.dumps({"weight_map": json.loads((directory / INDEX).read_text())["weight_map"]})
    )(directory),
}


@pytest.mark.parametrize("case", [*SOUND, *UNSOUND])
def test_the_verdict_is_that_of_transformers(case: str, model_dir: Path) -> None:
    (SOUND | UNSOUND)[case](model_dir)
    report = check_checkpoint(model_dir)
    report.faults.extend(loading_faults(report))
    said = loads(model_dir)
    assert bool(said) == (case in UNSOUND), said or "transformers loads it: the case proves nothing"
    assert report.complete == (not said), f"transformers: {said}; doctor: {report.lines()}"


def deep_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"a":' * 20_000 + "1" + "}" * 20_000)


def deep_index(directory: Path) -> None:
    (directory / INDEX).write_text("[" * 100_000 + "]" * 100_000)


def long_name(directory: Path) -> None:
    edited(INDEX, weight_map={"model.norm.weight": "a" * 10_000 + ".safetensors"})(directory)


def strange_names(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= {"\ud800 \u2028 \x1b[2J": SHARD, "表 …": SHARD}
    (directory / INDEX).write_text(json.dumps(index))


def million_experts(directory: Path) -> None:
    config(num_local_experts=10**6, num_hidden_layers=10**9, vocab_size=10**400)(directory)


def pipe(directory: Path) -> None:
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")


@pytest.mark.parametrize("change", [deep_config, deep_index, long_name, strange_names, million_experts, pipe])
@pytest.mark.parametrize("as_json", [False, True], ids=["lines", "json"])
def test_nothing_breaks_the_doctor(
    change: Change, as_json: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal that shows ASCII alone."""
    monkeypatch.setattr("minimax_plugin.cli.doctor.check_environment", lambda **_: [])
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    change(model_dir)
    assert main(["doctor", *(["--json"] if as_json else []), str(model_dir)]) == 1
    said = shown.getvalue().decode("ascii")
    assert len(said) < 20_000
    if as_json:
        result = json.loads(said)
        assert not result["ok"] and not result["checkpoint"]["complete"] and result["checkpoint"]["num_faults"] > 0
    else:
        assert all(line.startswith("fault ") for line in said.splitlines()[:-1]) and "fault(s)" in said


def test_a_folder_without_shards_has_one_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minimax_plugin.cli.doctor.check_environment", lambda **_: [])
    for shard in model_dir.glob("*.safetensors"):
        shard.unlink()
    assert main(["doctor", str(model_dir)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("fault   checkpoint   5 of 5 shards missing: model-00000-of-00005.safetensors, ")
    assert "… and 2 more; the first: found no such file" in line and last == "5 fault(s)"
    assert main(["doctor", "--json", str(model_dir)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert len(result["checkpoint"]["faults"]) == result["checkpoint"]["num_faults"] == 5
    assert len(result["findings"]) == 1


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("token of a wrong type", "tokenizer files: transformers cannot load it ("),
        ("tokens to generate", "generation_config.json: transformers cannot load it (ValueError: "),
    ],
)
def test_what_only_transformers_sees_is_said(
    case: str, line: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minimax_plugin.cli.doctor.check_environment", lambda **_: [])
    UNSOUND[case](model_dir)
    assert check_checkpoint(model_dir).complete
    assert main(["doctor", str(model_dir)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"fault   checkpoint   {line}") and said[1:] == ["1 fault(s)"]
