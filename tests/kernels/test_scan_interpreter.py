# SPDX-License-Identifier: Apache-2.0
"""The scan kernels in Triton's interpreter, which must be chosen before they are defined: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_interpreted(cases: str, *options: str) -> None:
    """Run a file of cases; its report becomes the message of a failure."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(HERE / cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "MINIMAX_LIGHTNING_BACKEND": "triton"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_scan_kernels_in_the_interpreter() -> None:
    run_interpreted("scan_cases.py", "-m", "not slow")


@pytest.mark.slow
def test_scan_kernels_in_the_interpreter_in_every_setting() -> None:
    run_interpreted("scan_cases.py", "-m", "slow")


@pytest.mark.slow
def test_the_model_gives_the_goldens_through_the_interpreter() -> None:
    pytest.importorskip("transformers")
    run_interpreted("golden_cases.py")


@pytest.mark.slow
def test_vllm_gives_the_goldens_through_the_interpreter() -> None:
    """Model Runner V2, whose own kernels are interpreted too."""
    pytest.importorskip("vllm")
    run_interpreted("../vllm_model/test_vllm_engine.py", "-k", "model_runner_v2")


@pytest.mark.slow
def test_far_offsets_in_the_interpreter() -> None:
    run_interpreted("far_offset_cases.py")
