# SPDX-License-Identifier: Apache-2.0
"""Every trainer of TRL takes the model as a folder and as an object, makes its own reference model, and trains."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import minimax_plugin  # noqa: F401  importing it registers the classes
from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

trl = pytest.importorskip("trl", reason="TRL is not installed; it comes with the train extra")
datasets = pytest.importorskip("datasets")

COMMON: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
CHOSEN = {"prompt": ["1+1=", "2+2="], "chosen": ["2", "4"], "rejected": ["3", "5"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trl") / "tiny"
    write_tiny_checkpoint(
        directory, TinyOptions(num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=16, rotary_dim=8)
    )
    return directory


def sft(model: Any, out: str) -> Any:
    args = trl.SFTConfig(out, **COMMON, max_length=32)
    return trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_dict({"text": ["1+1=2", "2+2=4"]}))


def dpo(model: Any, out: str) -> Any:
    args = trl.DPOConfig(out, **COMMON, max_length=32)
    return trl.DPOTrainer(model, args=args, train_dataset=datasets.Dataset.from_dict(CHOSEN))


def grpo(model: Any, out: str, beta: float = 0.0) -> Any:
    def count(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    args = trl.GRPOConfig(out, **COMMON, num_generations=2, max_completion_length=4, beta=beta)
    data = datasets.Dataset.from_dict({"prompt": CHOSEN["prompt"]})
    return trl.GRPOTrainer(model, reward_funcs=count, args=args, train_dataset=data)


def grpo_with_reference(model: Any, out: str) -> Any:
    return grpo(model, out, beta=0.1)


def reward(model: Any, out: str) -> Any:
    args = trl.RewardConfig(out, **COMMON, max_length=32)
    return trl.RewardTrainer(model, args, train_dataset=datasets.Dataset.from_dict(CHOSEN))


TRAINERS = [sft, dpo, grpo, grpo_with_reference, reward]


@pytest.mark.parametrize("by", ["path", "object"])
@pytest.mark.parametrize("make", TRAINERS, ids=lambda make: make.__name__)
def test_trainer_takes_the_model(tiny: Path, tmp_path: Path, make: Callable[[Any, str], Any], by: str) -> None:
    model: Any = str(tiny)
    if by == "object":
        auto_class = AutoModelForSequenceClassification if make is reward else AutoModelForCausalLM
        labels = {"num_labels": 1} if make is reward else {}
        model = auto_class.from_pretrained(tiny, dtype=torch.float32, **labels)
    trainer = make(model, str(tmp_path))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    result = trainer.train()
    assert type(trainer.model).__module__.startswith("minimax_plugin.")
    assert math.isfinite(result.training_loss)
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    reference: Any = getattr(trainer, "ref_model", None)
    if make is grpo_with_reference:
        assert type(reference).__module__.startswith("minimax_plugin.")
        assert all(torch.equal(before[name], parameter) for name, parameter in reference.named_parameters())


def test_empty_auto_map_is_not_saved(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.auto_map == {}
    model.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text(encoding="utf-8")
