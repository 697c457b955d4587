# SPDX-License-Identifier: Apache-2.0
"""Tiny models on disk, prompts, a reward and a factory of trainers, shared by the tests of the trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl: pip install 'minimax-plugin[train]'")

from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint
from minimax_plugin.cli.tiny_tokenizer import MIN_VOCAB_SIZE

VOCAB_SIZE = MIN_VOCAB_SIZE + 32

#: What every trainer of the tests has unless it says otherwise: fp32 on a CPU, four completions of up to eight tokens
#: per prompt, nothing written but checkpoints.
DEFAULTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 2,
}


@pytest.fixture(scope="session")
def tiny_m1_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniMax-M1 of two lightning and two softmax layers with four experts, and its tokenizer.

    The sizes suit vLLM's CPU kernels, which want multiples of 32.
    """
    path = tmp_path_factory.mktemp("tiny") / "m1"
    options = TinyOptions(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rotary_dim=16,
        vocab_size=VOCAB_SIZE,
        attn_type_list=(0, 1, 0, 1),
        max_position_embeddings=1024,
    )
    write_tiny_checkpoint(path, options)
    return path


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tiny_m1_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of another family, with the tokenizer of the tiny M1."""
    path = tmp_path_factory.mktemp("tiny") / "qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_m1_dir / name, path / name)
    saved = json.loads((path / "config.json").read_text())
    special = json.loads((path / "generation_config.json").read_text())
    (path / "config.json").write_text(json.dumps(saved | special))
    return path


@pytest.fixture(scope="session")
def ragged_m1_dir(tiny_m1_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny M1 with every eighth token ending a completion, so that completions differ in length."""
    path = tmp_path_factory.mktemp("tiny") / "ragged"
    shutil.copytree(tiny_m1_dir, path)
    file = path / "generation_config.json"
    special = json.loads(file.read_text())
    ends = [special["eos_token_id"], *range(3, MIN_VOCAB_SIZE - 32, 8)]
    file.write_text(json.dumps(special | {"eos_token_id": ends}))
    return path


@pytest.fixture
def model_dirs(tiny_m1_dir: Path, ragged_m1_dir: Path, tiny_qwen3_dir: Path) -> dict[str, Path]:
    return {"m1": tiny_m1_dir, "ragged": ragged_m1_dir, "qwen3": tiny_qwen3_dir}


@pytest.fixture
def prompts() -> Dataset:
    """Sixteen prompts of different lengths and a column that rewards can use."""
    words = ["river", "12 names", "a", "the old stone bridge", "rain falls", "one, two", "what do you see", "snow"]
    texts = [f"{a} {b}" for a in words[:4] for b in words[4:]]
    return Dataset.from_dict({"prompt": texts, "number": list(range(len(texts)))})


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even token ids: differs between most completions of an untrained model."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


MakeTrainer = Callable[..., Any]


@pytest.fixture
def make_trainer(model_dirs: dict[str, Path], prompts: Dataset, tmp_path: Path) -> MakeTrainer:
    """``make_trainer(model="m1", reward=..., dataset=..., trainer_class=..., init={}, **config)``.

    ``model`` is "m1", "ragged", "qwen3", a path or a model; ``init`` holds further arguments of the trainer,
    ``config`` those of its configuration, which is a ``CISPOConfig`` unless the trainer is TRL's.
    """
    from trl import GRPOConfig

    from minimax_plugin.cispo import CISPOConfig, CISPOTrainer

    def make(
        model: Any = "m1",
        *,
        reward: Any = even_share,
        dataset: Dataset | None = None,
        trainer_class: type = CISPOTrainer,
        init: dict[str, Any] | None = None,
        **config: Any,
    ) -> Any:
        config_class = CISPOConfig if issubclass(trainer_class, CISPOTrainer) else GRPOConfig
        values = DEFAULTS | {"output_dir": str(tmp_path / "out")} | config
        if isinstance(model, str | Path):
            model = str(model_dirs.get(str(model), model))
        return trainer_class(
            model=model,
            reward_funcs=reward,
            args=config_class(**values),
            train_dataset=prompts if dataset is None else dataset,
            **(init or {}),
        )

    return make


@pytest.fixture
def tokenizer(tiny_m1_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_m1_dir, padding_side="left")
