# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, as lines that a terminal can show however hostile the checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Characters of one part of a line, lines of one message, faults of one kind that are named, and faults that are kept.
_MAX_PART = 1_000
_MAX_LINES = 50
_NAMED = 3
_KEPT = 10_000


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a checkpoint; each part is made one printable line.

    ``subject`` is a tensor, a config field or empty (the file as a whole). Without ``expected``, ``found`` is the whole
    sentence. ``kind`` is a phrase that follows a number; faults of one kind share a line in :func:`summary`.
    """

    file: str
    subject: str
    found: str
    expected: str = ""
    kind: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("file", "subject", "found", "expected"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        where = f"{self.file}: {self.subject}" if self.subject else self.file
        return f"{where}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """What was found and expected, without the place."""
        return f"found {self.found}, expected {self.expected}" if self.expected else self.found


class FaultList(list[Fault]):
    """Keeps the first 10,000 faults and counts all in ``total``: a hostile index can name millions of tensors."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        super().__init__()
        self.total = 0
        self.extend(faults)

    def append(self, fault: Fault) -> None:
        self.total += 1
        if len(self) < _KEPT:
            super().append(fault)

    def extend(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.append(fault)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. ``faults`` holds its faults; the message is their :func:`summary`."""

    def __init__(self, directory: str | Path, faults: Sequence[Fault]) -> None:
        self.directory = directory
        self.faults = faults
        lines = "\n".join(f"  {line}" for line in summary(faults))
        super().__init__(f"checkpoint {one_line(str(directory))} has {count(faults)} fault(s):\n{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory, list(self.faults))


def count(faults: Sequence[Fault]) -> int:
    """How many faults there are, those included that a :class:`FaultList` has only counted."""
    return faults.total if isinstance(faults, FaultList) else len(faults)


def summary(faults: Sequence[Fault]) -> list[str]:
    """One line per fault; more than three of one kind share a line that names three. At most 50 lines."""
    groups: dict[str | int, list[Fault]] = {}
    for number, fault in enumerate(faults):
        groups.setdefault(fault.kind or number, []).append(fault)
    lines: list[str] = []
    shown = 0
    for group in groups.values():
        if len(lines) >= _MAX_LINES:
            break
        shown += len(group)
        lines += map(str, group) if len(group) <= _NAMED else [_shared_line(group)]
    left_out = count(faults) - shown
    return [*lines, f"… and {left_out:,} more faults"] if left_out else lines


def one_line(text: str) -> str:
    """``text`` with what a terminal cannot show escaped, and cut where it is absurdly long."""
    if len(text) > _MAX_PART:
        text = f"{text[:_MAX_PART]}… ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _shared_line(group: Sequence[Fault]) -> str:
    first = group[0]
    # Faults of whole files are named by their files, others by what they are about.
    place = f"{first.file}: " if first.subject and all(fault.file == first.file for fault in group) else ""
    names = ", ".join(fault.subject or fault.file for fault in group[:_NAMED])
    more = len(group) - _NAMED
    return f"{place}{len(group):,} {first.kind}: {names} … and {more:,} more; the first: {first.sentence}"
