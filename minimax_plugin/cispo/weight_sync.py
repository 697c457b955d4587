# SPDX-License-Identifier: Apache-2.0
"""Weights of a trainer into a vLLM engine of the same process, exactly.

TRL hands each tensor to ``model.load_weights``. That skips what vLLM does to weights after loading: on a CPU it raises
(linear layers are packed), on a GPU it leaves experts in the wrong layout with some backends. ``reload_weights`` of the
model runner redoes that work layer by layer, except one step: experts that a kernel has packed on a CPU keep the
unpacked weights under a kernel that reads packed ones, without an error.

This is the only module that touches these parts of vLLM; :data:`SEEN` says with which releases.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

#: Oldest and newest vLLM whose engines were seen to give the same log-probabilities after a sync as transformers.
SEEN = ((0, 32), (0, 32))

#: Says once per sync and layer that tables which follow from the config, as those of rotary embeddings, did not come.
_RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def check_vllm_version(version: str) -> None:
    """Refuse a vLLM whose reload is too old, warn about one that was not seen.

    Raises:
        ImportError: vLLM is older than what was seen.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or version.startswith("0.1.dev"):
        logger.warning("cannot tell the release of vLLM %s; weight sync was seen exact with %s", version, _seen())
        return
    release = (int(match[1]), int(match[2]))
    if release < SEEN[0]:
        raise ImportError(
            f"vLLM is {version}, but syncing weights exactly needs {_seen()}: upgrade vLLM, or set use_vllm=False"
        )
    if release > SEEN[1]:
        logger.warning(
            "weight sync was seen exact with vLLM %s, this is %s; leave rollout_check on, it compares "
            "probabilities after the first sync",
            _seen(),
            version,
        )


def reload_weights(model_runner: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of an engine in place.

    Args:
        model_runner: of a worker in this process.
        weights: names as in a checkpoint or as transformers holds them in memory, in any order, full tensors of any
            floating dtype.

    Raises:
        RuntimeError: this vLLM cannot reload weights.
        ValueError: a parameter of the engine did not come.
    """
    if not hasattr(model_runner, "reload_weights"):
        raise RuntimeError(
            f"the model runner {type(model_runner).__name__} of this vLLM has no reload_weights; weight sync was seen "
            f"with vLLM {_seen()}"
        )
    model = model_runner.get_model()
    with _without_noise(), _requiring_all(model):
        model_runner.reload_weights(weights_iterator=weights)
    repack_experts(model)


def repack_experts(model: Any) -> int:
    """Pack the experts again as they were packed when the engine started; the number of expert layers.

    vLLM skips this step in weight updates (``UnquantizedFusedMoEMethod._setup_kernel``). Only the CPU kernels pack
    weights in it; those of GPUs have their layout from the step before, which is not skipped.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return 0
    count = 0
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)
            count += 1
    return count


@contextmanager
def _requiring_all(model: Any) -> Iterator[None]:
    """Raise ValueError for parameters that keep their old values, of which ``reload_weights`` only warns."""
    expected = {name for name, _ in model.named_parameters()}
    load = model.load_weights

    def load_and_check(weights: Iterable[tuple[str, Tensor]]) -> Any:
        loaded = load(weights)
        missing = sorted(expected - loaded) if loaded is not None else []
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(expected)} parameters of vLLM's {type(model).__name__} got no new weights: "
                f"{', '.join(missing[:5])}; the trained model lacks them or names them otherwise"
            )
        return loaded

    model.load_weights = load_and_check
    try:
        yield
    finally:
        del model.load_weights


@contextmanager
def _without_noise() -> Iterator[None]:
    def is_news(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in str(record.msg)

    noisy = logging.getLogger(_RELOAD_LOGGER)
    noisy.addFilter(is_news)
    try:
        yield
    finally:
        noisy.removeFilter(is_news)


def _seen() -> str:
    return " to ".join(dict.fromkeys(".".join(map(str, release)) for release in SEEN))
