# SPDX-License-Identifier: Apache-2.0
"""Every launch of a kernel, read from the source text: what one GPU and one release of Triton would not show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = ("lightning", "recurrent", "replay", "norm")


def launches(module: str) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
    """Calls ``kernel[grid](...)`` with the nodes around each."""

    def visit(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node, around
        for child in ast.iter_child_nodes(node):
            yield from visit(child, [*around, node])

    yield from visit(ast.parse((KERNELS / f"{module}.py").read_text(encoding="utf-8")), [])


def test_all_modules_with_launches_are_known() -> None:
    assert {file.stem for file in KERNELS.glob("*.py") if list(launches(file.stem))} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_launches_run_on_the_device_of_their_tensors(module: str) -> None:
    """Triton launches on the current device, which is not theirs where a model is spread over several GPUs."""
    for call, around in launches(module):
        contexts = [
            ast.unparse(item.context_expr) for node in around if isinstance(node, ast.With) for item in node.items
        ]
        assert any(context.startswith("on_device(") for context in contexts), f"{module} line {call.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_launches_name_their_options(module: str) -> None:
    """Defaults of Triton change with its releases, and the bits with them."""
    for call, _ in launches(module):
        spread = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
        assert "LAUNCH_OPTIONS" in spread, f"{module} line {call.lineno}"
