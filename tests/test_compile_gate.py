# SPDX-License-Identifier: Apache-2.0
"""The compile gate passes on what is shipped, and fails on what it is there to catch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compile_gate.py"

#: What a bf16 model launches on a Hopper GPU, without the variants.
MAIN_FORMS = (
    r"^(scan (prefill|packed|forward|d.)|state \w+) bfloat16 default$"
    r"|^(decode|verify|norm 8192) bf16$|^replay 16 q1 bf16$"
)


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    spec = importlib.util.spec_from_file_location("compile_gate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def test_main_forms_pass_on_hopper() -> None:
    run = run_gate("--arch", "sm_90", "--match", MAIN_FORMS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "15 of 15 forms pass" in run.stdout


@pytest.mark.slow
def test_every_form_passes_everywhere() -> None:
    run = run_gate()
    assert run.returncode == 0, run.stdout + run.stderr


def test_nothing_to_check_is_no_success(gate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--match", "no such form"]) == 2
    assert "no form of a kernel matches" in capsys.readouterr().err


def test_every_fault_is_caught(gate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = next(config for config in gate.find_configs("sm_90") if config.name == "decode bf16")
    assert gate.check(decode, "sm_90", {}).faults == ()
    assert gate.check(decode, "sm_90", {"sm_90": {"decode bf16": -1}}).faults == ("0 spills, budget -1",)
    assert gate.check(replace(decode, matrix_units=True), "sm_90", {}).faults == ("no wgmma",)
    broken = replace(decode, constants={**decode.constants, "BV": 24})
    assert gate.check(broken, "sm_90", {}).faults[0].startswith("does not compile: ")
    monkeypatch.setitem(gate.SHARED_MEMORY, "sm_90", 16)
    (fault,) = gate.check(decode, "sm_90", {}).faults
    assert fault.endswith("bytes of shared memory, limit 16")


def test_forms_have_names_of_their_own(gate: ModuleType) -> None:
    for architecture in gate.ARCHITECTURES:
        assert gate.find_configs(architecture)


def test_budget_of_an_unknown_triton_is_that_of_the_newest(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gate, "BUDGET", tmp_path / "budget.json")
    assert gate.load_budget("3.9") == {}
    gate.record("3.9", [gate.Report("sm_90", "a", spills=3), gate.Report("sm_90", "b")])
    gate.record("3.10", [gate.Report("sm_90", "a", spills=5)])
    assert gate.load_budget("3.9") == {"sm_90": {"a": 3}}
    assert gate.load_budget("4.0") == {"sm_90": {"a": 5}}
    gate.record("3.10", [gate.Report("sm_90", "a")])
    assert gate.load_budget("3.10") == {"sm_90": {}}
