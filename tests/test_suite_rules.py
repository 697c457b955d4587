# SPDX-License-Identifier: Apache-2.0
"""The tests themselves: none fails because the machine is busy, and the oracles are free of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from goldens import M1, REPOSITORY, TEXT01
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path != Path(__file__)]

#: What tests take the truth from.
ORACLES = ("oracle.py", "recurrence.py")

#: What measures how long something took; sleeping and giving up after minutes are no measurements.
CLOCKS = {"perf_counter", "perf_counter_ns", "default_timer", "timeit", "time.time"}


def test_property_tests_have_no_deadline_and_draw_the_same_examples() -> None:
    profile = settings.default
    assert profile is not None
    assert profile.deadline is None
    assert profile.derandomize
    assert HealthCheck.too_slow in profile.suppress_health_check


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_measures_time(file: Path) -> None:
    """A string that is run in another process counts as a source too."""
    for tree in _trees(file):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                names = {ast.unparse(node), ast.unparse(node).rpartition(".")[2]}
                assert not CLOCKS & names, f"line {node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.keyword) and node.arg == "deadline":
                assert ast.unparse(node.value) == "None", f"line {node.lineno}: a deadline fails on a busy machine"


@pytest.mark.parametrize("file", ORACLES)
def test_oracles_are_free_of_the_package(file: str) -> None:
    for tree in _trees(TESTS / file):
        for node in ast.walk(tree):
            assert "minimax_plugin" not in _imported(node)


def test_goldens_of_the_repository_stay_small() -> None:
    """Every clone carries them for good."""
    files = [path for path in REPOSITORY.rglob("*") if path.is_file()]
    assert {path.parent for path in files if path.suffix == ".safetensors"} == {M1, TEXT01}
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def _trees(file: Path) -> Iterator[ast.Module]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                yield ast.parse(node.value)
            except SyntaxError:  # prose
                continue


def _imported(node: ast.AST) -> set[str]:
    """Top-level names of the modules that an import statement brings in."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return set()
