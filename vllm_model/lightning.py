# SPDX-License-Identifier: Apache-2.0
"""The lightning attention layer: projections, the operator around the recurrent state, norm over all heads and gate.

Shapes: ``T`` tokens of the step, ``H`` heads of this rank, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.v1.attention.backend import AttentionBackend

from minimax_plugin.architecture import LIGHTNING_NORM_EPS
from minimax_plugin.kernels import ops
from minimax_plugin.state_cache import StatePool
from minimax_plugin.vllm_model import compat
from minimax_plugin.vllm_model.compat import MambaAttentionBackendEnum, MambaBase
from minimax_plugin.vllm_model.metadata import NULL_SLOT, LateDecodes, LightningBackend, LightningMetadata
from minimax_plugin.vllm_model.settings import ModelSettings


class LightningAttention(nn.Module, MambaBase):
    """``out_proj(sigmoid(gate(x)) * norm(lightning(silu(qkv(x)))))`` with the state in vLLM's block pool.

    The checkpoint's ``qkv_proj`` is called ``in_proj`` here: the softmax layers pack q, k and v under ``qkv_proj``, and
    vLLM's LoRA and quantization code tells packed from plain modules by that name alone. Its rows are laid out head by
    head (q, k, v of one head together), so splitting rows over the ranks splits heads.
    """

    kv_cache: tuple[Tensor, ...]

    def __init__(self, settings: ModelSettings, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        architecture = settings.architecture
        tp_size = get_tensor_model_parallel_world_size()
        self.prefix = prefix
        self.vllm_config = vllm_config
        self.num_heads = architecture.num_attention_heads // tp_size
        self.head_dim = architecture.head_dim
        self.state_shape = architecture.state_shape(tp_size=tp_size)
        inner = architecture.num_attention_heads * architecture.head_dim

        quant_config = vllm_config.quant_config
        self.in_proj = ColumnParallelLinear(
            architecture.hidden_size, 3 * inner, bias=False, quant_config=quant_config, prefix=f"{prefix}.in_proj"
        )
        self.output_gate = ColumnParallelLinear(
            architecture.hidden_size, inner, bias=False, quant_config=quant_config, prefix=f"{prefix}.output_gate"
        )
        self.out_proj = RowParallelLinear(
            inner, architecture.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )
        self.norm = HeadsRMSNorm(inner)

        # A non-persistent buffer: sleep level 2 saves and restores buffers only, and a weight reload leaves buffers
        # alone that no checkpoint can hold.
        slopes = architecture.slopes(layer_idx, tp_rank=get_tensor_model_parallel_rank(), tp_size=tp_size)
        self.slopes: Tensor
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32), persistent=False)

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix!r}")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LightningBackend

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return (self.state_shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take this layer's view of the block pool; blocks may be padded and are never made contiguous.

        Raises:
            ValueError: ``--prefix-match-unit`` is set and vLLM would copy part of a block without its keys and values.
        """
        if compat.hits_parts_of_blocks(self.vllm_config) and not compat.copies_whole_pages(kv_cache):
            unit = self.vllm_config.cache_config.prefix_match_unit
            raise ValueError(
                f"--prefix-match-unit {unit} would give wrong tokens for this model: a lightning state takes "
                f"{kv_cache[0].numel()} of the {kv_cache.stride(0)} bytes of a block, and this vLLM copies only those "
                "when a sequence goes on from a part of a block; leave the option out"
            )
        super().bind_kv_cache(kv_cache)

    @property
    def state_pool(self) -> StatePool:
        """The states of this layer. Made anew each time: kept, it would hold on to memory that vLLM takes back.

        vLLM profiles CUDA graphs over a small pool and resets ``kv_cache`` of its layers before it allocates the real
        one.
        """
        return StatePool(self.kv_cache[0], null_slot=NULL_SLOT)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``; rows of padding tokens come out finite."""
        qkv, _ = self.in_proj(hidden_states)
        gate, _ = self.output_gate(hidden_states)
        num_tokens = hidden_states.shape[0]
        out = torch.empty((num_tokens, self.num_heads, self.head_dim), dtype=qkv.dtype, device=qkv.device)
        sumsq = torch.empty((num_tokens, self.num_heads), dtype=torch.float32, device=qkv.device)
        torch.ops.minimax_plugin.lightning_layer(qkv, out, sumsq, self.prefix)
        normed = self.norm(out.flatten(1), gate, sumsq)
        output, _ = self.out_proj(normed)
        return output

    def attend(self, qkv: Tensor, out: Tensor, sumsq: Tensor, metadata: LightningMetadata) -> None:
        """Run the kernels over the rows of a step, decodes first.

        Args:
            qkv: [T, H, 3D], per head q, k, v before the activation.
            out: [T, H, D], written; rows past those of the step (padding of a captured graph) become zero.
            sumsq: [T, H] fp32, written with the sums of squares of ``out``.
        """
        pool = self.state_pool
        num_decode_tokens = 0
        if metadata.num_decodes:
            num_decode_tokens = self._decode(pool, qkv, out, sumsq, metadata)
        stop = num_decode_tokens
        if metadata.plan is not None:
            stop += metadata.num_prefill_tokens
            rows = slice(num_decode_tokens, stop)
            pool.prefill(
                qkv[rows],
                self.slopes,
                metadata.state_indices_tensor_p,
                metadata.has_initial_states_p,
                metadata.plan,
                out=out[rows],
                sumsq=sumsq[rows],
            )
            if metadata.late_decodes is not None:
                self._decode_late(pool, qkv[rows], out[rows], sumsq[rows], metadata.late_decodes)
        out[stop:] = 0
        sumsq[stop:] = 0

    def _decode(self, pool: StatePool, qkv: Tensor, out: Tensor, sumsq: Tensor, metadata: LightningMetadata) -> int:
        """Run the decode rows and return the number of their tokens."""
        slots = metadata.state_indices_tensor_d
        if metadata.read_slots_d is None:
            # One token per row; a captured batch has padding rows, which point to the null block.
            stop = min(slots.shape[0], qkv.shape[0])
            pool.decode(qkv[:stop], self.slopes, slots[:stop, 0], out=out[:stop], sumsq=sumsq[:stop])
            return stop
        stop = metadata.num_decode_tokens
        pool.verify(
            qkv[:stop],
            self.slopes,
            metadata.read_slots_d,
            slots,
            metadata.query_start_loc_d,
            out=out[:stop],
            sumsq=sumsq[:stop],
        )
        return stop

    def _decode_late(self, pool: StatePool, qkv: Tensor, out: Tensor, sumsq: Tensor, late: LateDecodes) -> None:
        part_out = out.new_empty((late.tokens.shape[0], *out.shape[1:]))
        part_sumsq = sumsq.new_empty((late.tokens.shape[0], *sumsq.shape[1:]))
        pool.verify(
            qkv[late.tokens],
            self.slopes,
            late.read_slots,
            late.write_slots,
            late.cu_seqlens,
            out=part_out,
            sumsq=part_sumsq,
        )
        out[late.tokens] = part_out
        sumsq[late.tokens] = part_sumsq


class HeadsRMSNorm(nn.Module):
    """RMSNorm over all heads of a lightning layer, followed by the gate; heads are split over the ranks.

    The epsilon is the released module's class default of 1e-6 and not ``rms_norm_eps``.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.tp_size = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(size // self.tp_size), requires_grad=False)
        self.weight.weight_loader = self.weight_loader  # type: ignore[attr-defined]

    @staticmethod
    def weight_loader(param: nn.Parameter, loaded_weight: Tensor) -> None:
        """Copy this rank's share. vLLM's layerwise reload finds the first argument by the name ``param``.

        Raises:
            ValueError: the loaded tensor does not have one value per channel of all heads.
        """
        local = param.shape[0]
        expected = (local * get_tensor_model_parallel_world_size(),)
        if tuple(loaded_weight.shape) != expected:
            raise ValueError(
                f"the norm weight of a lightning layer has shape {tuple(loaded_weight.shape)}, expected {expected}"
            )
        start = get_tensor_model_parallel_rank() * local
        param.data.copy_(loaded_weight[start : start + local])

    def forward(self, out: Tensor, gate: Tensor, sumsq: Tensor) -> Tensor:
        """``out`` and ``gate`` [T, H * D], ``sumsq`` [T, H] fp32 of this rank's heads."""
        # One number per token in one dimension: tensors of two dimensions go through FlashInfer's all-reduce, whose one
        # workspace is laid out for the 16-bit activations and gives wrong sums for fp32.
        total = sumsq.sum(-1)
        if self.tp_size > 1:
            total = tensor_model_parallel_all_reduce(total)
        return ops.gated_rmsnorm(out, gate, self.weight, LIGHTNING_NORM_EPS, sumsq=total, norm_size=self.size)


@compat.eager_during_capture
def lightning_layer(qkv: torch.Tensor, out: torch.Tensor, sumsq: torch.Tensor, layer_name: str) -> None:
    """Body of the operator that compiled graphs split around: its metadata changes with every step.

    Args:
        qkv: [T, 3 * H * D] projection output, before the activation.
        out: [T, H, D], written.
        sumsq: [T, H] fp32, written.
        layer_name: key of the layer in the forward context.
    """
    metadata = compat.layer_metadata(layer_name)
    if metadata is None:
        out.zero_()
        sumsq.zero_()
        return
    layer = compat.layer_by_name(layer_name)
    layer.attend(qkv.view(qkv.shape[0], layer.num_heads, 3 * layer.head_dim), out, sumsq, metadata)


def _fake_lightning_layer(qkv: torch.Tensor, out: torch.Tensor, sumsq: torch.Tensor, layer_name: str) -> None:
    return None


#: Keeps the operator alive: it lives as long as the library object.
_LIBRARY = torch.library.Library(compat.LIGHTNING_OP.split("::")[0], "FRAGMENT")
compat.register_custom_op(
    compat.LIGHTNING_OP.split("::")[1],
    lightning_layer,
    mutates=["out", "sumsq"],
    fake=_fake_lightning_layer,
    library=_LIBRARY,
)
