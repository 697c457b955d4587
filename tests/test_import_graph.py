# SPDX-License-Identifier: Apache-2.0
"""The import graph points down only and has no circle.

Read from the source text, so imports inside functions count and no library has to be installed. Imports under
``TYPE_CHECKING`` never run and do not count.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "minimax_plugin"

#: Component -> components it may import, besides itself. A module of the package that is no folder is a component too.
MAY_IMPORT: dict[str, set[str]] = {
    "config_rules": set(),
    "config_fields": {"config_rules"},
    "architecture": {"config_fields"},
    "faults": set(),
    "versions": set(),
    "checkpoint_files": {"architecture", "config_rules", "faults"},
    "side_files": {"checkpoint_files", "config_fields", "config_rules", "faults"},
    "checkpoint": {"architecture", "checkpoint_files", "config_fields", "config_rules", "faults", "side_files"},
    "templates": set(),
    "repetition": set(),
    "vocabulary": {"architecture"},
    "kernels": {"architecture"},
    "state_cache": {"kernels", "architecture"},
    "hf_modeling": {
        "state_cache",
        "kernels",
        "architecture",
        "checkpoint",
        "checkpoint_files",
        "config_fields",
        "templates",
        "vocabulary",
    },
    "vllm_model": {
        "state_cache",
        "kernels",
        "architecture",
        "checkpoint",
        "config_fields",
        "templates",
        "repetition",
        "versions",
        "vocabulary",
    },
    "registration": set(),  # names modules as strings
    "": {"registration"},  # the package itself
    "__main__": {"cli"},
    "autoload": {""},
    "cli": {
        "",
        "registration",
        "hf_modeling",
        "vllm_model",
        "kernels",
        "architecture",
        "checkpoint",
        "config_fields",
        "side_files",
        "faults",
        "versions",
        "templates",
        "planner",
        "cispo",
    },
    "planner": {"architecture", "checkpoint"},
    "cispo": {"hf_modeling", "vllm_model", "kernels", "architecture", "templates", "repetition"},
}

#: Libraries that a component must not import at all.
FORBIDDEN_LIBRARIES: dict[str, set[str]] = {
    "architecture": {"torch", "transformers", "vllm", "triton", "safetensors"},
    **dict.fromkeys(
        ("checkpoint", "checkpoint_files", "side_files", "faults", "versions"),
        {"torch", "transformers", "vllm", "triton", "safetensors"},
    ),
    "repetition": {"transformers", "vllm", "triton"},
    "kernels": {"transformers", "vllm"},
    "state_cache": {"transformers", "vllm", "triton"},
    "hf_modeling": {"vllm"},
}

#: MiniMax code of vLLM and transformers: wrong for M1, and on its way out.
FOREIGN_MINIMAX = (
    "transformers.models.minimax",
    "vllm.model_executor.layers.lightning_attn",
    "vllm.model_executor.layers.mamba.linear",
    "vllm.model_executor.layers.minimax",
    "vllm.model_executor.models.minimax",
)


def source_files() -> dict[str, Path]:
    """Module name -> file, each file once, by the name it is imported under."""
    folders = {PACKAGE: ROOT / PACKAGE}
    folders |= {f"{PACKAGE}.{link.name}": link for link in (ROOT / PACKAGE).iterdir() if link.is_symlink()}
    files = {}
    for prefix, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if prefix == PACKAGE and (ROOT / PACKAGE / parts[0]).is_symlink():
                continue
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            files[name] = file
    return files


FILES = source_files()
COMPONENT_FOLDERS = {".".join(name.split(".")[:2]) for name in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(module: str) -> Iterator[str]:
    """Full names that a module imports: ``from a import b`` gives ``a.b`` where that is a module, else ``a``."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import; use the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES or full in COMPONENT_FOLDERS else str(node.module)
        for child in ast.iter_child_nodes(node):
            if is_type_checking(node) and child in getattr(node, "body", []):
                continue
            yield from visit(child)

    yield from visit(ast.parse(FILES[module].read_text(encoding="utf-8")))


def component(module: str) -> str:
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0]


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    return {module: {name for name in imports_of(module) if name.split(".")[0] == PACKAGE} for module in FILES}


def test_all_components_are_found() -> None:
    assert {component(module) for module in FILES} <= MAY_IMPORT.keys(), "name the new component in MAY_IMPORT"
    assert {"", "architecture", "kernels", "hf_modeling", "vllm_model", "cli"} <= {component(name) for name in FILES}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    own = component(module)
    upward = {name for name in graph()[module] if component(name) not in MAY_IMPORT[own] | {own}}
    assert not upward, f"{module} imports {sorted(upward)}; {own or PACKAGE} may import {sorted(MAY_IMPORT[own])}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_libraries_stay_where_they_belong(module: str) -> None:
    imported = set(imports_of(module))
    libraries = {name.split(".")[0] for name in imported}
    assert not libraries & FORBIDDEN_LIBRARIES.get(component(module), set())
    assert not libraries & {"kernels", "hf_modeling", "vllm_model"}, "import by the full name minimax_plugin.…"
    foreign = sorted(name for name in imported if name.startswith(FOREIGN_MINIMAX))
    assert not foreign, f"{module} imports MiniMax code of another project: {foreign}"


def test_no_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_vllm() -> None:
    assert run_python("import sys, minimax_plugin; print('vllm' in sys.modules)") == "False"


def test_kernels_import_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import minimax_plugin.kernels.ops as ops, torch\n"
        "print(ops.lightning_backend(torch.device('cpu')))"
    )
    assert run_python(script) == "torch"
