# SPDX-License-Identifier: Apache-2.0
"""The shared expert beside the routed ones, and what vLLM's expert load balancer is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import set_current_vllm_config  # noqa: E402

from minimax_plugin.vllm_model.experts import SharedExpert, SharedExpertCoefficient  # noqa: E402


@pytest.mark.parametrize("mode", ["sigmoid", "softmax"])
def test_shared_expert_is_mixed_in_fp32(mode: str, tiny_model: Any) -> None:
    """Its share comes from the input of the block by a product in fp32, and the sum is rounded once."""
    architecture = replace(tiny_model.architecture, shared_moe_mode=mode)
    coefficient = SharedExpertCoefficient(architecture, prefix=f"coefficient.{mode}")
    weight = torch.randn(1, architecture.hidden_size) * 0.2
    _fill(coefficient, weight)
    hidden, routed, shared = (torch.randn(100, architecture.hidden_size).bfloat16() for _ in range(3))
    logits = hidden.double() @ weight.double().T
    # Of a single logit, as the released module takes it: the routed experts then count for nothing.
    share = logits.sigmoid() if mode == "sigmoid" else torch.ones_like(logits)
    expected = (routed.double() * (1 - share) + shared.double() * share).bfloat16()
    mixed = coefficient.mix(hidden, routed, shared)
    assert mixed.dtype == torch.bfloat16
    assert (mixed != expected).double().mean() <= 1e-2


def test_shared_expert_gates_with_its_first_projection(tiny_model: Any, tiny_config_of_vllm: Any) -> None:
    with set_current_vllm_config(tiny_config_of_vllm):
        expert = SharedExpert(tiny_model.architecture, tiny_config_of_vllm, prefix="expert")
    gate_up, down = torch.randn(64, 64) * 0.2, torch.randn(64, 32) * 0.2
    _fill(expert.gate_up_proj, gate_up)
    _fill(expert.down_proj, down)
    x = torch.randn(7, 64)
    gate, up = (x.double() @ part.double().T for part in gate_up.chunk(2))
    expected = (gate * gate.sigmoid() * up) @ down.double().T
    torch.testing.assert_close(expert(x).double(), expected, rtol=1e-4, atol=1e-4)


def _fill(layer: Any, weight: torch.Tensor) -> None:
    layer.weight.data.copy_(weight)
    layer.quant_method.process_weights_after_loading(layer)


def test_counts_follow_a_change_of_the_expert_parallel_group(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = tiny_model._expert_blocks()
    told: list[Any] = []
    for block in blocks:
        monkeypatch.setattr(block.experts, "update_expert_map", lambda: told.append(None), raising=False)
    names = ("num_physical_experts", "num_local_physical_experts", "num_redundant_experts")
    before = [getattr(tiny_model, name) for name in names]
    tiny_model.update_physical_experts_metadata(6, 3)
    for owner in (tiny_model, *blocks):
        assert [getattr(owner, name) for name in names] == [6, 3, 2]
    assert len(told) == len(blocks) == 4
    tiny_model.update_physical_experts_metadata(*before[:2])
    assert [getattr(tiny_model, name) for name in names] == before == [4, 4, 0]
