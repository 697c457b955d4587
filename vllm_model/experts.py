# SPDX-License-Identifier: Apache-2.0
"""The block of routed experts, and the optional shared expert that runs beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from minimax_plugin.architecture import Architecture
from minimax_plugin.vllm_model.compat import FusedMoEFactory, GateLinear


class SparseExperts(nn.Module):
    """Softmax router in fp32, the top k experts renormalised, each ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, architecture: Architecture, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        parallel = vllm_config.parallel_config
        redundant = parallel.eplb_config.num_redundant_experts
        self.num_logical_experts = architecture.num_local_experts
        self.num_redundant_experts = redundant
        self.num_physical_experts = self.num_logical_experts + redundant
        self.num_local_physical_experts = self.num_physical_experts // get_ep_group().device_group.size()
        self.gate = GateLinear(
            architecture.hidden_size,
            architecture.num_local_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.experts = FusedMoEFactory(
            num_experts=architecture.num_local_experts,
            top_k=architecture.num_experts_per_tok,
            hidden_size=architecture.hidden_size,
            intermediate_size=architecture.intermediate_size,
            renormalize=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            enable_eplb=parallel.enable_eplb,
            num_redundant_experts=redundant,
            ckpt_names=("w1", "w2", "w3"),
            router_logits_dtype=torch.float32,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states, router_logits)

    def update_physical_experts(self, num_physical: int, num_local_physical: int) -> None:
        """Follow a change of the expert-parallel group (elastic expert parallelism)."""
        self.num_physical_experts = num_physical
        self.num_local_physical_experts = num_local_physical
        self.num_redundant_experts = num_physical - self.num_logical_experts
        self.experts.update_expert_map()


class SharedExpert(nn.Module):
    """A dense expert that every token passes through: ``down(silu(gate x) * up x)``."""

    def __init__(self, architecture: Architecture, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, width = architecture.hidden_size, architecture.shared_intermediate_size
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [width, width], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        gate, up = gate_up.chunk(2, dim=-1)
        output, _ = self.down_proj(functional.silu(gate) * up)
        return output


class SharedExpertCoefficient(ReplicatedLinear):
    """Weight of the shared expert for each token, in fp32 as in the released module."""

    def __init__(self, architecture: Architecture, prefix: str) -> None:
        super().__init__(architecture.hidden_size, 1, bias=False, params_dtype=torch.float32, prefix=prefix)
        self.mode = architecture.shared_moe_mode

    def mix(self, hidden_states: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """``(1 - c) * routed + c * shared``, ``c`` from the input of the block; all [T, hidden]."""
        logits, _ = self(hidden_states.float())
        coefficient = torch.sigmoid(logits) if self.mode == "sigmoid" else torch.softmax(logits, dim=-1)
        mixed = routed.float() * (1.0 - coefficient) + shared.float() * coefficient
        return mixed.to(hidden_states.dtype)
