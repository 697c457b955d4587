# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the Hugging Face side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracle import Oracle, OracleCache, random_tensors, tiny_config, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import minimax_plugin  # noqa: F401  importing it registers the classes


def load_fp32(path: Path, **kwargs: Any) -> PreTrainedModel:
    """A causal language model in fp32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


def make_pair(path: Path, seed: int = 0, **changes: Any) -> tuple[PreTrainedModel, Oracle]:
    """A random checkpoint of :func:`oracle.tiny_config` with changes, as a model and as an oracle."""
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed)
    return load_fp32(write_checkpoint(path, config, tensors)), Oracle(config, tensors)


def random_ids(batch_size: int, length: int, vocab_size: int = 128, seed: int = 1) -> Tensor:
    return torch.randint(3, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def states_of(cache: Any) -> dict[int, Tensor]:
    """Lightning states [B, H, D, D] by layer."""
    return {i: layer.recurrent_states[0] for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_matches_oracle(model: PreTrainedModel, oracle: Oracle, rows: list[list[int]], **inputs: Any) -> None:
    """Logits and states of a batch, whose row i holds the tokens ``rows[i]`` where its mask is set."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    with torch.no_grad():
        output = model(**inputs)
    for row, tokens in enumerate(rows):
        cache = OracleCache()
        expected = oracle(tokens, cache).logits
        assert (output.logits[row][mask[row]] - expected).abs().max() <= 1e-3
        for layer, state in cache.states.items():
            assert relative_error(states_of(output.past_key_values)[layer][row], state) <= 1e-5
