# SPDX-License-Identifier: Apache-2.0
"""One training run in a process of its own, which may be told to die: ``resume_process.py SETTINGS.json``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback

import minimax_plugin  # noqa: F401  registers the model
from minimax_plugin.cispo import CISPOConfig, CISPOTrainer

PROMPTS = [
    f"{a} {b}" for a in ("river", "12 names", "a", "the old stone") for b in ("rain", "one, two", "what", "snow")
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfter(TrainerCallback):
    """Ends the process as ``kill -9`` does, after a number of updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def make_trainer(settings: dict[str, Any], trainer_class: type = CISPOTrainer) -> Any:
    config = CISPOConfig(
        settings["output_dir"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=8,
        num_generations=4,
        steps_per_generation=4,
        max_completion_length=6,
        **settings["config"],
    )
    return trainer_class(
        model=settings["model"],
        reward_funcs=even_share,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
    )


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    trainer = make_trainer(settings)
    if settings.get("die_after"):
        trainer.add_callback(DieAfter(settings["die_after"]))
    if settings.get("die_while_saving"):
        save = trainer._save_optimizer_and_scheduler

        def save_or_die(directory: str) -> None:
            if directory.endswith(f"-{settings['die_while_saving']}"):
                die()
            save(directory)

        trainer._save_optimizer_and_scheduler = save_or_die
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    parameters = {name: value.detach().contiguous() for name, value in trainer.model.named_parameters()}
    save_file(parameters, settings["result"])


if __name__ == "__main__":
    main()
