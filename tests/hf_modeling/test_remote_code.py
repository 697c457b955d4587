# SPDX-License-Identifier: Apache-2.0
"""Code that lies in a checkpoint folder does not run, and does not change the tokenizer either."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_folder import PLANTED, HostileFolder
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, dynamic_module_utils, pipeline

from minimax_plugin.checkpoint import CheckpointError
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1ForCausalLM
from minimax_plugin.hf_modeling.tokenization import MiniMaxM1Tokenizer

TEXT = "The company's 1234567 camelCase tokens won't cost $12.50 in 2025 don't"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "tiny"
    write_tiny_checkpoint(directory, TinyOptions(num_hidden_layers=2))
    return directory


@pytest.fixture(autouse=True)
def _nobody_asks_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(prompt: str = "") -> str:
        raise AssertionError(f"asked the user: {prompt}")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def hostile(tiny: Path, tmp_path: Path) -> HostileFolder:
    return HostileFolder(tiny, tmp_path / "hostile")


def expected_ids(folder: HostileFolder) -> list[int]:
    return Tokenizer.from_file(str(folder.path / "tokenizer.json")).encode(TEXT).ids


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_no_code_of_a_folder_runs(hostile: HostileFolder, trust_remote_code: bool | None) -> None:
    trust = {"trust_remote_code": trust_remote_code}
    AutoConfig.from_pretrained(hostile.path, **trust)
    tokenizer = AutoTokenizer.from_pretrained(hostile.path, **trust)
    model = AutoModelForCausalLM.from_pretrained(hostile.path, **trust)
    assert type(model) is MiniMaxM1ForCausalLM
    inputs = tokenizer("a", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, inputs.input_ids.shape[1] + 2)
    generated = pipeline("text-generation", str(hostile.path), **trust)("a", max_new_tokens=2)
    assert generated[0]["generated_text"].startswith("a")
    assert hostile.ran() == []


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("classes", [{"AutoTokenizer": [f"{PLANTED}.Planted", None]}, [f"{PLANTED}.Planted", None]])
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["minimax_m1", "MiniMaxM1", "minimax_text_01"])
def test_a_folder_cannot_choose_another_tokenizer(
    hostile: HostileFolder, model_type: str, named: str | None, classes: object, trust_remote_code: bool | None
) -> None:
    hostile.change("config.json", model_type=model_type)
    hostile.change("tokenizer_config.json", auto_map=classes, tokenizer_class=named)
    tokenizer = AutoTokenizer.from_pretrained(hostile.path, trust_remote_code=trust_remote_code)
    assert tokenizer(TEXT).input_ids == expected_ids(hostile)
    assert type(tokenizer) is MiniMaxM1Tokenizer
    assert hostile.ran() == []


def test_nor_by_a_config_that_cannot_be_used(hostile: HostileFolder) -> None:
    """AutoTokenizer goes on without the config then, and would take any class that the folder names."""
    hostile.change("config.json", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act"):
        AutoConfig.from_pretrained(hostile.path)
    for trust_remote_code in (None, True):
        tokenizer = AutoTokenizer.from_pretrained(hostile.path, trust_remote_code=trust_remote_code)
        assert tokenizer(TEXT).input_ids == expected_ids(hostile)
    assert hostile.ran() == []


def test_ignored_code_is_named(hostile: HostileFolder, caplog: pytest.LogCaptureFixture) -> None:
    AutoTokenizer.from_pretrained(hostile.path, trust_remote_code=True)
    assert "names code (auto_map); it is not run" in caplog.text
    AutoModelForCausalLM.from_pretrained(hostile.path, trust_remote_code=True)
    assert "custom_generate/generate.py is not run" in caplog.text


@pytest.mark.parametrize("beside_safetensors", [True, False])
def test_no_pickle_runs(hostile: HostileFolder, beside_safetensors: bool) -> None:
    hostile.plant_pickles()
    if beside_safetensors:
        AutoModelForCausalLM.from_pretrained(hostile.path)
    else:
        for file in hostile.path.glob("*.safetensors*"):
            file.unlink()
        with pytest.raises(CheckpointError, match="reading a pickle runs code"):
            AutoModelForCausalLM.from_pretrained(hostile.path)
    assert hostile.ran() == []
    pickle.loads((hostile.path / "pytorch_model.bin").read_bytes())
    assert hostile.ran() == ["pytorch_model.bin"]


def load_misspelt(hostile: HostileFolder) -> None:
    hostile.change("config.json", model_type="minimax-m1")
    AutoConfig.from_pretrained(hostile.path, trust_remote_code=True)


def load_processor(hostile: HostileFolder) -> None:
    hostile.change("processor_config.json", auto_map={"AutoProcessor": f"{PLANTED}.Planted"})
    AutoProcessor.from_pretrained(hostile.path, trust_remote_code=True)


def generate_with_code(hostile: HostileFolder) -> None:
    model = AutoModelForCausalLM.from_pretrained(hostile.path)
    model.generate(torch.tensor([[1]]), custom_generate=str(hostile.path), trust_remote_code=True)


@pytest.mark.parametrize(
    ("load", "ran"),
    [
        (load_misspelt, f"{PLANTED}.py"),
        (load_processor, f"{PLANTED}.py"),
        (generate_with_code, "custom_generate/generate.py"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_trust_remote_code_still_runs(
    hostile: HostileFolder, load: Callable[[HostileFolder], Any], ran: str
) -> None:
    """The limits that docs/huggingface.md states; it also shows that planted code reports its running."""
    try:
        load(hostile)
    except Exception as error:  # the planted classes are of no use
        assert "Planted" in str(error) or "planted" in str(error), error
    assert ran in hostile.ran()


def test_the_misspelt_type_runs_nothing_without_trust(hostile: HostileFolder) -> None:
    hostile.change("config.json", model_type="minimax-m1")
    for trust in ({}, {"trust_remote_code": False}):
        for auto_class in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises((ValueError, AssertionError)):
                auto_class.from_pretrained(hostile.path, **trust)
    assert hostile.ran() == []
