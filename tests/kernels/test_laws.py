# SPDX-License-Identifier: Apache-2.0
"""The laws of lightning attention on the PyTorch path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning_laws import Setting, parametrize_laws

SETTINGS = {
    "fp32": Setting(),
    "bf16": Setting(dtype=torch.bfloat16),
    "fp16": Setting(dtype=torch.float16),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@parametrize_laws()
def test_law(law: Callable[[Setting], None], setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "torch")
    law(setting)
