# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin train cispo CONFIG.yaml``: reinforcement learning from one file of settings.

Under several processes: ``accelerate launch -m minimax_plugin.cli train cispo CONFIG.yaml``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

USAGE = "minimax-plugin train cispo CONFIG.yaml [--FIELD VALUE ...]"

EPILOG = (
    "CONFIG.yaml holds fields of TaskArguments (tasks, reward_funcs, ...), of CISPOConfig and of TRL's ModelConfig; "
    "fields on the command line win. `minimax-plugin train cispo --help` lists them all. Writes the model, "
    "summary.json and curves.png to output_dir."
)

METHODS = ("cispo",)

logger = logging.getLogger(__name__)


@dataclass
class TaskArguments:
    """What is trained on."""

    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Generated tasks: arithmetic, modular, sorting, cipher, rewriting, counting, sudoku, logic_grid."
        },
    )
    difficulty: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Difficulty of generated tasks, or lowest and highest; 1 to 10."}
    )
    num_problems: int = field(default=1024, metadata={"help": "Generated problems to train on."})
    num_held_out: int = field(
        default=256, metadata={"help": "Generated problems to evaluate on, none of them among the former; 0 for none."}
    )
    task_seed: int = field(default=0, metadata={"help": "Seed of the generated problems."})
    conversational: bool = field(
        default=False, metadata={"help": "Prompts are messages with an instruction, for models that follow one."}
    )
    reasoning_gym: str | None = field(
        default=None, metadata={"help": "Name of a reasoning-gym data set to train on instead (tasks extra)."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A JSON Lines or Parquet file, or a hub data set, with a prompt column, to train on instead."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["correctness"],
        metadata={"help": "correctness, format, math_verify, or module:function of your own."},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For ``--help`` alone; see :func:`run_program`."""
    parser.usage = USAGE
    parser.epilog = EPILOG


def run_program(argv: Sequence[str]) -> int:
    """Train as ``METHOD CONFIG.yaml [--FIELD VALUE ...]`` says; the exit status."""
    if not argv or argv[0] not in METHODS:
        return _wrong_usage(f"method is {argv[0]!r}" if argv else "no method", f"one of {', '.join(METHODS)}")
    # Telemetry is off unless somebody asks for it; TRL sends it by default.
    os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        print(f"minimax-plugin train: {error}; pip install 'minimax-plugin[train]'", file=sys.stderr)
        return 2
    from minimax_plugin.cispo import CISPOConfig

    arguments = list(argv[1:])
    if arguments and not arguments[0].startswith("-"):
        if not Path(arguments[0]).is_file():
            return _wrong_usage(f"{arguments[0]} is no file", "a YAML file of settings")
        arguments.insert(0, "--config")
    parser = trl.TrlParser((TaskArguments, CISPOConfig, trl.ModelConfig), prog="minimax-plugin train cispo")
    try:
        task_arguments, config, model_arguments = parser.parse_args_and_config(arguments)
        train(task_arguments, config, model_arguments)
    except (ValueError, ImportError) as error:
        if logger.isEnabledFor(logging.DEBUG):
            raise
        print(f"minimax-plugin train: {error}", file=sys.stderr)
        return 1
    return 0


def train(tasks: TaskArguments, config: Any, model: Any) -> dict[str, Any]:
    """Train, evaluate before and after, and write model, summary and curves to ``config.output_dir``.

    Args:
        config: a ``CISPOConfig``.
        model: a TRL ``ModelConfig``.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ValueError: settings that do not fit together, before a model is loaded where that is possible.
    """
    from transformers import set_seed
    from trl import get_peft_config

    from minimax_plugin.cispo import CISPOTrainer
    from minimax_plugin.cispo.plots import plot_curves

    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is missing, expected a model directory or the name of a model")
    set_seed(config.seed)
    train_dataset, held_out, rewards = load_data(tasks)
    config.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision} | (
        config.model_init_kwargs or {}
    )
    if model.attn_implementation is not None:
        config.model_init_kwargs["attn_implementation"] = model.attn_implementation
    trainer = CISPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=rewards,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
    )
    before = trainer.evaluate() if held_out is not None else {}
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    after = trainer.evaluate() if held_out is not None else {}
    trainer.save_model()
    summary = _summary(trainer, tasks, before, after)
    if trainer.is_world_process_zero():
        output = Path(config.output_dir)
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        plot_curves(summary["log_history"], output / "curves.png")
        logger.info("wrote the model, summary.json and curves.png to %s", output)
        if "eval_reward" in before:
            print(f"held-out reward: {before['eval_reward']:.3f} before, {after['eval_reward']:.3f} after")
    return summary


def load_data(tasks: TaskArguments) -> tuple[Any, Any, list[Callable[..., Any]]]:
    """Training set, held-out set or None, and reward functions.

    Raises:
        ValueError: no source or several, a file that is absent, a reward that cannot be found.
    """
    from minimax_plugin.cispo.tasks import make_dataset, reasoning_gym_dataset

    sources = [name for name in ("tasks", "reasoning_gym", "dataset") if getattr(tasks, name)]
    if len(sources) != 1:
        raise ValueError(f"got {' and '.join(sources) or 'none'} of tasks, reasoning_gym and dataset, expected one")
    if tasks.reasoning_gym:
        data, reward = reasoning_gym_dataset(tasks.reasoning_gym, tasks.num_problems, seed=tasks.task_seed)
        extra = [name for name in tasks.reward_funcs if name != "correctness"]
        return data, None, [reward, *(_reward(name) for name in extra)]
    rewards = [_reward(name) for name in tasks.reward_funcs]
    if tasks.dataset:
        return _load_dataset(tasks.dataset), None, rewards
    if not 1 <= len(tasks.difficulty) <= 2:
        raise ValueError(f"difficulty is {tasks.difficulty}, expected one number, or the lowest and the highest")
    options: dict[str, Any] = {
        "difficulty": (tasks.difficulty[0], tasks.difficulty[-1]),
        "conversational": tasks.conversational,
    }
    names = tasks.tasks or []
    # Drawn first: which problems are held out then does not depend on how many are trained on.
    held_out = make_dataset(names, tasks.num_held_out, seed=tasks.task_seed, **options) if tasks.num_held_out else None
    exclude = held_out["prompt"] if held_out is not None else ()
    data = make_dataset(names, tasks.num_problems, seed=tasks.task_seed + 1, exclude=exclude, **options)
    return data, held_out, rewards


def machine() -> dict[str, Any]:
    """Processor, its number and the platform, for beside a measurement."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"platform": platform.platform(), "processor": processor, "cpus": os.cpu_count()}


def versions() -> dict[str, str | None]:
    """Versions of what takes part in training; None for what is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    vllm = metadata.packages_distributions().get("vllm", [])
    for name in ("minimax-plugin", "torch", "transformers", "trl", *dict.fromkeys(vllm)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _reward(name: str) -> Callable[..., Any]:
    from minimax_plugin.cispo import tasks

    own: dict[str, Callable[..., Any]] = {
        "correctness": tasks.correctness_reward,
        "format": tasks.format_reward,
        "math_verify": tasks.math_verify_reward,
    }
    if name in own:
        return own[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"reward_funcs has {name!r}, expected one of {', '.join(own)} or module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs has {name!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward_funcs has {name!r}, which is a {type(function).__name__}, expected a function")
    return cast(Callable[..., Any], function)


def _load_dataset(name: str) -> Any:
    from datasets import load_dataset

    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix in kinds:
        if not path.is_file():
            raise ValueError(f"dataset is {name!r}, and no such file exists")
        return load_dataset(kinds[path.suffix], data_files=name, split="train")
    return load_dataset(name, split="train")


def _summary(trainer: Any, tasks: TaskArguments, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    # Training starts a history of its own, so the first evaluation is not in it.
    history = [{"step": 0} | before, *trainer.state.log_history]
    accelerator = trainer.accelerator
    return {
        "updates": trainer.state.global_step,
        "held_out_before": before,
        "held_out_after": after,
        "train_runtime_seconds": next((row["train_runtime"] for row in history if "train_runtime" in row), None),
        "tasks": vars(tasks),
        "machine": machine() | {"device": str(accelerator.device), "processes": accelerator.num_processes},
        "versions": versions(),
        "log_history": history,
    }


def _wrong_usage(found: str, expected: str) -> int:
    print(f"usage: {USAGE}\nminimax-plugin train: {found}, expected {expected}", file=sys.stderr)
    return 2
