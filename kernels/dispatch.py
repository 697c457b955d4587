# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a tensor: the Triton kernels or plain PyTorch."""

from __future__ import annotations

import functools
import logging
import os

import torch

from minimax_plugin.kernels import lightning

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "MINIMAX_LIGHTNING_BACKEND"

BACKENDS = ("auto", "torch", "triton")


def lightning_backend(device: torch.device) -> str:
    """Backend that serves tensors on ``device``: "triton" or "torch".

    CUDA and ROCm devices get the Triton kernels where Triton is installed, everything else the chunk loop of
    :mod:`minimax_plugin.kernels.reference`. ``MINIMAX_LIGHTNING_BACKEND=torch|triton`` forces one; empty is unset.

    Raises:
        RuntimeError: the variable forces the kernels where they cannot run.
        ValueError: the variable holds another word.
    """
    forced = os.environ.get(BACKEND_VARIABLE) or "auto"
    if forced not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE} is {forced!r}, expected 'auto', 'torch' or 'triton'")
    if forced == "torch":
        return "torch"
    on_gpu = device.type == "cuda"
    if forced == "triton":
        if not lightning.HAS_TRITON:
            raise RuntimeError(
                f"{BACKEND_VARIABLE}=triton, but Triton cannot be imported; install triton or unset the variable"
            )
        if not on_gpu and not lightning.interpreted():
            raise RuntimeError(
                f"{BACKEND_VARIABLE}=triton, but the tensors are on {device}, expected a CUDA or ROCm device; unset "
                "the variable, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels (slow)"
            )
        return "triton"
    if not on_gpu:
        return "torch"
    if lightning.HAS_TRITON:
        return "triton"
    _warn_without_triton()
    return "torch"


@functools.cache
def _warn_without_triton() -> None:
    logger.warning(
        "Triton is not installed: lightning attention runs on the GPU in plain PyTorch, many times slower; "
        "install triton"
    )
