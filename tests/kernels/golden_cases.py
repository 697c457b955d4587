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

from minimax_plugin.kernels import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "hf_modeling"))
import test_hf_golden

interpreter_shim.install()


@pytest.fixture(autouse=True)
def _serves_the_kernels() -> None:
    assert ops.lightning_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("case", ["a_hybrid8", "e_leftpad", "f_text01_shared"])
def test_fp32_reproduces_golden(golden_dir: Path, case: str) -> None:
    test_hf_golden.test_fp32_reproduces_golden(golden_dir, case)


def test_greedy_reproduces_golden(golden_dir: Path) -> None:
    test_hf_golden.test_greedy_reproduces_golden(golden_dir, "a_hybrid8")


def test_bf16_is_as_close_to_the_oracle_as_the_original(golden_dir: Path) -> None:
    test_hf_golden.test_bf16_is_as_close_to_the_oracle_as_the_original(golden_dir)
