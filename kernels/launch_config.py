# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched, and what a kernel module tells the compile gate: every form that it launches.

Each kernel module has ``launch_configs(architecture) -> list[LaunchConfig]``, built from the same table that its host
functions launch from, so that ``scripts/compile_gate.py`` compiles what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Names of the architectures the fixed launch tables are made for.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Options of every launch. Contracting a product and a sum into one rounding is Triton's default up to 3.9 only; said
#: explicitly, the bits stay the same with the releases after it.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of the tensors. Triton takes the current one, and with the layers of a model spread over
    several GPUs that is another: the launch then fails, or runs beside the stream that its tensors belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled form of a kernel.

    Attributes:
        name: shown in the gate's table, unique within an architecture, for instance ``"decode bf16 sumsq"``.
        kernel: the function decorated with ``triton.jit``.
        arguments: the run-time arguments by name: a torch dtype for a pointer, an integer typical of the launch (Triton
            specialises on 1 and on multiples of 16), None for an absent pointer.
        constants: the ``tl.constexpr`` arguments by name.
        num_warps, num_stages: as launched.
        matrix_units: the kernel multiplies tiles of at least 64 rows in bf16; the gate asks for wgmma on sm_90.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, torch.dtype | int | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    matrix_units: bool = False
