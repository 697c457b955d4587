# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the vLLM tests: one cache folder, and a model built in this process without an engine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import tiny_config, write_checkpoint
from vllm_engine_process import COMMON_ENV

for _name, _value in COMMON_ENV.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for vLLM's caches, shared by all engines so that the registry inspects each class once."""
    return tmp_path_factory.mktemp("vllm-cache")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two lightning and two softmax layers. vLLM's CPU kernels want a hidden size divisible by 32."""
    config = tiny_config(hidden_size=64, attn_type_list=[0, 1, 0, 1], shared_intermediate_size=32)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", config)


@pytest.fixture(scope="session")
def distributed(vllm_cache: Path) -> Iterator[None]:
    """vLLM's process groups for a world of one, which every layer asks for its rank."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    os.environ["VLLM_CACHE_ROOT"] = str(vllm_cache)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{vllm_cache}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def tiny_config_of_vllm(tiny_checkpoint: Path, distributed: None) -> Any:
    """``VllmConfig`` for the tiny checkpoint."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(tiny_checkpoint), dtype="float32", enforce_eager=True, max_model_len=1024, skip_tokenizer_init=True
    ).create_engine_config()
    config.cache_config.mamba_block_size = 128
    return config


@pytest.fixture(scope="module")
def tiny_model(tiny_config_of_vllm: Any) -> Any:
    """The model on the tiny checkpoint's config, weights not loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(tiny_config_of_vllm):
        return initialize_model(vllm_config=tiny_config_of_vllm)
