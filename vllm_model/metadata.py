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
class LateDecodes:
    """Rows of speculative decoding that decode, but stand behind the first row that prefills.

    Attributes:
        tokens: [L] int64, their tokens, counted from the first prefill token of the step.
        cu_seqlens: [M + 1] int32, bounds of the rows within ``tokens``.
        read_slots: [M] int32, the slot each continues from; null for one that starts from zeros.
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
        late_decodes: see :class:`LateDecodes`; their slots among the prefill rows are null.
    """

    plan: LightningPlan | None = None
    read_slots_d: Tensor | None = None
    fresh_rows: Tensor | None = None
    late_decodes: LateDecodes | None = None


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

        Raises:
            RuntimeError: a model runner hands over no counts of accepted tokens.
        """
        drafts, accepted = kwargs.get("num_decode_draft_tokens_cpu"), kwargs.get("num_accepted_tokens")
        if self.use_spec_decode and accepted is None:
            raise RuntimeError(
                "speculative decoding would give wrong tokens here: the model runner of this vLLM does not say how "
                "many drafts were accepted; leave --speculative-config out"
            )
        common_attn_metadata = _prefill_recomputed_tokens(common_attn_metadata, drafts)
        common_attn_metadata, fresh_rows = self._decode_single_tokens(common_attn_metadata)
        # One level up on purpose: the chunk tables that Mamba2's own build() uploads serve its kernels only.
        metadata: LightningMetadata = super(Mamba2AttentionMetadataBuilder, self).build(
            common_prefix_len, common_attn_metadata, fast_build, **kwargs
        )
        metadata = replace(
            metadata,
            fresh_rows=fresh_rows,
            plan=self._plan(metadata, common_attn_metadata),
            read_slots_d=self._read_slots_of(metadata, common_attn_metadata),
        )
        metadata = self._with_late_decodes(metadata, common_attn_metadata, drafts, accepted)
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

    def _read_slots_of(self, metadata: LightningMetadata, common: CommonAttentionMetadata) -> Tensor | None:
        if not self.use_spec_decode or not metadata.num_decodes:
            return None
        slots = metadata.state_indices_tensor_d
        read = _read_slots(slots, metadata.num_accepted_tokens[: slots.shape[0]], _is_fresh(common)[: slots.shape[0]])
        if slots.data_ptr() != self.state_indices_tensor_d.data_ptr():
            return read
        buffer = self._read_slots[: read.shape[0]]
        buffer.copy_(read)
        return buffer

    def _with_late_decodes(
        self,
        metadata: LightningMetadata,
        common: CommonAttentionMetadata,
        drafts: Tensor | None,
        accepted: Tensor | None,
    ) -> LightningMetadata:
        """Take rows that decode out of the prefill.

        A prefill goes on from the first slot of a row and leaves there the state after its last token, rejected drafts
        included. Rows of one prompt token and placeholder drafts count as prefills under Model Runner V1, and Model
        Runner V2 puts decodes without drafts behind prompts of some lengths.
        """
        if drafts is None or accepted is None or not metadata.num_prefills:
            return metadata
        first = metadata.num_reqs - metadata.num_prefills
        bounds = common.query_start_loc_cpu
        query_lens = torch.diff(bounds)
        padded = (drafts > 0) & (query_lens == drafts + 1)
        decoding = padded | (~common.is_prefilling & (query_lens > 0) & (query_lens <= 1 + self.num_spec_tokens))
        rows = first + decoding[first:].nonzero().flatten()
        if not len(rows):
            return metadata
        device = common.query_start_loc.device
        tokens = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows.tolist()])
        rows_d = _to(rows, device)
        slots = _state_indices(common, self.kv_cache_spec, self.vllm_config)[rows_d, : 1 + self.num_spec_tokens]
        metadata.state_indices_tensor_p = metadata.state_indices_tensor_p.clone()
        metadata.state_indices_tensor_p[rows_d - first] = NULL_SLOT
        late = LateDecodes(
            tokens=_to(tokens - metadata.num_decode_tokens, device),
            cu_seqlens=_to(torch.nn.functional.pad(query_lens[rows].cumsum(0), (1, 0)).int(), device),
            read_slots=_read_slots(slots, accepted[rows_d], _is_fresh(common)[rows]).int(),
            write_slots=slots.int().contiguous(),
        )
        return replace(metadata, late_decodes=late)

    def _clear_fresh_slots(self, metadata: LightningMetadata) -> None:
        if metadata.fresh_rows is None:
            return
        slots = metadata.state_indices_tensor_d[metadata.fresh_rows, 0].long()
        for name in self.layer_names:
            self._layers[name].state_pool.states.index_fill_(0, slots, 0.0)


def _prefill_recomputed_tokens(common: CommonAttentionMetadata, drafts: Tensor | None) -> CommonAttentionMetadata:
    """Let a preempted request prefill the tokens that it has generated before.

    Model Runner V1 holds it for past its prompt, so that a few of them would pass for one token and its drafts.
    """
    if drafts is None:
        return common
    recomputed = ~common.is_prefilling & (torch.diff(common.query_start_loc_cpu) > 1) & (drafts < 0)
    if not bool(recomputed.any()):
        return common
    return common.replace(is_prefilling=common.is_prefilling | recomputed)


def _is_fresh(common: CommonAttentionMetadata) -> Tensor:
    """[R] bool on the host: rows without a state, all of whose tokens are in this step."""
    query_lens = torch.diff(common.query_start_loc_cpu)
    return (query_lens > 0) & (common.seq_lens_cpu_upper_bound == query_lens)


def _read_slots(slots: Tensor, accepted: Tensor, fresh: Tensor) -> Tensor:
    """[rows] from [rows, 1 + K] slots: the state after the last accepted token lies in column ``accepted - 1``."""
    column = (accepted.long() - 1).clamp_(min=0)
    read = torch.gather(slots, 1, column[:, None]).squeeze(1)
    return read.masked_fill(_to(fresh, read.device), NULL_SLOT) if bool(fresh.any()) else read


def _state_indices(common: CommonAttentionMetadata, spec: MambaSpec, vllm_config: VllmConfig) -> Tensor:
    """[R, 1 + K] slots of all rows in this layer group."""
    return compat.state_block_table(
        common.block_table_tensor, common.seq_lens, spec, vllm_config.cache_config.mamba_cache_mode
    )


def _to(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
