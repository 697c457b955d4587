# SPDX-License-Identifier: Apache-2.0
"""Eight kinds of problem with a verifiable answer and a difficulty, in plain Python.

They stand where the report's training data stood (arXiv 2506.13585, section 4.1: mathematics, logic puzzles, code),
small enough that a model trained on two CPU cores can learn them and hard enough at the upper end for a real one. Every
generator draws from the :class:`random.Random` it is given and nothing else, so a seed fixes a data set.

Prompts are short on purpose (``37+58=``): a tiny model has no instruction to follow. :func:`minimax_plugin.cispo.tasks.
make_dataset` adds each task's instruction for models that have been taught to read one.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: Starts a worked answer of the ``sorting`` task; an answer without it copies the digits.
FORK_TOKEN = "?"

_DIGITS = string.digits
_LETTERS = string.ascii_lowercase
_SIDE = 4
_BLOCK = 2


@dataclass(frozen=True)
class Problem:
    """One problem. ``answer`` is what a verifier compares with, ``difficulty`` counts from 1."""

    task: str
    prompt: str
    answer: str
    difficulty: int


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    Attributes:
        name: key in :data:`TASKS`.
        instruction: one sentence for models that follow instructions.
        generate: ``(rng, difficulty) -> (prompt, answer)``.
        verify: ``(prompt, answer, given) -> bool``; None compares ``given`` with ``answer``.
    """

    name: str
    instruction: str
    generate: Callable[[random.Random, int], tuple[str, str]]
    verify: Callable[[str, str, str], bool] | None = None

    def problem(self, rng: random.Random, difficulty: int = 1) -> Problem:
        """Draw a problem.

        Raises:
            ValueError: the difficulty is not between 1 and 10.
        """
        if isinstance(difficulty, bool) or not isinstance(difficulty, int) or not 1 <= difficulty <= MAX_DIFFICULTY:
            raise ValueError(f"difficulty is {difficulty!r}, expected an integer from 1 to {MAX_DIFFICULTY}")
        prompt, answer = self.generate(rng, difficulty)
        return Problem(self.name, prompt, answer, difficulty)

    def is_right(self, prompt: str, answer: str, given: str) -> bool:
        """Whether ``given``, the final answer in a completion, solves the problem."""
        if self.verify is not None:
            return self.verify(prompt, answer, given)
        return given == answer


MAX_DIFFICULTY = 10


def _arithmetic(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Sum of two numbers with ``difficulty`` digits each."""
    low = 10 ** (difficulty - 1) if difficulty > 1 else 0
    a, b = (rng.randint(low, 10**difficulty - 1) for _ in range(2))
    return f"{a}+{b}=", str(a + b)


def _modular(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """``a * x + b = c (mod p)`` for a prime p, which has exactly one solution below p."""
    primes = [p for p in range(5, 10 + 20 * difficulty) if all(p % q for q in range(2, int(p**0.5) + 1))]
    p = rng.choice(primes)
    a, x, b = rng.randint(1, p - 1), rng.randint(0, p - 1), rng.randint(0, p - 1)
    return f"{a}x+{b}={(a * x + b) % p} mod {p}:", str(x)


def _sorting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Digits in ascending order, behind the fork token. Digits that are in order already are drawn again."""
    while True:
        digits = [rng.choice(_DIGITS) for _ in range(difficulty + 3)]
        if digits != sorted(digits):
            return f"s{''.join(digits)}=", FORK_TOKEN + "".join(sorted(digits))


def _cipher(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Text shifted along the alphabet by a stated number of letters."""
    shift = rng.randint(1, len(_LETTERS) - 1)
    text = "".join(rng.choice(_LETTERS) for _ in range(2 + difficulty))
    shifted = "".join(_LETTERS[(_LETTERS.index(letter) + shift) % len(_LETTERS)] for letter in text)
    return f"{shifted}-{shift}=", text


def _rewriting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Rules applied to a string one after the other, each to every place where its left side stands."""
    text = "".join(rng.choice("abc") for _ in range(3 + difficulty))
    rules = [(rng.choice("abc"), rng.choice(("a", "b", "c", "ab", "ca", ""))) for _ in range(1 + difficulty // 2)]
    answer = text
    for left, right in rules:
        answer = answer.replace(left, right)
    shown = ",".join(f"{left}>{right}" for left, right in rules)
    return f"{text} {shown}=", answer or "-"


def _counting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """How often a letter stands in a string."""
    letters = _LETTERS[: 2 + difficulty]
    text = "".join(rng.choice(letters) for _ in range(4 + 2 * difficulty))
    letter = rng.choice(letters)
    return f"{letter} in {text}=", str(text.count(letter))


def _sudoku(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A 4 x 4 sudoku with exactly one solution; rows are written one after the other, ``.`` is an empty cell."""
    solution = next(_sudoku_solutions("." * _SIDE**2, rng))
    cells = list(solution)
    order = rng.sample(range(_SIDE**2), _SIDE**2)
    empty = 0
    for cell in order:
        if empty == min(difficulty + 1, _SIDE**2 - 4):
            break
        kept, cells[cell] = cells[cell], "."
        if len(list(itertools.islice(_sudoku_solutions("".join(cells)), 2))) == 1:
            empty += 1
        else:
            cells[cell] = kept
    return f"{''.join(cells)}=", solution


def _sudoku_solutions(cells: str, rng: random.Random | None = None) -> Iterator[str]:
    """Every way to fill the empty cells; with ``rng`` in random order."""
    at = cells.find(".")
    if at < 0:
        yield cells
        return
    row, column = divmod(at, _SIDE)
    taken = set()
    for other, value in enumerate(cells):
        r, c = divmod(other, _SIDE)
        same_block = r // _BLOCK == row // _BLOCK and c // _BLOCK == column // _BLOCK
        if r == row or c == column or same_block:
            taken.add(value)
    digits = [digit for digit in "1234" if digit not in taken]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        yield from _sudoku_solutions(cells[:at] + digit + cells[at + 1 :], rng)


def _is_sudoku_solution(prompt: str, answer: str, given: str) -> bool:
    givens = prompt.removesuffix("=")
    fits = len(given) == len(givens) and all(g in (".", v) for g, v in zip(givens, given, strict=True))
    return fits and given in _sudoku_solutions(givens)


def _logic_grid(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Who stands where in a row, from statements that leave exactly one order.

    ``a<b``: a stands left of b. ``a@2``: a stands at place 2. ``a~b``: they are neighbours. ``a!2``: a does not stand
    at place 2.
    """
    names = _LETTERS[: min(3 + difficulty // 3, 6)]
    order = "".join(rng.sample(names, len(names)))
    clues: list[str] = []
    left = list(itertools.permutations(names))
    while len(left) > 1:
        clue = _true_clue(rng, order)
        remaining = [candidate for candidate in left if _holds(clue, "".join(candidate))]
        if len(remaining) < len(left):
            clues.append(clue)
            left = remaining
    rng.shuffle(clues)
    return f"{names}: {','.join(clues)}=", order


def _true_clue(rng: random.Random, order: str) -> str:
    while True:
        a, b = rng.sample(order, 2)
        place = rng.randint(1, len(order))
        clue = rng.choice((f"{a}<{b}", f"{a}@{place}", f"{a}~{b}", f"{a}!{place}"))
        if _holds(clue, order):
            return clue


def _holds(clue: str, order: str) -> bool:
    subject, relation, other = tuple(clue)
    place = order.index(subject)
    if relation == "<":
        return place < order.index(other)
    if relation == "~":
        return abs(place - order.index(other)) == 1
    return (place + 1 == int(other)) == (relation == "@")


#: Every task by name.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("arithmetic", "Add the two numbers.", _arithmetic),
        Task("modular", "Find the smallest x >= 0 that solves the equation modulo the given prime.", _modular),
        Task(
            "sorting",
            f"Write {FORK_TOKEN} and then the digits after the letter s in ascending order.",
            _sorting,
        ),
        Task("cipher", "Shift every letter back by the given number along the alphabet.", _cipher),
        Task(
            "rewriting",
            "Apply the rules from left to right, each to every place where its left side stands. Write - if nothing is "
            "left.",
            _rewriting,
        ),
        Task("counting", "Count how often the letter stands in the string.", _counting),
        Task(
            "sudoku",
            "Fill the dots with 1 to 4 so that every row, column and 2 x 2 block holds each digit once. Write all 16 "
            "digits row by row.",
            _sudoku,
            _is_sudoku_solution,
        ),
        Task(
            "logic_grid",
            "The letters stand in a row. a<b: a is left of b. a@2: a is at place 2. a~b: they are neighbours. a!2: a "
            "is not at place 2. Write the row.",
            _logic_grid,
        ),
    )
}
