# SPDX-License-Identifier: Apache-2.0
"""The decode, verify, replay and norm kernels in Triton's interpreter, which must be chosen before they are defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_recurrent_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("recurrent_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
