# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a run resumes from as if it had never stopped.

transformers puts a resumed model together with ``load_state_dict(strict=False)``, which drops every tensor whose name
in the file differs from the one in memory, as those of fused experts do; and TRL keeps the rollout in use and the
number of the step within it in memory only. Here weights come back through the model's own loader, the rollout and
everything that decides about the next one is saved beside them, and a checkpoint appears under its name when it is
complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from minimax_plugin.cispo.config import CISPOConfig

logger = logging.getLogger(__name__)

#: Where a checkpoint is while it is written, below the output directory.
UNFINISHED_DIR = ".unfinished"

_STATE_FILE = "rollout_state.json"
_ADAPTER_FILE = "adapter_config.json"
_TRAINER_STATE_FILE = "trainer_state.json"


class ExactResume(GRPOTrainer):
    """Saves and restores what transformers and TRL leave out.

    Classes below it add to :meth:`resumable_state` what they need.
    """

    args: CISPOConfig
    rollout_statistics: dict[str, float]
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _is_saving = False

    def resumable_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimizer, schedule and random states, as JSON; alike on all
        processes.
        """
        return {"statistics": dict(self.rollout_statistics)}

    def load_resumable_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`resumable_state` returned."""
        self.rollout_statistics = dict(state["statistics"])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_local_main_process:
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED_DIR, ignore_errors=True)
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, UNFINISHED_DIR) if self._is_saving else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside, then rename: whatever ends the process, the last complete checkpoint is there."""
        final = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = final.parent / UNFINISHED_DIR / final.name
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._save_rollout(unfinished)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._name_best(unfinished, final)
            _put_in_place(unfinished, final)
        self.accelerator.wait_for_everyone()
        # Where nodes share no disk, each has a part of its own to rename.
        if self.accelerator.is_local_main_process and unfinished.is_dir():
            _put_in_place(unfinished, final)
        self._remove_old(final)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore weights, exactly and by name, and the state of the rollout.

        Raises:
            ValueError: a checkpoint of another model, another number of processes or other settings.
        """
        directory = Path(resume_from_checkpoint)
        if self._loads_itself(directory):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.accelerator.unwrap_model(model or self.model), directory)
        self._load_rollout(directory)

    def _load_best_model(self) -> None:
        directory = Path(str(self.state.best_model_checkpoint))
        if self._loads_itself(directory):
            super()._load_best_model()
        else:
            load_weights(self.accelerator.unwrap_model(self.model), directory)

    def _loads_itself(self, directory: Path) -> bool:
        """Adapters and sharded formats, which have loaders of their own in transformers."""
        return (
            (directory / _ADAPTER_FILE).is_file()
            or hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
        )

    def _save_rollout(self, directory: Path) -> None:
        state = {
            "num_processes": self.accelerator.num_processes,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "step": self._step,
            "has_rollout": self.args.save_rollout_buffer and self._buffered_inputs is not None,
        } | self.resumable_state()
        directory.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            (directory / _STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if state["has_rollout"]:
            torch.save(self._buffered_inputs, directory / _rollout_file(self.accelerator.process_index))
        elif not self._is_between_rollouts():
            logger.warning(
                "checkpoint %s is written within a rollout that it does not contain: resuming generates another one. "
                "Set save_rollout_buffer=True, or save_steps to a multiple of the updates per rollout",
                directory.name,
            )

    def _load_rollout(self, directory: Path) -> None:
        path = directory / _STATE_FILE
        if not path.is_file():
            logger.warning(
                "%s was not written by this trainer: the rollout in use is generated anew, and prompts and schedules "
                "start from the beginning",
                directory,
            )
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, found in (
            ("num_processes", self.accelerator.num_processes),
            ("steps_per_generation", self.args.steps_per_generation),
            ("num_iterations", self.num_iterations),
        ):
            if state["has_rollout"] and state[name] != found:
                raise ValueError(
                    f"{directory} was written with {name} = {state[name]}, this run has {found}, and the rollout in it "
                    f"cannot be divided anew; resume with {name} = {state[name]}"
                )
        self._step = state["step"]
        self.load_resumable_state(state)
        if state["has_rollout"]:
            rollout = directory / _rollout_file(self.accelerator.process_index)
            if not rollout.is_file():
                raise ValueError(f"{directory} lacks {rollout.name}, the rollout of this process; copy all of it")
            self._buffered_inputs = torch.load(rollout, map_location=self.accelerator.device, weights_only=True)

    def _is_between_rollouts(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def _name_best(self, unfinished: Path, final: Path) -> None:
        """Say where the best checkpoint is once this one has its name."""
        if not self.state.best_global_step:
            return
        best = final.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(unfinished / _TRAINER_STATE_FILE))

    def _remove_old(self, newest: Path) -> None:
        """Keep ``save_total_limit`` checkpoints: the newest, the best and the latest others."""
        limit = self.args.save_total_limit
        if self.args.should_save and limit is not None and limit > 0:
            found = [p for p in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
            found.sort(key=lambda path: int(path.name.rpartition("-")[2]))
            kept = {newest, Path(str(self.state.best_model_checkpoint))}
            others = [path for path in found if path not in kept]
            for path in others[: max(0, len(found) - max(limit, len(kept & set(found))))]:
                shutil.rmtree(path, ignore_errors=True)


def load_weights(model: Any, directory: Path) -> None:
    """Load a model's weights in place from a directory that ``save_pretrained`` wrote, bit by bit as they were.

    A second copy of the model is in memory meanwhile, because the loader of a model makes a new one. It is made in
    fp32, so that a head kept in fp32 beside weights in bf16 loses nothing.

    Raises:
        ValueError: the checkpoint has other parameters than the model.
    """
    config = model.config
    options: dict[str, Any] = {"dtype": torch.float32}
    distributed = getattr(config, "distributed_config", None)
    if distributed is not None:
        options["distributed_config"] = distributed
    source = type(model).from_pretrained(directory, **options)
    loaded = dict(source.named_parameters()) | dict(source.named_buffers())
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    if {name: tensor.shape for name, tensor in loaded.items()} != {name: tensor.shape for name, tensor in own.items()}:
        different = sorted(
            name
            for name in loaded.keys() | own.keys()
            if name not in loaded or name not in own or loaded[name].shape != own[name].shape
        )
        raise ValueError(
            f"{directory} holds another model: {len(different)} parameters differ, {', '.join(different[:3])}; resume "
            "with the model that the run began with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Rename; what had the name before goes last."""
    replaced = final.parent / UNFINISHED_DIR / f"{final.name}.replaced"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(unfinished, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _rollout_file(process_index: int) -> str:
    return f"rollout_{process_index}.pt"
