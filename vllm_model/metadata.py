# SPDX-License-Identifier: Apache-2.0
"""Attention backend and metadata builder of the lightning layers.

vLLM builds the metadata of a step once and shares it between layers; what a kernel needs is prepared here from host
data, so that no layer reads anything back from the device.

Shapes: ``R`` rows (requests) of the step, decodes first; ``P`` rows that prefill; ``K`` draft tokens of speculative
decoding; ``S`` state slots. Slot 0 is vLLM's null block: never allocated, and padding rows point to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from minimax_plugin.kernels.ops import LightningPlan
from minimax_plugin.vllm_model import compat
from minimax_plugin.vllm_model.compat import Mamba2AttentionMetadata, Mamba2AttentionMetadataBuilder

#: vLLM's null block.
NULL_SLOT = 0


@dataclass(frozen=True)
class DraftedPrompts:
    """Prompts of one token that the scheduler padded with K placeholder drafts, somewhere among the prefill rows.

    Attributes:
        tokens: [M * (1 + K)] int64, their tokens, counted from the first prefill token of the step.
        cu_seqlens: [M + 1] int32, bounds of the rows within ``tokens``.
        read_slots: [M] int32, all null: such a row starts from zeros.
        write_slots: [M, 1 + K] int32, where the state after each of its tokens goes.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    read_slots: Tensor
    write_slots: Tensor


@dataclass
class LightningMetadata(Mamba2AttentionMetadata):
    """What vLLM prepares for Mamba2, and what a lightning layer needs in addition.

    Attributes:
        plan: segments of the prefill tokens, counted from the first prefill token; None without prefill rows.
        read_slots_d: [decodes] int32, the slot each decode row continues from under speculative decoding; None
            otherwise, when a row reads and writes the same slot.
        fresh_rows: rows that decode although they have no state yet; their slots are cleared before the layers run.
        drafted_prompts: see :class:`DraftedPrompts`.
    """

    plan: LightningPlan | None = None
    read_slots_d: Tensor | None = None
    fresh_rows: Tensor | None = None
    drafted_prompts: DraftedPrompts | None = None


class LightningBackend(AttentionBackend):
    """Names the builder; the layers run their kernels themselves."""

    @staticmethod
    def get_name() -> str:
        return "MINIMAX_LIGHTNING"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("lightning layers run their kernels themselves")

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        return LightningMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class LightningMetadataBuilder(Mamba2AttentionMetadataBuilder):
    """Decode/prefill split, persistent buffers for CUDA graphs and state slots from vLLM's builder for Mamba2.

    It must derive from exactly that builder: both model runners hand the counts of accepted tokens only to the classes
    in a list, and with another base speculative decoding continues from the wrong state without an error.
    """

    metadata_cls = LightningMetadata
    needs_causal_conv1d_metadata = False

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if compat.forgets_accepted_drafts(vllm_config):
            raise ValueError(
                "speculative decoding would give wrong tokens here: Model Runner V1 of this vLLM forgets how many "
                "drafts were accepted when a step has none; upgrade to vLLM 0.32 or leave --speculative-config out"
            )
        self._layers = vllm_config.compilation_config.static_forward_context
        if self.use_spec_decode:
            # A captured graph keeps the address it was captured with.
            self._read_slots = torch.zeros(self.decode_cudagraph_max_bs, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Full graphs for decode batches, with drafts only under Model Runner V2.

        Model Runner V1 replays a decode graph for any batch of the right shape, prompts of 1 + K tokens included, whose
        state would then be kept in the slot of a draft token.
        """
        if vllm_config.num_speculative_tokens and not compat.uses_v2_model_runner(vllm_config):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> LightningMetadata:
        """Metadata of one step; see :class:`LightningMetadata`.

        Args:
            common_attn_metadata: rows of the step; ``is_prefilling`` and ``seq_lens_cpu_upper_bound`` must be set.
            kwargs: ``num_accepted_tokens`` [R] and ``num_decode_draft_tokens_cpu`` [R] under speculative decoding.
        """
        drafts = kwargs.get("num_decode_draft_tokens_cpu")
        common_attn_metadata, fresh_rows = self._decode_single_tokens(common_attn_metadata)
        # One level up on purpose: the chunk tables that Mamba2's own build() uploads serve its kernels only.
        metadata: LightningMetadata = super(Mamba2AttentionMetadataBuilder, self).build(
            common_prefix_len, common_attn_metadata, fast_build, **kwargs
        )
        metadata = replace(
            metadata,
            fresh_rows=fresh_rows,
            plan=self._plan(metadata, common_attn_metadata),
            read_slots_d=self._read_slots_of(metadata),
        )
        metadata = self._with_drafted_prompts(metadata, common_attn_metadata, drafts)
        self._clear_fresh_slots(metadata)
        return metadata

    def update_block_table(
        self, metadata: LightningMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> LightningMetadata:
        """The same step for another group of layers, which keeps its states in other slots."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        self._clear_fresh_slots(updated)
        return updated

    def _decode_single_tokens(self, common: CommonAttentionMetadata) -> tuple[CommonAttentionMetadata, Tensor | None]:
        """In a step of one token per row let prompts decode, from a cleared slot.

        Model Runner V1 replays a decode graph for such a step whatever the rows are, so a prompt of one token must find
        its place among the decodes. It also saves a prefill launch elsewhere.
        """
        if self.use_spec_decode or common.max_query_len != 1 or not bool(common.is_prefilling.any()):
            return common, None
        query_lens = torch.diff(common.query_start_loc_cpu)
        fresh = common.is_prefilling & (common.seq_lens_cpu_upper_bound == query_lens) & (query_lens == 1)
        if not bool(fresh.any()):
            return common, None
        rows = fresh.nonzero().flatten()
        return common.replace(is_prefilling=common.is_prefilling & ~fresh), _to(rows, common.query_start_loc.device)

    def _plan(self, metadata: LightningMetadata, common: CommonAttentionMetadata) -> LightningPlan | None:
        if not metadata.num_prefills:
            return None
        computed, bounds = self._prefill_cpu_metadata(
            common, metadata.num_reqs, metadata.num_prefills, metadata.num_decode_tokens
        )
        return LightningPlan.build(bounds, computed, device=common.query_start_loc.device)

    def _read_slots_of(self, metadata: LightningMetadata) -> Tensor | None:
        """The state after the last accepted token of a row lies in column ``accepted - 1`` of its slots."""
        if not self.use_spec_decode or not metadata.num_decodes or metadata.num_accepted_tokens is None:
            return None
        slots = metadata.state_indices_tensor_d
        column = (metadata.num_accepted_tokens[: slots.shape[0]].long() - 1).clamp_(min=0)
        read = torch.gather(slots, 1, column[:, None]).squeeze(1)
        if slots.data_ptr() != self.state_indices_tensor_d.data_ptr():
            return read
        buffer = self._read_slots[: read.shape[0]]
        buffer.copy_(read)
        return buffer

    def _with_drafted_prompts(
        self, metadata: LightningMetadata, common: CommonAttentionMetadata, drafts: Tensor | None
    ) -> LightningMetadata:
        """Take rows of one prompt token and placeholder drafts out of the prefill.

        A prefill leaves the state after the last token, placeholders included, where the next step looks for the state
        after the prompt (vLLM's builder handles only such rows that have a state already).
        """
        if drafts is None or not metadata.num_prefills:
            return metadata
        first = metadata.num_reqs - metadata.num_prefills
        bounds = common.query_start_loc_cpu
        query_lens = torch.diff(bounds)
        padded = (drafts > 0) & (query_lens == drafts + 1) & (common.seq_lens_cpu_upper_bound == query_lens)
        rows = padded[first:].nonzero().flatten()
        if not len(rows):
            return metadata
        device = common.query_start_loc.device
        lengths = query_lens[first:][rows]
        tokens = torch.cat([torch.arange(bounds[first + row], bounds[first + row + 1]) for row in rows.tolist()])
        table = _state_indices(common, self.kv_cache_spec, self.vllm_config)
        rows_d = _to(rows, device)
        metadata.state_indices_tensor_p = metadata.state_indices_tensor_p.clone()
        metadata.state_indices_tensor_p[rows_d] = NULL_SLOT
        drafted = DraftedPrompts(
            tokens=_to(tokens - metadata.num_decode_tokens, device),
            cu_seqlens=_to(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), device),
            read_slots=torch.full((len(rows),), NULL_SLOT, dtype=torch.int32, device=device),
            write_slots=table[first + rows_d, : 1 + self.num_spec_tokens].int().contiguous(),
        )
        return replace(metadata, drafted_prompts=drafted)

    def _clear_fresh_slots(self, metadata: LightningMetadata) -> None:
        if metadata.fresh_rows is None:
            return
        slots = metadata.state_indices_tensor_d[metadata.fresh_rows, 0].long()
        for name in self.layer_names:
            self._layers[name].state_pool.states.index_fill_(0, slots, 0.0)


def _state_indices(common: CommonAttentionMetadata, spec: MambaSpec, vllm_config: VllmConfig) -> Tensor:
    """[R, 1 + K] slots of all rows in this layer group."""
    return compat.state_block_table(
        common.block_table_tensor, common.seq_lens, spec, vllm_config.cache_config.mamba_cache_mode
    )


def _to(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
