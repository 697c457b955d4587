#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compile every shipped form of every Triton kernel ahead of time, without a GPU, and check what came out.

    python scripts/compile_gate.py                                # everything, 4 architectures
    python scripts/compile_gate.py --arch sm_90 --match decode    # a part
    python scripts/compile_gate.py --record                       # write the spills found into the budget

The forms are those that the kernel modules list in ``launch_configs``. A form fails the gate if it

* does not compile,
* spills more registers than the budget allows (``compile_budget.json``: spilled loads and stores by Triton version,
  architecture and form; what is not listed may not spill),
* needs more shared memory than the architecture gives one block,
* multiplies large bf16 tiles on sm_90 without wgmma instructions.

Exit status: 0 if all forms pass, 1 if one fails, 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimax_plugin.kernels.launch_config import ARCHITECTURES, LAUNCH_OPTIONS, LaunchConfig

MODULES = tuple(f"minimax_plugin.kernels.{name}" for name in ("lightning", "recurrent", "replay", "norm"))

BUDGET = Path(__file__).with_name("compile_budget.json")

#: Bytes of shared memory (LDS on gfx942) that one block may have.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.bool: "i1"}

#: Allowed spills by architecture and form: loads and stores together on NVIDIA, registers on AMD.
Budget = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Report:
    """What one compiled form needs; ``spills`` counts instructions on NVIDIA and registers on AMD."""

    architecture: str
    name: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = field(default=())


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    try:
        import triton
    except ImportError:
        print("triton is not installed; install it to compile the kernels", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set; unset it, interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    version = ".".join(triton.__version__.split(".")[:2])
    budget = load_budget(version)
    jobs = [
        (architecture, config.name)
        for architecture in args.arch
        for config in find_configs(architecture)
        if re.search(args.match, config.name)
    ]
    if not jobs:
        print(f"no form of a kernel matches {args.match!r}", file=sys.stderr)
        return 2
    print(f"triton {triton.__version__}, {len(jobs)} forms")
    print(f"{'arch':7s} {'form':34s} {'regs':>5s} {'spills':>7s} {'shared':>8s} {'wgmma':>6s} {'s':>6s}")
    reports = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for report in pool.map(_check_job, jobs, [budget] * len(jobs)):
            reports.append(report)
            print(format_report(report), flush=True)
    if args.record:
        record(version, reports)
    failed = [report for report in reports if report.faults]
    print(f"{len(reports) - len(failed)} of {len(reports)} forms pass")
    return 1 if failed else 0


def find_configs(architecture: str) -> list[LaunchConfig]:
    """All forms that the kernel modules launch on one architecture.

    Raises:
        ValueError: two forms share a name, so that the budget could not tell them apart.
    """
    configs = [
        config for name in MODULES for config in importlib.import_module(name).launch_configs(architecture=architecture)
    ]
    names = [config.name for config in configs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"launch_configs({architecture!r}) names {repeated} more than once")
    return configs


def check(config: LaunchConfig, architecture: str, budget: Budget) -> Report:
    """Compile one form and hold it against the limits."""
    start = time.perf_counter()
    try:
        compiled = compile_config(config, architecture)
    except Exception as error:  # Triton and its assemblers raise many types; each one means that the form fails.
        # Triton puts the reason last, below the source line.
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return Report(architecture, config.name, seconds=time.perf_counter() - start, faults=(reason,))
    seconds = time.perf_counter() - start
    registers, spills = _resources(compiled, architecture)
    shared = compiled.metadata.shared
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async") if "ptx" in compiled.asm else 0
    faults = []
    allowed = budget.get(architecture, {}).get(config.name, 0)
    if spills > allowed:
        faults.append(f"{spills} spills, budget {allowed}")
    if shared > SHARED_MEMORY[architecture]:
        faults.append(f"{shared} bytes of shared memory, limit {SHARED_MEMORY[architecture]}")
    if config.matrix_units and architecture == "sm_90" and not wgmma:
        faults.append("no wgmma")
    return Report(architecture, config.name, registers, spills, shared, wgmma, seconds, tuple(faults))


def compile_config(config: LaunchConfig, architecture: str) -> Any:
    """Compile as a launch with these arguments would; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(config.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(config.kernel.arg_names):
        if name in config.constants:
            signature[name] = "constexpr"
            continue
        value = config.arguments[name]
        if value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.dtype):
            signature[name] = "*" + TYPES[value]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.dtype) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=constants, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} | LAUNCH_OPTIONS
    return triton.compile(source, target=target, options=options)


def format_report(report: Report) -> str:
    line = (
        f"{report.architecture:7s} {report.name:34s} {report.registers:5d} {report.spills:7d} {report.shared:8d} "
        f"{report.wgmma:6d} {report.seconds:6.1f}"
    )
    return line + "".join(f"  FAIL: {fault}" for fault in report.faults)


def load_budget(version: str) -> Budget:
    """Allowed spills of one Triton version, by architecture and form; a version not recorded takes the newest one."""
    budgets: dict[str, Budget] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if version in budgets or not budgets:
        return budgets.get(version, {})
    return budgets[max(budgets, key=lambda name: tuple(map(int, name.split("."))))]


def record(version: str, reports: Sequence[Report]) -> None:
    """Make the spills of these reports the budget, leaving forms that were not compiled as they are."""
    budgets: dict[str, Budget] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget = budgets.setdefault(version, {})
    for report in reports:
        forms = budget.setdefault(report.architecture, {})
        forms.pop(report.name, None)
        if report.spills:
            forms[report.name] = report.spills
    BUDGET.write_text(json.dumps(budgets, indent=2, sort_keys=True) + "\n")


def _check_job(job: tuple[str, str], budget: Budget) -> Report:
    architecture, name = job
    config = next(config for config in find_configs(architecture) if config.name == name)
    return check(config, architecture, budget)


def _resources(compiled: Any, architecture: str) -> tuple[int, int]:
    if not architecture.startswith("sm_"):
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
        return max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", assembly)), spills
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        instructions = _cuobjdump("--dump-sass", file.name)
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", usage))
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", instructions))


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, path], check=True, capture_output=True, text=True).stdout


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="regular expression of the forms to compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="make the spills found the budget of this Triton version")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
