# SPDX-License-Identifier: Apache-2.0
"""Six updates in one process or in several under torchrun: ``parallel_training_process.py MODE MODEL RESULT``.

``MODE`` is "single", "ddp", "ddp-changed" (the second process gets other completions) or "fsdp2". Completions follow
from the prompt and their place in the group, so that any number of processes trains on the same ones.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import minimax_plugin  # noqa: F401  registers the model
from minimax_plugin.cispo import CISPOConfig, CISPOTrainer

UPDATES = 6
BATCH_SIZE = 16
GROUP = 4
PROMPTS = [
    f"{a} {b}" for a in ("river", "12 names", "a", "the old stone") for b in ("rain", "one, two", "what", "snow")
]


def rank_and_size() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class FixedCompletions(CISPOTrainer):
    """Its completions follow from the prompt and their place in the group."""

    salt = ""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        completions = []
        for place, ids in enumerate(prompt_ids):
            digest = hashlib.sha256(f"{self.salt}{ids}{place % GROUP}".encode()).digest()
            completions.append([20 + byte % 200 for byte in digest[: 3 + digest[0] % 6]])
        return completions, None


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def main() -> None:
    mode, path, result = sys.argv[1:4]
    torch.set_num_threads(1)
    rank, size = rank_and_size()
    assert size == (1 if mode == "single" else 2), f"{mode} with {size} processes"
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if mode == "fsdp2" else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    assert len(sharded) == (len(list(model.parameters())) if mode == "fsdp2" else 0), sharded
    config = CISPOConfig(
        str(Path(result).parent / mode),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-8,  # with 1e-15 the sign of a gradient of rounding errors moves weights
        per_device_train_batch_size=BATCH_SIZE // size,
        num_generations=GROUP,
        max_completion_length=8,
        max_steps=UPDATES,
    )
    trainer = FixedCompletions(
        model=model, reward_funcs=even_share, args=config, train_dataset=Dataset.from_dict({"prompt": PROMPTS})
    )
    if mode == "ddp-changed" and rank == 1:
        trainer.salt = "other"
    assert trainer.accelerator.num_processes == size
    trainer.train()
    parameters = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        parameters[name] = value.detach().contiguous()
    if rank == 0:
        save_file(parameters, result)


if __name__ == "__main__":
    main()
