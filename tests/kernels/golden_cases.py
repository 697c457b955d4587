# SPDX-License-Identifier: Apache-2.0
"""The golden data of the original implementation through the model and the interpreted kernels.

Not collected by itself: ``test_scan_interpreter.py`` runs it in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import interpreter_shim
import pytest
import torch
from bf16_layers import CONFIG, ROUNDED
from goldens import M1, TEXT01
from oracle import Oracle, random_tensors, write_checkpoint
from transformers import AutoModelForCausalLM

from minimax_plugin.kernels import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "hf_modeling"))
import test_hf_bf16
import test_hf_golden

interpreter_shim.install()


@pytest.fixture(autouse=True)
def _serves_the_kernels() -> None:
    assert ops.lightning_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("case", [M1, TEXT01], ids=["m1", "text01"])
def test_fp32_reproduces_golden(case: Path) -> None:
    test_hf_golden.test_fp32_reproduces_golden(case)


def test_greedy_reproduces_golden() -> None:
    test_hf_golden.test_greedy_reproduces_golden(TEXT01)


def test_every_part_of_a_bf16_model(tmp_path: Path) -> None:
    """The kernels round decayed keys to bf16 for their products, so that states have the error of one rounding."""
    tensors = random_tensors(CONFIG)
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, CONFIG, tensors), dtype=torch.bfloat16)
    bounds = {"state": 3e-3, "out": 2 * ROUNDED}
    test_hf_bf16.check(model.eval(), Oracle(CONFIG, tensors), steps=[80, 20, 1, 1], bounds=bounds)
