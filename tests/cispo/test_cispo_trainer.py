# SPDX-License-Identifier: Apache-2.0
"""The trainer as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("model", ["m1", "qwen3"])
def test_updates_move_weights(model: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(model)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], after[name]) for name in before)
