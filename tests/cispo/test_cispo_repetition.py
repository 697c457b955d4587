# SPDX-License-Identifier: Apache-2.0
"""The repetition stop in ``generate`` and in the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_process import training_logps
from transformers import AutoModelForCausalLM

from minimax_plugin.cispo.repetition import RepetitionRule, strip_forced_end
from minimax_plugin.repetition import RepetitionStop

TOKENS, PROBABILITY = 8, 0.99
NEW_TOKENS = 96
EOS = 7


def end_of_run(logps: list[float]) -> int | None:
    """Index after the first ``TOKENS`` consecutive tokens above ``PROBABILITY``, counted on the finished sequence."""
    for end in range(TOKENS, len(logps) + 1):
        if all(value > math.log(PROBABILITY) for value in logps[end - TOKENS : end]):
            return end
    return None


@pytest.fixture(params=["m1", "qwen3"])
def looping_model(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Any:
    """A model so sure of itself that it falls into loops."""
    model = AutoModelForCausalLM.from_pretrained(model_dirs[request.param], dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_({"m1": 2.0, "qwen3": 8.0}[request.param])
    return model


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sequences_end_where_a_count_after_the_fact_says(looping_model: Any, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(10, 320, (length,), generator=generator).tolist() for length in range(1, 17)]
    ids = torch.tensor([[0] * (16 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (16 - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def sample(**options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        output = looping_model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            eos_token_id=EOS,
            **options,
        )
        return output[:, 16:].tolist()

    def completed(row: list[int]) -> list[int]:
        return row[: row.index(EOS) + 1] if EOS in row else row

    free = [completed(row) for row in sample()]
    ends = [end_of_run(row) for row in training_logps(looping_model, prompts, free)]
    assert sum(end is not None for end in ends) >= 3, "too few loops to test anything"
    assert sum(end is None for end in ends) >= 3, "too few sequences without a loop"

    stop = RepetitionStop(TOKENS, PROBABILITY, EOS)
    stopped = [completed(row) for row in sample(logits_processor=[stop])]
    for row, end, short in zip(free, ends, stopped, strict=True):
        # A sequence that is cut off at the limit, or ends by itself, right after its run has nothing to be forced.
        assert short == (row if end is None or end == len(row) else [*row[:end], EOS])
    stripped, flags = strip_forced_end(stopped, stop.kept_tokens())
    assert flags == [end is not None and end < len(row) for row, end in zip(free, ends, strict=True)]
    assert [len(row) for row in stripped] == [
        len(row) if end is None else end for row, end in zip(free, ends, strict=True)
    ]


def test_a_run_in_the_padding_is_not_a_stop() -> None:
    completions = [[4, 5, EOS], [4, 5, EOS], [4, 5, 6]]
    assert strip_forced_end(completions, [2, 9, None]) == ([[4, 5], [4, 5, EOS], [4, 5, 6]], [True, False, False])


def test_generate_is_left_as_it_was(looping_model: Any) -> None:
    rule = RepetitionRule(TOKENS, PROBABILITY)
    with pytest.raises(RuntimeError, match="inside"), rule.in_generate(looping_model, EOS):
        assert "generate" in vars(looping_model)
        raise RuntimeError("inside")
    assert "generate" not in vars(looping_model)
