# SPDX-License-Identifier: Apache-2.0
"""Packing where processes have different numbers of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_processes_run_the_model_equally_often(tiny_m1_dir: Path) -> None:
    """Under FSDP2 one of them would wait for ever otherwise; routes are replayed as well."""
    worker = Path(__file__).with_name("packing_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(
        [*command, str(tiny_m1_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sharded"] == 39  # every parameter
    assert result["calls"] == [3, 3]  # 83 and 46 tokens in rows of at most 30, where sequences fit
    assert result["error"] <= 1e-4
