# SPDX-License-Identifier: Apache-2.0
"""The commands of ``examples/cispo_arithmetic`` run, shortened: how well it learns is in its README."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the trainer needs trl: pip install 'minimax-plugin[train]'")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cispo_arithmetic"


def run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    for name in ("warm_start.py", "config.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    run("warm_start.py", "arithmetic-start", "--steps", "40", cwd=tmp_path)
    command = ("-m", "minimax_plugin.cli", "train", "cispo", "config.yaml")
    printed = run(*command, "--max_steps", "2", "--num_held_out", "64", "--num_problems", "256", cwd=tmp_path)
    assert re.search(r"held-out reward: 0\.\d{3} before, 0\.\d{3} after", printed)
    summary = json.loads((tmp_path / "arithmetic-cispo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["updates"] == 2 and summary["tasks"]["tasks"] == ["arithmetic"]


def test_the_readme_states_the_raw_results() -> None:
    lines = (ROOT / "benchmarks" / "results" / "cispo_arithmetic.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    table = re.findall(r"^\| (\d) \| (0\.\d\d) \| (0\.\d\d) \|", (EXAMPLE / "README.md").read_text("utf-8"), re.M)
    assert len(table) == 3
    for seed, before, after in table:
        held_out = [float(row["solved"]) for row in rows if (row["seed"], row["measured_on"]) == (seed, "held_out")]
        assert [f"{value:.2f}" for value in held_out] == [before, after]
        assert held_out[0] < 0.3 and held_out[1] > 0.8
