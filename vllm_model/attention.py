# SPDX-License-Identifier: Apache-2.0
"""The softmax attention layer: grouped-query attention with rotary embedding on the leading part of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from minimax_plugin.vllm_model.settings import ModelSettings


class SoftmaxAttention(nn.Module):
    """Softmax attention over vLLM's paged KV cache."""

    def __init__(self, settings: ModelSettings, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        architecture = settings.architecture
        tp_size = get_tensor_model_parallel_world_size()
        self.num_heads = architecture.num_attention_heads // tp_size
        self.num_kv_heads = max(1, architecture.num_key_value_heads // tp_size)
        self.head_dim = architecture.head_dim
        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            architecture.hidden_size,
            architecture.head_dim,
            architecture.num_attention_heads,
            architecture.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            architecture.num_attention_heads * architecture.head_dim,
            architecture.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        # The released config states 10,240,000 positions, whose table would take 2.6 GB.
        self.rotary_emb = get_rope(
            architecture.head_dim,
            max_position=min(settings.max_position, vllm_config.model_config.max_model_len),
            rope_parameters=settings.rope_parameters,
            dtype=torch.float32,
        )
        self.attn = Attention(
            self.num_heads,
            architecture.head_dim,
            architecture.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` [T], ``hidden_states`` [T, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        widths = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = qkv.split(widths, dim=-1)
        # Rotated in fp32 and rounded once, as the released module does. Handed a bf16 query, vLLM would round its table
        # of cosines to bf16 for good.
        q_rotated, k_rotated = self.rotary_emb(positions, q.float(), k.float())
        output, _ = self.o_proj(self.attn(q_rotated.to(q.dtype), k_rotated.to(k.dtype), v))
        return output
