# SPDX-License-Identifier: Apache-2.0
"""Problems are solvable, have one answer, and rewards tell right from wrong."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed; it comes with the train extra")

from minimax_plugin.cispo.generators import MAX_DIFFICULTY, TASKS  # noqa: E402
from minimax_plugin.cispo.tasks import (  # noqa: E402
    correctness_reward,
    extract_answer,
    filter_by_pass_rate,
    format_reward,
    make_dataset,
    math_verify_reward,
    pairwise_reward,
    reasoning_gym_dataset,
)

DIFFICULTIES = (1, 2, 3, 5, 8, MAX_DIFFICULTY)


def solve_arithmetic(prompt: str) -> list[str]:
    return [str(eval(prompt.removesuffix("=")))]


def solve_modular(prompt: str) -> list[str]:
    a, b, c, p = map(int, re.fullmatch(r"(\d+)x\+(\d+)=(\d+) mod (\d+):", prompt).groups())  # type: ignore[union-attr]
    return [str(x) for x in range(p) if (a * x + b - c) % p == 0]


def solve_sorting(prompt: str) -> list[str]:
    digits = prompt[1:-1]
    assert list(digits) != sorted(digits)
    return ["?" + "".join(sorted(digits))]


def solve_cipher(prompt: str) -> list[str]:
    text, shift = prompt.removesuffix("=").split("-")
    return ["".join(chr((ord(letter) - ord("a") - int(shift)) % 26 + ord("a")) for letter in text)]


def solve_rewriting(prompt: str) -> list[str]:
    text, rules = prompt.removesuffix("=").split(" ")
    for rule in rules.split(","):
        left, right = rule.split(">")
        text = "".join(right if letter == left else letter for letter in text)
    return [text or "-"]


def solve_counting(prompt: str) -> list[str]:
    letter, text = prompt.removesuffix("=").split(" in ")
    return [str(sum(other == letter for other in text))]


def solve_sudoku(prompt: str) -> list[str]:
    """All ways to fill the grid, by trying every order of digits in every row."""
    rows = [prompt[i : i + 4] for i in range(0, 16, 4)]
    options = [
        [
            r
            for r in map("".join, itertools.permutations("1234"))
            if all(g in (".", c) for g, c in zip(row, r, strict=True))
        ]
        for row in rows
    ]
    solutions = []
    for grid in itertools.product(*options):
        columns = all(len({row[c] for row in grid}) == 4 for c in range(4))
        blocks = all(len({grid[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r in (0, 2) for c in (0, 2))
        if columns and blocks:
            solutions.append("".join(grid))
    return solutions


def solve_logic_grid(prompt: str) -> list[str]:
    names, clues = prompt.removesuffix("=").split(": ")
    tests = {
        "<": lambda row, a, b: row.index(a) < row.index(b),
        "~": lambda row, a, b: a + b in row or b + a in row,
        "@": lambda row, a, b: row[int(b) - 1] == a,
        "!": lambda row, a, b: row[int(b) - 1] != a,
    }
    rows = map("".join, itertools.permutations(names))
    return [row for row in rows if all(tests[clue[1]](row, clue[0], clue[2]) for clue in clues.split(","))]


SOLVERS = {name: globals()[f"solve_{name}"] for name in TASKS}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", TASKS)
def test_every_problem_has_exactly_the_stated_answer(name: str, difficulty: int) -> None:
    rng = random.Random(difficulty)
    for _ in range(5):
        problem = TASKS[name].problem(rng, difficulty)
        assert SOLVERS[name](problem.prompt) == [problem.answer]


@pytest.mark.parametrize("name", TASKS)
def test_reward_tells_right_from_wrong(name: str) -> None:
    rng = random.Random(3)
    for _ in range(20):
        problem = TASKS[name].problem(rng, 2)
        wrong = [problem.answer[:-1], problem.answer + "1", problem.answer[::-1] + "x", "", problem.answer + " ."]
        rewards = correctness_reward(
            [problem.answer, *wrong],
            prompts=[problem.prompt] * 6,
            answer=[problem.answer] * 6,
            task=[name] * 6,
        )
        assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", TASKS)
def test_difficulty_makes_problems_longer(name: str) -> None:
    def mean_size(difficulty: int) -> float:
        rng = random.Random(0)
        problems = [TASKS[name].problem(rng, difficulty) for _ in range(30)]
        return sum(len(p.prompt.replace(".", "")) if name != "sudoku" else p.prompt.count(".") for p in problems) / 30

    assert mean_size(1) < mean_size(4) < mean_size(MAX_DIFFICULTY)


@pytest.mark.parametrize("difficulty", [0, 11, True, 1.5, "2"])
def test_difficulty_out_of_range_is_refused(difficulty: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"difficulty is {difficulty!r}, expected an integer from 1 to 10")):
        TASKS["cipher"].problem(random.Random(0), difficulty)


def test_datasets_repeat_by_seed_and_do_not_overlap() -> None:
    train = make_dataset(["arithmetic", "cipher"], 40, seed=1, difficulty=(1, 3))
    assert train.to_list() == make_dataset(["arithmetic", "cipher"], 40, seed=1, difficulty=(1, 3)).to_list()
    held_out = make_dataset("arithmetic", 60, seed=1, exclude=train["prompt"])
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert len(set(train["prompt"])) == 40 and set(train["task"]) == {"arithmetic", "cipher"}
    assert set(train["difficulty"]) <= {1, 2, 3}


def test_conversational_prompts_are_scored_like_bare_ones() -> None:
    data = make_dataset("sudoku", 4, conversational=True)
    assert [prompt[0]["role"] for prompt in data["prompt"]] == ["user"] * 4
    said = [[{"role": "assistant", "content": f"<think>a</think><answer>{a}</answer>"}] for a in data["answer"]]
    columns = {"prompts": data["prompt"], "answer": data["answer"], "task": data["task"]}
    assert correctness_reward(said, **columns) == [1.0] * 4
    assert correctness_reward(said[1:] + said[:1], **columns) != [1.0] * 4
    assert format_reward(said) == [1.0] * 4


def test_too_few_problems_and_unknown_tasks_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"found \d+ different problems of arithmetic at difficulty 1 to 1, expected 150"
    ):
        make_dataset("arithmetic", 150)
    with pytest.raises(ValueError, match="task is 'algebra', expected one of arithmetic, "):
        make_dataset("algebra", 1)
    with pytest.raises(ValueError, match="expected at least one of each"):
        make_dataset([], 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42\n", "42"),
        ("<think>40?</think> 42", "42"),
        ("<answer>1</answer> no <answer> 42 </answer>", "42"),
        (r"so \boxed{41} or \boxed{42}.", "42"),
        ("", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer
    assert extract_answer([{"role": "assistant", "content": text}]) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<answer>1</answer>",
        "<think>a</think>",
        "<think>a<answer>1</answer>",
        "x<think>a</think><answer>1</answer>",
        "<think>a</think><answer>1</answer>x",
        "<think>a</think><think>b</think><answer>1</answer>",
        "<think>a</think><answer>1</answer><answer>2</answer>",
        "<answer>1</answer><think>a</think>",
    ],
)
def test_wrong_format_earns_nothing(text: str) -> None:
    assert format_reward([text]) == [0.0]


def test_pass_rate_filter_keeps_what_is_solved_sometimes() -> None:
    data = make_dataset("counting", 30, difficulty=3)
    share = {prompt: (i % 11) for i, prompt in enumerate(data["prompt"])}

    def sample(prompts: list[Any], num: int) -> list[list[Any]]:
        answers = dict(zip(data["prompt"], data["answer"], strict=True))
        return [[answers[p] if i < share[p] else "wrong" for i in range(num)] for p in prompts]

    kept = filter_by_pass_rate(data, sample, batch_size=7)
    assert kept["prompt"] == [p for p in data["prompt"] if 0 < share[p] < 9]
    assert kept["pass_rate"] == pytest.approx([share[p] / 10 for p in kept["prompt"]])
    with pytest.raises(ValueError, match="expected 10 for each"):
        filter_by_pass_rate(data, lambda prompts, num: [["x"]] * len(prompts))


def test_pairwise_judge_is_checked() -> None:
    def longer(prompts: Any, completions: Any, references: Any) -> list[int]:
        return [(len(c) > len(r)) - (len(c) < len(r)) for c, r in zip(completions, references, strict=True)]

    reward = pairwise_reward(longer)
    assert reward(["aa", "b", ""], prompts=["p"] * 3, reference=["a", "b", "c"]) == [1.0, 0.0, -1.0]
    assert reward.__name__ == "pairwise_longer"
    for bad in ([0], [2, 0], [float("nan"), 0]):
        with pytest.raises(ValueError, match="expected -1, 0 or 1 for each of 2"):
            pairwise_reward(lambda *_, bad=bad: bad)(["a", "b"], prompts=["p"] * 2, reference=["a", "b"])


def test_math_verify_takes_equal_forms() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed; it comes with the tasks extra")
    rewards = math_verify_reward([r"\boxed{0.5}", "<answer>2/4</answer>", "1/3"], answer=["1/2"] * 3)
    assert rewards == [1.0, 1.0, 0.0]


def test_reasoning_gym_scores_its_own_answers() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; see the tasks extra")
    data, reward = reasoning_gym_dataset("basic_arithmetic", 5, seed=3)
    source = list(reasoning_gym.create_dataset("basic_arithmetic", size=5, seed=3))
    answers = [f"<answer>{entry['answer']}</answer>" for entry in source]
    assert reward(answers, entry=data["entry"]) == [1.0] * 5
    assert max(reward(["<answer>nothing</answer>"] * 5, entry=data["entry"])) < 0.1
    with pytest.raises(ValueError, match="cannot make 'no_such_set'"):
        reasoning_gym_dataset("no_such_set", 1)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("math_verify", lambda: math_verify_reward(["1"], answer=["1"])),
        ("reasoning_gym", lambda: reasoning_gym_dataset("sudoku", 1)),
    ],
)
def test_absent_libraries_name_the_extra(module: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r"minimax-plugin\[tasks\]"):
        call()
