# SPDX-License-Identifier: Apache-2.0
"""Building blocks of :mod:`minimax_plugin.config_fields`: what one value may be, and one line where it is not that.

An integer stands for a float (``1`` for ``1.0``), a float never for an integer, and a boolean for neither. Comparing
with bounds comes before any arithmetic, so that no integer is too large and NaN never passes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

#: Name and value -> one line that says what is wrong, or None.
Rule = Callable[[str, Any], "str | None"]

#: Integers of more bits are described instead of printed: Python refuses to print those of over 4,300 digits.
_PRINTED_BITS = 200


def expect(expected: str, accepts: Callable[[Any], bool]) -> Rule:
    """A rule from a test and its description, which follows "expected"."""

    def rule(name: str, value: Any) -> str | None:
        return None if accepts(value) else f"{name} is {shown(value)}, expected {expected}"

    return rule


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(low: int, high: int) -> Rule:
    return expect(f"an integer from {low:,} to {high:,}", lambda value: is_integer(value) and low <= value <= high)


def size(high: int) -> Rule:
    return expect(f"a positive integer of at most {high:,}", lambda value: is_integer(value) and 0 < value <= high)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number from ``low`` to ``high``; ``above`` and ``below`` leave the bounds themselves out."""

    def accepts(value: Any) -> bool:
        return is_number(value) and low <= value <= high and not (above and value == low or below and value == high)

    start = f"above {low:g}" if above else f"of at least {low:g}"
    stop = f"below {high:g}" if below else f"at most {high:g}"
    return expect(f"a finite number {start} and {stop}", accepts)


def one_of(*values: str) -> Rule:
    """One of these words, listed in the message in this order."""
    words = ", ".join(map(repr, values))
    return expect(f"one of {words}", lambda value: isinstance(value, str) and value in values)


def instance(expected: str, *types: type) -> Rule:
    return expect(expected, lambda value: isinstance(value, types))


def or_null(rule: Rule) -> Rule:
    """The same rule, and null is allowed."""

    def accepts(name: str, value: Any) -> str | None:
        fault = None if value is None else rule(name, value)
        # A fault inside of a list or an object is not mended by a null there.
        return f"{fault} or null" if fault is not None and fault.startswith(f"{name} is ") else fault

    return accepts


def list_of(rule: Rule, what: str, *, empty: bool = True) -> Rule:
    """A list each of whose entries obeys ``rule``; the message names the first that does not."""

    def accepts(name: str, value: Any) -> str | None:
        if not isinstance(value, list | tuple) or not (value or empty):
            return f"{name} is {shown(value)}, expected {what}"
        faults = (rule(f"{name}[{position}]", entry) for position, entry in enumerate(value))
        return next(filter(None, faults), None)

    return accepts


def shown(value: Any) -> str:
    """``value`` in a few words on one line, however long, deep or strange it is."""
    return " ".join(_SHORT.repr(value).split("\n"))


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 4, 4, 4
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= _PRINTED_BITS:
            return repr(x)
        sign = "a negative" if x < 0 else "an"
        return f"{sign} integer of {x.bit_length():,} bits"


_SHORT = _ShortRepr()


def structure_fault(name: str, value: Any, *, max_depth: int = 32, max_bits: int = 4096) -> str | None:
    """One line where ``value`` nests more than ``max_depth`` lists and objects or holds an integer over ``max_bits``.

    Both make Python itself give up, on copying and on printing, with an error that names nothing.
    """
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, Mapping | list | tuple):
            if depth > max_depth:
                return f"{name} is {shown(value)}, expected at most {max_depth} lists and objects inside each other"
            pending += [(entry, depth + 1) for entry in (item.values() if isinstance(item, Mapping) else item)]
        elif isinstance(item, int) and item.bit_length() > max_bits:
            return f"{name} is or holds {shown(item)}, expected integers of at most {max_bits:,} bits"
    return None
