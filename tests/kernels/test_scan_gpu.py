# SPDX-License-Identifier: Apache-2.0
"""The scan kernels compiled for the GPU at hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm device", allow_module_level=True)

from scan_cases import *  # noqa: E402, F403

pytestmark = pytest.mark.gpu
