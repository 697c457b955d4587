# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods counts updates as it says and runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "cispo_arithmetic" / "compare_methods.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(method: str, rates: list[float], seed: int = 0) -> dict[str, Any]:
    updates = [16 * i for i in range(len(rates))]
    return {"method": method, "learning_rate": 1e-3, "seed": seed, "updates": updates, "solved": rates}


def test_steps_and_table(script: ModuleType) -> None:
    runs = [
        result("cispo", [0.1, 0.5, 0.72, 0.95]),
        result("cispo", [0.1, 0.4, 0.6, 0.71, 0.9], 1),
        result("cispo", [0.1, 0.4, 0.6, 0.65, 0.69], 2),
        result("dapo", [0.1, 0.2]),
    ]
    assert [script.steps_to(runs[0], t) for t in (0.5, 0.7, 0.9, 0.99)] == [16, 32, 48, None]
    assert script.table(runs).splitlines()[2:] == [
        "| 0.001 | cispo | 3 | 32 (16 to 32) | 32 (32 to 48), 2 of 3 | 48 (48 to 64), 2 of 3 | 0.90 (0.69 to 0.95) |",
        "| 0.001 | dapo | 1 | – | – | – | 0.20 (0.20 to 0.20) |",
    ]


@pytest.mark.slow
def test_every_method_runs(tiny_m1_dir: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "raw.jsonl", tmp_path / "out.png"
    options = ["--seeds", "0", "--learning-rates", "1e-4", "--updates", "1", "--out", str(out), "--plot", str(picture)]
    command = [sys.executable, str(SCRIPT), str(tiny_m1_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, *runs = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert first["machine"]["cpus"] and {run["method"] for run in runs} == {"cispo", "reinforce", "grpo", "dapo"}
    assert all(run["updates"][0] == 0 for run in runs)
    assert picture.stat().st_size > 10_000
