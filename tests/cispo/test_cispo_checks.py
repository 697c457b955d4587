# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one message, before a model is loaded where that is possible."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minimax_plugin.cispo import CISPOTrainer

MakeTrainer = Callable[..., Any]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before the first weight is read."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", refuse)


def edited(source: Path, target: Path, **values: Any) -> Path:
    """A copy of a model folder with other values in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def needs_answer(completions: list[str], answer: list[str], hint: str = "", **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.usefixtures("no_loading")
def test_missing_columns(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"columns \['question'\], expected one named 'prompt'"):
        make_trainer(dataset=Dataset.from_dict({"question": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"'needs_answer' needs the columns \['answer'\].*\['number', 'prompt'\]"):
        make_trainer(reward=needs_answer)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("option", [{"zero_variance": "refill"}, {"retire_solved_at": 0.9}])
def test_streams_cannot_be_drawn_from(option: dict[str, Any], make_trainer: MakeTrainer, prompts: Dataset) -> None:
    with pytest.raises(ValueError, match="draw prompts by index, which an IterableDataset does not allow"):
        make_trainer(dataset=prompts.to_iterable_dataset(), **option)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_adapter_on_the_head(targets: Any, make_trainer: MakeTrainer) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="the adapter covers lm_head.*leave lm_head out"):
        make_trainer(init={"peft_config": peft.LoraConfig(target_modules=targets)})
    with pytest.raises(ValueError, match="the adapter covers lm_head"):
        make_trainer(init={"peft_config": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])})


def test_other_adapters_train(make_trainer: MakeTrainer) -> None:
    peft = pytest.importorskip("peft")
    trainer = make_trainer(
        "qwen3", max_steps=1, beta=0.1, init={"peft_config": peft.LoraConfig(target_modules="all-linear")}
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_no_reference_to_compare_with(make_trainer: MakeTrainer) -> None:
    config = Qwen3Config(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="beta is 0.1, which needs a reference model"):
        make_trainer(Qwen3ForCausalLM(config), beta=0.1)


@pytest.mark.usefixtures("no_loading")
def test_tied_head_in_fp32(make_trainer: MakeTrainer, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    tied = edited(tiny_qwen3_dir, tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings.*set cast_lm_head_to_fp32=False"):
        make_trainer(tied)


@pytest.mark.usefixtures("no_loading")
def test_continuous_batching_of_lightning_layers(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"use_transformers_continuous_batching is True.*\['linear_attention'\]"):
        make_trainer("m1", use_transformers_continuous_batching=True)


@pytest.mark.usefixtures("no_loading")
def test_arguments_of_trl_alone(tiny_m1_dir: Path, prompts: Dataset, tmp_path: Path) -> None:
    from trl import GRPOConfig

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args is a GRPOConfig, expected a CISPOConfig"):
        CISPOTrainer(str(tiny_m1_dir), lambda **kwargs: [], args, prompts)


def test_a_load_balancing_loss_of_the_config_is_announced(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="minimax_plugin.cispo"):
        trainer = make_trainer(router_aux_loss_coef=None)
    assert trainer.router_aux_loss_coef == 0.001 and "config's 0.001 is used" in caplog.text
    assert make_trainer().aux_loss_enabled is False


# Rewards


@pytest.mark.parametrize(
    "result, message",
    [
        ([0.0] * 7, "reward function 'reward' returned 7 rewards for 8 completions"),
        ([0.0] * 3 + [math.nan] + [0.0] * 4, "'reward' returned nan for completion 3, expected a finite number"),
        ([math.inf] + [0.0] * 7, "'reward' returned inf for completion 0"),
        (["good"] * 8, "'reward' returned 'good' for completion 0"),
        (0.5, "'reward' returned 0.5, expected a list of 8 rewards"),
    ],
    ids=["count", "nan", "inf", "text", "number"],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
def test_rewards_that_are_none(result: Any, message: str, is_async: bool, make_trainer: MakeTrainer) -> None:

    def reward(**kwargs: Any) -> Any:
        return result

    async def later(**kwargs: Any) -> Any:
        return result

    later.__name__ = "reward"
    with pytest.raises(ValueError, match=message):
        make_trainer("qwen3", reward=later if is_async else reward).train()


class NanModel(nn.Module):
    """A reward model that gives NaN."""

    config = Qwen3Config(name_or_path="judge")

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return type("Output", (), {"logits": torch.full((len(input_ids), 1), math.nan)})


def test_reward_model_that_gives_nan(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer("qwen3", reward=NanModel(), init={"reward_processing_classes": [tokenizer]})
    with pytest.raises(ValueError, match="reward model 'judge' returned"):
        trainer.train()


def test_none_means_not_applicable(make_trainer: MakeTrainer) -> None:
    """As in TRL: the other function decides, and a completion without any reward has no advantage."""

    def first(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0, None, 0.0, None] * (len(completions) // 4)

    def second(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None, 1.0, None, None] * (len(completions) // 4)

    trainer = make_trainer("qwen3", reward=[first, second], max_steps=1)
    batches: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        batches.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    (batch,) = batches
    high, low = 1 / 3 / (math.sqrt(1 / 3) + 1e-4), -2 / 3 / (math.sqrt(1 / 3) + 1e-4)
    assert sorted(batch["advantages"].tolist()) == pytest.approx(sorted([high, high, low, 0.0] * 2), abs=1e-6)


def test_a_model_in_memory_trains_without_reference(
    make_trainer: MakeTrainer, tiny_qwen3_dir: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    trainer = make_trainer(model, max_steps=1, init={"processing_class": tokenizer})
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.ref_model is None
