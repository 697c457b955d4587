# SPDX-License-Identifier: Apache-2.0
"""Counting runs of probable tokens, against a count after the fact."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from minimax_plugin.repetition import RepetitionStop, RunLengths, check_repetition_values, force_token, repetition_end

VOCAB = 11
P = 0.9


def step_logits(token: int, probability: float, generator: torch.Generator) -> Tensor:
    """[V]: ``token`` has ``probability``, the others share the rest unevenly."""
    rest = torch.rand(VOCAB, generator=generator)
    rest[token] = 0
    probabilities = rest / rest.sum() * (1 - probability)
    probabilities[token] = probability
    return probabilities.log() + 3.0


def runs_of(probabilities: list[float]) -> list[int]:
    """Length of the run that ends with each token."""
    runs, run = [], 0
    for probability in probabilities:
        run = run + 1 if probability > P else 0
        runs.append(run)
    return runs


def random_sequence(rng: random.Random, length: int) -> tuple[list[int], list[float]]:
    """Sampled tokens and their probabilities: mostly certain, at times a token that was not the likely one."""
    tokens = [rng.randrange(VOCAB) for _ in range(length)]
    return tokens, [rng.choice([0.95, 0.95, 0.95, 0.99, 0.85, 0.2]) for _ in range(length)]


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_those_of_a_count_after_the_fact(seed: int) -> None:
    """Sequences enter and go on at their own pace, some steps are repeated, others lie inside the prompt."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length, count = 40, 4
    sequences = [random_sequence(rng, length) for _ in range(count)]
    counter = RunLengths(count, "cpu")
    position = [-rng.randrange(3) for _ in range(count)]
    seen: list[list[int]] = [[] for _ in range(count)]
    while min(position) < length:
        rows = [i for i in range(count) if position[i] < length and rng.random() < 0.7]
        rng.shuffle(rows)
        if not rows:
            continue
        # A step inside the prompt repeats its last token and would count if positions were not looked at.
        tokens = [sequences[i][0][position[i] - 1] if position[i] > 0 else sequences[i][0][0] for i in rows]
        logits = [step_logits(sequences[i][0][max(position[i], 0)], 0.95, generator) for i in rows]
        for row, i in enumerate(rows):
            if position[i] >= 0:
                token, probability = sequences[i][0][position[i]], sequences[i][1][position[i]]
                logits[row] = step_logits(token, probability, generator)
        run = counter.advance(
            torch.tensor(rows),
            torch.tensor([position[i] for i in rows]),
            torch.tensor(tokens),
            torch.stack(logits),
            torch.tensor(math.log(P)),
        )
        for i, value in zip(rows, run.tolist(), strict=True):
            if position[i] > 0 and len(seen[i]) < position[i]:
                seen[i].append(value)
            if rng.random() < 0.8:
                position[i] += 1
    for (_, probabilities), runs in zip(sequences, seen, strict=True):
        assert runs == runs_of(probabilities)[: length - 1]


def test_a_request_that_resumes_goes_on_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    counter = RunLengths(1, "cpu")

    def step(position: int, previous: int, token: int) -> int:
        logits = step_logits(token, 0.95, generator)[None]
        row, where = torch.tensor([0]), torch.tensor([position])
        return int(counter.advance(row, where, torch.tensor([previous]), logits, torch.tensor(math.log(P))))

    assert [step(0, 9, 1), step(1, 1, 2), step(2, 2, 3)] == [0, 1, 2]
    assert [step(0, 9, 1), step(1, 1, 2)] == [0, 0]  # the prompt and its first tokens once more, in chunks
    assert step(3, 3, 4) == 3
    assert step(3, 3, 4) == 3  # the same step again
    assert step(5, 5, 6) == 0  # a step is missing
    counter.forget(0)
    assert step(6, 6, 7) == 0


def test_counts_survive_growth() -> None:
    generator = torch.Generator().manual_seed(0)
    counter, threshold = RunLengths(2, "cpu"), torch.tensor(math.log(P))
    logits = torch.stack([step_logits(3, 0.95, generator)] * 2)
    for position in range(3):
        counter.advance(torch.tensor([0, 1]), torch.full((2,), position), torch.tensor([3, 3]), logits, threshold)
    counter.grow(5)
    rows = torch.tensor([4, 1, 0])
    run = counter.advance(rows, torch.full((3,), 3), torch.full((3,), 3), logits[[0, 0, 0]], threshold)
    assert run.tolist() == [0, 3, 3]


def test_force_token() -> None:
    logits = torch.randn(3, VOCAB)
    logits[2, 5] = -torch.inf
    before = logits.clone()
    forced = force_token(logits, torch.tensor([False, True, True]), 5)
    assert forced.tolist() == [False, True, False]
    assert torch.equal(logits[0], before[0])
    assert torch.equal(logits[2], before[2]), "a grammar forbids the token, so the row stays as it is"
    assert logits[1].softmax(-1)[5] == 1
    each = force_token(before, torch.tensor([True, True, True]), torch.tensor([1, 2, 3]))
    assert each.all()
    assert before.argmax(-1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ([-0.001] * 3, 3),
        ([-0.001] * 5, 3),
        ([-0.001] * 2, None),
        ([-0.001, -0.001, -1.0, -0.001, -0.001, -0.001], 6),
        ([-0.001, -0.001, None, -0.001], None),
        ([math.log(P)] * 3, None),
        ([], None),
    ],
)
def test_end_after_the_fact(logprobs: list[float | None], expected: int | None) -> None:
    assert repetition_end(logprobs, 3, P) == expected


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, "9", None])
def test_refuses_a_bad_number_of_tokens(tokens: object) -> None:
    with pytest.raises(ValueError, match=r"rule_n is .*, expected a whole number of at least 1"):
        check_repetition_values(tokens, P, names=("rule_n", "rule_p"))  # type: ignore[arg-type]


@pytest.mark.parametrize("probability", [0.49, 1.0, 1.5, math.nan, True, "x"])
def test_refuses_a_bad_probability(probability: object) -> None:
    with pytest.raises(ValueError, match=r"rule_p is .*, expected a number of at least 0.5 and below 1"):
        check_repetition_values(3, probability, names=("rule_n", "rule_p"))  # type: ignore[arg-type]


def test_one_processor_serves_one_call() -> None:
    stop = RepetitionStop(2, P, 0)
    stop(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, VOCAB))
    with pytest.raises(ValueError, match="make one for each call of generate"):
        stop(torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, VOCAB))
