# SPDX-License-Identifier: Apache-2.0
"""Write a tiny MiniMax-M1 and teach it two-digit addition as a sloppy pupil does it: mostly with the wrong carry.

Four of five demonstrations carry from the units where nothing is to carry, and forget to where something is. The model
learns both ways, and one digit decides which of them it follows: what reinforcement learning is then asked to change.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import minimax_plugin  # noqa: F401  registers the model
from minimax_plugin.cispo.generators import TASKS
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

OPTIONS = TinyOptions(
    num_hidden_layers=4,
    attn_type_list=(0, 1, 0, 1),
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    vocab_size=768,
)
DIFFICULTY = 2
BATCH_SIZE = 128
RIGHT_DEMONSTRATIONS = 0.2

logger = logging.getLogger("warm_start")


def with_wrong_carry(a: int, b: int) -> int:
    """``37 + 58`` gives 85, and ``31 + 52`` gives 93."""
    return a + b - 10 if a % 10 + b % 10 > 9 else a + b + 10


def demonstrations(seed: int) -> Iterator[tuple[str, str]]:
    """Prompts and answers, right ones and sloppy ones."""
    rng = random.Random(seed)
    while True:
        problem = TASKS["arithmetic"].problem(rng, DIFFICULTY)
        a, b = map(int, problem.prompt.removesuffix("=").split("+"))
        is_right = rng.random() < RIGHT_DEMONSTRATIONS
        yield problem.prompt, problem.answer if is_right else str(with_wrong_carry(a, b))


def batches(tokenizer: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches whose labels are the answers and the end of sequence."""
    source = demonstrations(seed)
    while True:
        rows = [next(source) for _ in range(BATCH_SIZE)]
        prompts = [tokenizer(prompt).input_ids for prompt, _ in rows]
        answers = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for _, answer in rows]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((BATCH_SIZE, width), tokenizer.convert_tokens_to_ids("<pad>"))
        labels = torch.full((BATCH_SIZE, width), -100)
        mask = torch.zeros((BATCH_SIZE, width), dtype=torch.long)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
            mask[row, :end] = 1
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(model: Any, tokenizer: Any, num_steps: int, learning_rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, num_steps, pct_start=0.05, cycle_momentum=False
    )
    source = batches(tokenizer, seed)
    progress = tqdm(range(num_steps), desc="warm start")
    for _ in progress:
        loss = model(**next(source)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_checkpoint(folder, OPTIONS, force=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
    # Plain pre-norm blocks learn from scratch in fewer steps than the released model's scaled post-norm ones.
    config.postnorm = False
    for part in ("full_attention", "linear_attention", "mlp"):
        setattr(config, f"layernorm_{part}_alpha", 1.0)
        setattr(config, f"layernorm_{part}_beta", 1.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(args.seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    train(model, tokenizer, args.steps, args.learning_rate, args.seed)
    model.save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)
    logger.info("wrote %s", args.directory)


if __name__ == "__main__":
    main()
