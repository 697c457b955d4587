# SPDX-License-Identifier: Apache-2.0
"""Two processes, replicated and sharded, train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("parallel_training_process.py")

pytestmark = pytest.mark.slow


def run(mode: str, model: Path, folder: Path) -> dict[str, torch.Tensor]:
    result = folder / f"{mode}.safetensors"
    launcher = [] if mode == "single" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *launcher, str(WORKER), mode, str(model), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(result)


@pytest.fixture(scope="module")
def single(tiny_m1_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("parallel")
    return folder, run("single", tiny_m1_dir, folder)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_training_moved_the_weights(tiny_m1_dir: Path, single: tuple[Path, dict[str, torch.Tensor]]) -> None:
    from transformers import AutoModelForCausalLM

    start = dict(AutoModelForCausalLM.from_pretrained(tiny_m1_dir, dtype=torch.float32).named_parameters())
    assert difference(single[1], start) > 1e-3


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tiny_m1_dir: Path, single: tuple[Path, dict[str, torch.Tensor]], mode: str) -> None:
    folder, expected = single
    assert difference(run(mode, tiny_m1_dir, folder), expected) <= 1e-5


def test_other_data_on_one_process_shows(tiny_m1_dir: Path, single: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = single
    assert difference(run("ddp-changed", tiny_m1_dir, folder), expected) > 1e-4
