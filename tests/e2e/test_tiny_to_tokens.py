# SPDX-License-Identifier: Apache-2.0
"""From nothing to exact tokens, through the commands and classes that a user sees."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import minimax_plugin  # noqa: F401 - registers the model
from minimax_plugin.cli import main

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "A long memory does not need to keep each word;"
NEW_TOKENS = 16


@pytest.fixture(scope="module", params=["m1", "text01"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("e2e") / request.param
    shared = ["--shared-expert", "96"] if request.param == "text01" else []
    assert main(["tiny", str(directory), "--architecture", request.param, *shared]) == 0
    return directory


def test_tiny_checkpoint_gives_the_tokens_of_the_oracle(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    tensors: dict[str, torch.Tensor] = {}
    for file in model_dir.glob("*.safetensors"):
        tensors |= load_file(file)
    oracle = Oracle(json.loads((model_dir / "config.json").read_text()), tensors)
    assert output[0, prompt.shape[1] :].tolist() == oracle.greedy(prompt[0].tolist(), NEW_TOKENS)
    text = tokenizer.decode(output[0, prompt.shape[1] :])
    assert text.isascii() and text.isprintable()


def test_doctor_finds_a_saved_checkpoint_complete(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    status = main(["doctor", "--skip-vllm", "--json", str(tmp_path / "saved")])
    result = json.loads(capsys.readouterr().out)
    assert status == 0, result
    assert result["checkpoint"]["complete"] and result["checkpoint"]["files"] > 1


def test_example_for_transformers_answers(model_dir: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "generate_hf" / "generate.py"
    command = [sys.executable, str(script), str(model_dir), "What do you see?", "--max-new-tokens", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = done.stdout.rstrip("\n")
    assert answer and answer.isascii() and answer.isprintable()


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("vllm", "openai")),
    reason="needs vLLM and the openai client",
)
def test_demo_shows_the_same_tokens_in_both_backends(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--keep", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  same      ") == 5
    assert "DIFFERENT" not in done.stdout
