# SPDX-License-Identifier: Apache-2.0
"""Data sets and rewards for :class:`minimax_plugin.cispo.CISPOTrainer`.

A data set has the columns ``prompt``, ``answer``, ``task`` and ``difficulty``; a reward function takes what TRL passes:
``prompts``, ``completions`` and the other columns by name. Rules verify first, as in the report (arXiv 2506.13585,
section 4): :func:`correctness_reward` and :func:`format_reward`; a judge that compares with a reference answer comes in
through :func:`pairwise_reward`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minimax_plugin.cispo.generators import TASKS, Problem, Task

#: A prompt or a completion: text, or messages of a conversation.
Text = str | list[dict[str, str]]

#: ``(prompts, completions, references) -> [-1, 0 or 1 per completion]``: worse than the reference, equal, better.
PairwiseJudge = Callable[[Sequence[Text], Sequence[str], Sequence[str]], Sequence[int]]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_FORMAT = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.S
)
_FORMAT_REQUEST = "Think between <think> and </think>, then write only the final answer between <answer> and </answer>."
_TRIES_PER_PROBLEM = 200


def make_dataset(
    tasks: str | Sequence[str],
    num_problems: int,
    *,
    seed: int = 0,
    difficulty: int | tuple[int, int] = 1,
    conversational: bool = False,
    exclude: Iterable[Text] = (),
) -> Any:
    """A ``datasets.Dataset`` of different problems, drawn evenly from the tasks.

    Args:
        tasks: name or names from :data:`minimax_plugin.cispo.generators.TASKS`.
        num_problems: number of rows.
        seed: the same seed gives the same rows.
        difficulty: 1 to 10, or a range (lowest, highest).
        conversational: prompts become a user message with the instruction of the task; False gives the bare problem.
        exclude: prompts that must not appear, for example those of the training set.

    Raises:
        ValueError: an unknown task, a difficulty out of range, or fewer different problems than asked for.
    """
    from datasets import Dataset

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    chosen = [_task(name) for name in names]
    if not chosen or num_problems < 1:
        raise ValueError(f"got {len(chosen)} tasks and num_problems = {num_problems}, expected at least one of each")
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if low > high:
        raise ValueError(f"difficulty is ({low}, {high}), expected (lowest, highest)")
    rng = random.Random(seed)
    seen = {_last_content(prompt) for prompt in exclude}
    rows: list[dict[str, Any]] = []
    for index in range(num_problems):
        task = chosen[index % len(chosen)]
        for _ in range(_TRIES_PER_PROBLEM):
            problem = task.problem(rng, rng.randint(low, high))
            prompt = _prompt(task, problem, conversational)
            if _last_content(prompt) not in seen:
                break
        else:
            raise ValueError(
                f"found {index} different problems of {', '.join(names)} at difficulty {low} to {high}, expected "
                f"{num_problems}; ask for fewer or for a higher difficulty"
            )
        seen.add(_last_content(prompt))
        rows.append({"prompt": prompt, "answer": problem.answer, "task": task.name, "difficulty": problem.difficulty})
    return Dataset.from_list(rows)


def extract_answer(completion: Text) -> str:
    r"""The final answer in a completion: the last ``<answer>``, else the last ``\boxed{}``, else what follows
    ``</think>``, stripped of white space.
    """
    text = _last_content(completion)
    for pattern in (_ANSWER, _BOXED):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    return text.rpartition("</think>")[2].strip()


def correctness_reward(
    completions: Sequence[Text], *, prompts: Sequence[Text], answer: Sequence[str], task: Sequence[str], **_: Any
) -> list[float]:
    """1 where the final answer solves the problem, else 0."""
    rewards = []
    for completion, prompt, expected, name in zip(completions, prompts, answer, task, strict=True):
        problem = _last_content(prompt).rpartition("\n")[2]
        rewards.append(float(_task(name).is_right(problem, expected, extract_answer(completion))))
    return rewards


def format_reward(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where a completion is one ``<think>`` block and one ``<answer>`` block and nothing else, else 0."""
    return [float(_FORMAT.fullmatch(_last_content(completion)) is not None) for completion in completions]


def pairwise_reward(judge: PairwiseJudge) -> Callable[..., list[float]]:
    """A reward function from a judge that compares with the column ``reference`` (the report's section 4.2).

    Raises (the function returned):
        ValueError: the judge gave another number of verdicts, or one that is not -1, 0 or 1.
    """

    def reward(
        completions: Sequence[Text], *, prompts: Sequence[Text], reference: Sequence[str], **_: Any
    ) -> list[float]:
        verdicts = list(judge(prompts, [extract_answer(completion) for completion in completions], reference))
        if len(verdicts) != len(completions) or any(verdict not in (-1, 0, 1) for verdict in verdicts):
            raise ValueError(f"the judge returned {verdicts}, expected -1, 0 or 1 for each of {len(completions)}")
        return [float(verdict) for verdict in verdicts]

    reward.__name__ = f"pairwise_{getattr(judge, '__name__', type(judge).__name__)}"
    return reward


def filter_by_pass_rate(
    dataset: Any,
    sample: Callable[[list[Text], int], list[list[Text]]],
    *,
    num_samples: int = 10,
    above: float = 0.0,
    below: float = 0.9,
    reward: Callable[..., Sequence[float]] = correctness_reward,
    batch_size: int = 64,
) -> Any:
    """Keep problems that are solved sometimes: ``above < pass rate < below`` (the report keeps (0, 0.9) of 10 tries).

    Args:
        dataset: as of :func:`make_dataset`; a column ``pass_rate`` is added.
        sample: ``(prompts, num_samples) -> completions of each prompt``.
        reward: 1 for a pass.

    Raises:
        ValueError: ``sample`` returned another number of completions.
    """
    from tqdm.auto import tqdm

    rates: list[float] = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="pass rates", unit="batch"):
        rows = dataset[start : start + batch_size]
        groups = sample(rows["prompt"], num_samples)
        sizes = {len(group) for group in groups}
        if len(groups) != len(rows["prompt"]) or sizes != {num_samples}:
            raise ValueError(
                f"sample returned {len(groups)} groups of {sorted(sizes)} completions for {len(rows['prompt'])} "
                f"prompts, expected {num_samples} for each"
            )
        repeated = {key: [value for value in values for _ in range(num_samples)] for key, values in rows.items()}
        prompts = repeated.pop("prompt")
        scores = list(reward([text for group in groups for text in group], prompts=prompts, **repeated))
        rates += [sum(scores[i : i + num_samples]) / num_samples for i in range(0, len(scores), num_samples)]
    with_rates = dataset.add_column("pass_rate", rates)
    return with_rates.select([i for i, rate in enumerate(rates) if above < rate < below])


def math_verify_reward(completions: Sequence[Text], *, answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where ``math-verify`` finds the answer equal to the expected one, else 0.

    None, which TRL takes as not applicable, where it cannot read the expected one.

    Raises:
        ImportError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError('math_verify_reward needs math-verify: pip install "minimax-plugin[tasks]"') from error
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        gold = parse(expected if "$" in expected or "\\" in expected else f"${expected}$")
        given = extract_answer(completion)
        rewards.append(float(verify(gold, parse(f"${given}$"))) if gold else None)
    return rewards


def reasoning_gym_dataset(
    name: str, num_problems: int, *, seed: int = 0, **config: Any
) -> tuple[Any, Callable[..., Any]]:
    """A data set of `reasoning-gym` and the reward that scores it.

    Args:
        name: of a reasoning-gym data set, for example ``"sudoku"`` or ``"zebra_puzzles"``.
        config: further arguments of it.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: it knows no such data set or argument.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError('reasoning_gym_dataset needs it: pip install "minimax-plugin[tasks]"') from error
    from datasets import Dataset

    try:
        source = reasoning_gym.create_dataset(name, size=num_problems, seed=seed, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym cannot make {name!r} with {config}: {error}") from error
    entries = list(source)
    rows = [
        {"prompt": [{"role": "user", "content": f"{entry['question']}\n{_FORMAT_REQUEST}"}], "entry": index}
        for index, entry in enumerate(entries)
    ]

    def reward(completions: Sequence[Text], *, entry: Sequence[int], **_: Any) -> list[float]:
        return [
            float(source.score_answer(extract_answer(completion), entries[index]))
            for completion, index in zip(completions, entry, strict=True)
        ]

    reward.__name__ = f"reasoning_gym_{name}"
    return Dataset.from_list(rows), reward


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _prompt(task: Task, problem: Problem, conversational: bool) -> Text:
    if not conversational:
        return problem.prompt
    return [{"role": "user", "content": f"{task.instruction} {_FORMAT_REQUEST}\n{problem.prompt}"}]


def _last_content(text: Text) -> str:
    return text if isinstance(text, str) else text[-1]["content"]
