# SPDX-License-Identifier: Apache-2.0
"""What an engine must answer: golden results, and the float64 oracle where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from goldens import load_golden
from oracle import Oracle, OracleCache, tiny_config, write_checkpoint
from vllm_engine_process import Completion

#: Largest difference of the log probability of a generated token between vLLM in fp32 and the reference.
LOGPROB_TOLERANCE = 1e-4

#: Words of the golden cases in the repository, and of the random checkpoints here.
VOCAB_SIZE = 256


@dataclass(frozen=True)
class Expected:
    """A prompt, the greedy tokens that follow it, and their log probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def golden_case(case: Path) -> list[Expected]:
    """Every row of a golden case, padding removed."""
    cases = []
    for batch in load_golden(case):
        ids, mask, greedy = (batch[key] for key in ("input_ids", "attention_mask", "greedy_ids"))
        logprobs = batch["greedy_logits"].double().log_softmax(-1)
        for row in range(ids.shape[0]):
            cases.append(
                Expected(
                    prompt=ids[row][mask[row].bool()].tolist(),
                    tokens=greedy[row].tolist(),
                    logprobs=logprobs[row].gather(-1, greedy[row][:, None].long()).flatten().tolist(),
                )
            )
    return cases


def link_checkpoint(case: Path, folder: Path) -> Path:
    """The checkpoint of a golden case without its results, which vLLM would load as weights too."""
    target = folder / case.name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (target / file).symlink_to(case / file)
    return target


def random_checkpoint(folder: Path, layers: Sequence[int]) -> Path:
    """A checkpoint with random weights, for the oracle to say what it answers; 0 is a lightning layer, 1 softmax."""
    config = tiny_config(
        hidden_size=64, vocab_size=VOCAB_SIZE, attn_type_list=list(layers), num_hidden_layers=len(layers)
    )
    return write_checkpoint(folder / f"random-{len(layers)}", config)


def oracle_case(oracle: Oracle, prompt: Sequence[int], num_tokens: int) -> Expected:
    """Greedy decoding by the oracle."""
    cache = OracleCache()
    logits = oracle(prompt, cache).logits[-1]
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(num_tokens):
        token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        logits = oracle([token], cache).logits[-1]
    return Expected(list(prompt), tokens, logprobs)


def random_prompts(lengths: Sequence[int], vocab_size: int = VOCAB_SIZE, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def assert_equal(completions: Sequence[Completion], expected: Sequence[Expected]) -> None:
    """Tokens equal, log probabilities within :data:`LOGPROB_TOLERANCE`."""
    assert len(completions) == len(expected)
    for completion, case in zip(completions, expected, strict=True):
        where = f"prompt of {len(case.prompt)} tokens"
        assert completion.tokens == case.tokens, where
        assert completion.logprobs == [_approximately(value) for value in case.logprobs], where


def _approximately(value: float) -> object:
    import pytest

    return pytest.approx(value, abs=LOGPROB_TOLERANCE)
