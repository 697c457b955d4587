# SPDX-License-Identifier: Apache-2.0
"""The modules of a MiniMax-M1 layer: norms, rotary embedding, both kinds of attention, router, experts, LM head.

Shapes: ``B`` batch, ``T`` tokens, ``P`` tokens without padding, ``H`` heads, ``D`` head_dim, ``R`` rotary_dim, ``E``
experts, ``K`` experts per token.

Roundings follow the released module: norms and rotations are computed in fp32 and rounded to the dtype of their input.
Three things are fp32 whatever the dtype of the model: the decay slopes, the recurrent state and the router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minimax_plugin.architecture import LIGHTNING_NORM_EPS, lightning_slopes
from minimax_plugin.hf_modeling.batch import LightningBatch
from minimax_plugin.hf_modeling.compat import use_experts_implementation
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.parallel import HeadShard
from minimax_plugin.kernels import ops


class MiniMaxM1RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dim, computed in fp32, rounded before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        widened = hidden_states.float()
        normed = widened * torch.rsqrt(widened.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class MiniMaxM1GatedRMSNorm(MiniMaxM1RMSNorm):
    """The norm over all heads of a lightning layer, times ``sigmoid(gate)``.

    A module of its own so that hooks which bring in offloaded weights see the call. ``head_shard`` is set where the
    heads are split over ranks; the inputs then hold the channels of this rank only.
    """

    head_shard: HeadShard | None = None

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if self.head_shard is None:
            return ops.gated_rmsnorm(hidden_states, gate, self.weight, self.eps)
        shard = self.head_shard
        weight = shard.take(shard.share_gradient(self.weight))
        sumsq = shard.sum(hidden_states.float().square().sum(-1))
        norm_size = self.weight.shape[0]
        return ops.gated_rmsnorm(hidden_states, gate, weight, self.eps, sumsq=sumsq, norm_size=norm_size)


class MiniMaxM1RotaryEmbedding(nn.Module):
    """cos and sin ``[B, T, R]`` in fp32 of the first ``rotary_dim`` dimensions of each head.

    The class name ends in ``RotaryEmbedding`` and the buffers have these names because transformers recognises by them
    the buffers that it must compute anew when it loads a model from the meta device.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_functions = {"default": self.compute_default_rope_parameters} | ROPE_INIT_FUNCTIONS
        inv_freq, self.attention_scaling = rope_functions[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MiniMaxM1Config, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """Inverse frequencies [R / 2] fp32 and the factor of cos and sin (1)."""
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=device).float() / config.rotary_dim
        return 1.0 / (config.rope_theta**exponents), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MiniMaxM1RotaryEmbedding:
        # Frequencies rounded to bf16 are off by up to 0.4 %, which turns a head by a radian after 250 tokens.
        return super()._apply(_without_narrowing(fn), recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type=x.device.type, enabled=False):
            angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class MiniMaxM1Attention(nn.Module):
    """Grouped-query softmax attention with a partial rotary embedding."""

    def __init__(self, config: MiniMaxM1Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        inner, kv_inner = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MiniMaxM1LightningAttention(nn.Module):
    """Lightning attention: no mask, no position embedding, one state [H, D, D] per sequence."""

    def __init__(self, config: MiniMaxM1Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.norm = MiniMaxM1GatedRMSNorm(inner, eps=LIGHTNING_NORM_EPS)
        # Plain numbers: a buffer would follow the model into bf16, where most late layers round to no decay at all.
        self.slope_values = lightning_slopes(config.num_attention_heads, layer_idx, config.num_hidden_layers)
        self._slopes: dict[torch.device, Tensor] = {}

    def forward(
        self,
        hidden_states: Tensor,
        lightning_batch: LightningBatch,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        qkv = self.qkv_proj(hidden_states)
        qkv = qkv.view(*qkv.shape[:-1], -1, 3 * self.head_dim)
        slopes = self.slopes(qkv.device)
        lightning_batch = lightning_batch.to(qkv.device)
        if past_key_values is not None:
            output = past_key_values.layers[self.layer_idx].attend(qkv, slopes, lightning_batch)
        else:
            output, _ = ops.lightning_attention_packed(lightning_batch.pack(qkv), slopes, plan=lightning_batch.plan)
            output = lightning_batch.unpack(output)
        return self.out_proj(self.norm(output.flatten(-2), self.output_gate(hidden_states))), None

    def slopes(self, device: torch.device) -> Tensor:
        """Decay slopes of this rank's heads [H] fp32 on ``device``."""
        if device in self._slopes:
            return self._slopes[device]
        values = self.norm.head_shard.take(self.slope_values) if self.norm.head_shard else self.slope_values
        if torch.compiler.is_compiling():
            # A tensor made while tracing belongs to the trace and must not be kept.
            return torch.tensor(values, dtype=torch.float32, device=device)
        with torch.inference_mode(False):  # One made in that mode could not be kept for a later backward.
            self._slopes[device] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._slopes[device]


class MiniMaxM1TopKRouter(nn.Module):
    """Softmax over all experts, top K, renormalised; weight and arithmetic in fp32.

    A bf16 router picks other experts for about 1 % of the tokens, so the weight stays fp32 through ``.to(dtype)``.
    """

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[P, hidden]`` -> logits [P, E] fp32, weights [P, K] fp32, expert indices [P, K]."""
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            weights, indices = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
            return logits, weights / weights.sum(dim=-1, keepdim=True), indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MiniMaxM1TopKRouter:
        return super()._apply(_without_narrowing(fn), recurse)


@use_experts_implementation
class MiniMaxM1Experts(nn.Module):
    """All experts of a layer as two tensors; transformers swaps in a grouped matmul where it has one.

    ``gate_up_proj`` [E, 2 * inter, hidden] stacks w1 (gate) on w3 (up), ``down_proj`` [E, hidden, inter] is w2.
    """

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[P, hidden]`` with [P, K] expert indices and weights -> [P, hidden]; index E means an expert elsewhere."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            expert_output = expert_output * top_k_weights[token, place, None]
            output.index_add_(0, token, expert_output.to(output.dtype))
        return output


class MiniMaxM1SparseMoeBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.jitter_noise = config.router_jitter_noise
        self.gate = MiniMaxM1TopKRouter(config)
        self.experts = MiniMaxM1Experts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, weights, indices = self.gate(hidden_states)
        return self.experts(hidden_states, indices, weights).reshape(shape)


class MiniMaxM1SharedMLP(nn.Module):
    """The shared expert; its three projections go by the names of the released module."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.shared_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.shared_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.shared_intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MiniMaxM1SharedCoefficient(nn.Linear):
    """Share of the shared expert in the output, [..., 1] fp32, from a product in fp32."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__(config.hidden_size, 1, bias=False)
        self.mode = config.shared_moe_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            return torch.softmax(logits, dim=-1) if self.mode == "softmax" else torch.sigmoid(logits)


class MiniMaxM1LMHead(nn.Linear):
    """Logits; in fp32 from lower-precision weights unless ``config.head_dtype`` is "model".

    Logits rounded to bf16 are one cause of lost words with the released weights, and of log-probabilities that differ
    between training and serving.
    """

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.widen = config.head_dtype == "float32"

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.widen or self.weight.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(hidden_states)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())


def _without_narrowing(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``Module._apply``, but what it would round to 16 bits is only moved."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.dtype != tensor.dtype and moved.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(moved.device) if narrowed and not moved.is_meta else moved

    return move


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of ``x`` [B, H, T, D] in fp32 by ``cos`` and ``sin`` [B, T, R]; the rest passes."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, passed = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated.to(x.dtype), passed], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns its weights [B, H, T, S]; the output is [B, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
