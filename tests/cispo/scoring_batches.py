# SPDX-License-Identifier: Apache-2.0
"""Ragged batches as TRL's trainer builds them, and models that score them; shared by tests of packing and routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import minimax_plugin  # noqa: F401  importing it registers the classes
from minimax_plugin.cispo.packing import ScoringOptions, install_scoring

TEMPERATURE = 0.8

#: Tokens of prompt and completion of each row; the third is a completion that was masked as a whole.
LENGTHS = ((20, 15), (1, 3), (7, 0), (13, 9), (4, 15), (2, 1))


class Batch(NamedTuple):
    """Left-padded prompts and right-padded completions: ids, mask, labels [B, S], and the width of the completions."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    completion: int

    def arguments(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


def make_batch(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 0) -> Batch:
    prompt, completion = (max(column) for column in zip(*lengths, strict=True))
    shape = (len(lengths), prompt + completion)
    ids = torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, (before, after) in enumerate(lengths):
        mask[row, prompt - before : prompt + after] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return Batch(ids, mask, labels, completion)


def make_model(path: Path, options: ScoringOptions | None = None, **kwargs: Any) -> PreTrainedModel:
    """A model in fp32 with TRL's head, and ours over it where there are options."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)
    add_fused_lm_head(model, temperature=TEMPERATURE, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    if options is not None:
        install_scoring(model, options)
    return model.train()


def packed(max_tokens: int | None = None, **changes: Any) -> ScoringOptions:
    return ScoringOptions(temperature=TEMPERATURE, chunk_tokens=16, pack=True, max_tokens=max_tokens, **changes)


class Result(NamedTuple):
    log_probs: Tensor
    entropy: Tensor
    gradient: Tensor
    loss: Tensor
    aux_loss: Tensor | None


def run(model: PreTrainedModel, batch: Batch, entropy_weight: float = 0.1, **kwargs: Any) -> Result:
    """Log-probabilities and entropies of the completions, and the gradient of a random mix of them in one vector."""
    model.zero_grad()
    output = model(**batch.arguments(), fused_lm_head=True, **kwargs)
    log_probs, entropy = (values[:, -batch.completion :] for values in (output.log_probs, output.entropy))
    mix = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5))
    loss = (mix * log_probs).sum() + entropy_weight * entropy.sum()
    if output.aux_loss is not None:
        loss = loss + output.aux_loss
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    gradient = torch.cat([gradient.flatten() for gradient in gradients])
    return Result(log_probs.detach(), entropy.detach(), gradient, loss.detach(), output.aux_loss)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
