# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 and MiniMax-Text-01 on vLLM's layers.

Shapes: ``T`` tokens of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    MixtureOfExperts,
    SupportsLoRA,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from minimax_plugin.architecture import Architecture
from minimax_plugin.vllm_model import compat
from minimax_plugin.vllm_model.attention import SoftmaxAttention
from minimax_plugin.vllm_model.compat import MambaStateCopyFuncCalculator
from minimax_plugin.vllm_model.experts import SharedExpert, SharedExpertCoefficient, SparseExperts
from minimax_plugin.vllm_model.lightning import LightningAttention
from minimax_plugin.vllm_model.settings import ModelSettings, require_fp32_state
from minimax_plugin.vllm_model.sources import refuse_pickle_formats, require_safe_source
from minimax_plugin.vllm_model.weights import NAME_MAPPER, WeightLedger
from minimax_plugin.vocabulary import padding_ids

if TYPE_CHECKING:
    from minimax_plugin.vllm_model.model_state import LightningModelState

logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"

#: Values of ``--load-format`` with which vLLM hands over a whole checkpoint in one pass. With the others the first pass
#: is a weight update, which may hold any part of the model.
_WHOLE_CHECKPOINT_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
)


class DecoderLayer(nn.Module):
    """Attention and experts, each joined to its residual as ``alpha * residual + beta * output``."""

    def __init__(self, settings: ModelSettings, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        architecture = settings.architecture
        layer_idx = int(prefix.rsplit(".", 1)[1])
        layer_type = architecture.layer_types[layer_idx]
        self.attention_factors = settings.attention_factors[layer_type]
        self.mlp_factors = settings.mlp_factors
        self.postnorm = settings.postnorm
        self.is_lightning = layer_type == "linear_attention"
        self.self_attn: LightningAttention | SoftmaxAttention
        if self.is_lightning:
            self.self_attn = LightningAttention(settings, layer_idx, vllm_config, prefix=f"{prefix}.self_attn")
        else:
            self.self_attn = SoftmaxAttention(settings, vllm_config, prefix=f"{prefix}.self_attn")
        self.block_sparse_moe = SparseExperts(architecture, vllm_config, prefix=f"{prefix}.block_sparse_moe")
        self.shared_mlp: SharedExpert | None = None
        if architecture.shared_intermediate_size:
            self.shared_mlp = SharedExpert(architecture, vllm_config, prefix=f"{prefix}.shared_mlp")
            self.coefficient = SharedExpertCoefficient(architecture, prefix=f"{prefix}.coefficient")
        self.input_layernorm = RMSNorm(architecture.hidden_size, eps=settings.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, eps=settings.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` [T], ``hidden_states`` [T, hidden]."""
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.postnorm else hidden_states
        attended = self.self_attn(normed) if self.is_lightning else self.self_attn(positions, normed)
        hidden_states = residual * self.attention_factors.alpha + attended * self.attention_factors.beta

        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.postnorm else hidden_states
        output = self.block_sparse_moe(normed)
        if self.shared_mlp is not None:
            output = self.coefficient.mix(normed, output, self.shared_mlp(normed))
        return residual * self.mlp_factors.alpha + output * self.mlp_factors.beta


# The dynamic dimensions are stated because vLLM infers them from annotations, which are strings in this module.
@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class MiniMaxModel(nn.Module):
    """The decoder stack of one pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = ModelSettings.from_config(vllm_config.model_config.hf_config)
        architecture = settings.architecture
        architecture.check_tensor_parallel(get_tensor_model_parallel_world_size())
        compat.require_splitting_op(vllm_config, compat.LIGHTNING_OP)
        # vLLM's weight loader looks for it here and on the causal model.
        self.quant_config = vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(
            architecture.vocab_size, architecture.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            architecture.num_hidden_layers,
            lambda prefix: DecoderLayer(settings, vllm_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(architecture.hidden_size, eps=settings.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], architecture.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden_states = inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class MiniMaxM1ForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP, SupportsLoRA, MixtureOfExperts):
    """MiniMax-M1 with its language model head."""

    hf_to_vllm_mapper = NAME_MAPPER
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
    # Released checkpoints are safetensors; without them there is nothing to fall back to.
    fall_back_to_pt_during_load = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_pickle_formats(vllm_config.load_config)
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.architecture = Architecture.from_config(self.config)
        self.model = MiniMaxModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.architecture.vocab_size,
            self.architecture.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.architecture.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.architecture.vocab_size)
        self._choose_head_dtype()
        self._suppressed_index: Tensor | None = None
        self._suppress(None)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

        self._model_config, self._load_config = vllm_config.model_config, vllm_config.load_config
        self._expects_whole_checkpoint = str(self._load_config.load_format) in _WHOLE_CHECKPOINT_FORMATS
        # vLLM's weight loader reads it when it starts, which is in `load_weights`.
        self.allow_patterns_overrides: list[str] | None = None
        parallel = vllm_config.parallel_config
        self._skips_foreign_experts = parallel.enable_expert_parallel and parallel.enable_ep_weight_filter
        self._describe_experts()

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        """Shape of the state that one sequence keeps in one lightning layer on one rank."""
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        return (Architecture.from_config(vllm_config.model_config.hf_config).state_shape(tp_size=tp_size),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        """fp32, always.

        Raises:
            ValueError: the command line asks for another dtype.
        """
        require_fp32_state(vllm_config.cache_config)
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How prefix caching copies a state between blocks."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    @staticmethod
    def get_model_state_cls() -> type[LightningModelState]:
        """Asked for by Model Runner V2 only, whose modules are imported here for that reason."""
        from minimax_plugin.vllm_model.model_state import LightningModelState

        return LightningModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, vocabulary] on the first rank, None on the others.

        Ids that belong to no token are never sampled: such a token shows as a missing word. Who has trained them as
        tokens sets ``mask_vocab_padding`` to false in the config.
        """
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None and self._suppressed_ids:
            if self._suppressed_index is None or self._suppressed_index.device != logits.device:
                # Made here rather than while loading: what is made there is lost when the weights are put to sleep.
                self._suppressed_index = torch.tensor(self._suppressed_ids, device=logits.device)
            logits.index_fill_(-1, self._suppressed_index, -torch.inf)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, or any part of one as a trainer sends it.

        Args:
            weights: names as in original checkpoints, as in ``-hf`` checkpoints, or as transformers holds them in
                memory (experts fused as ``experts.gate_up_proj`` and ``experts.down_proj``).

        Returns:
            vLLM's names of the parameters that were loaded.

        Raises:
            ValueError: a tensor has a wrong shape or dtype or comes twice, or, when vLLM starts from a checkpoint, a
                tensor is missing, a file is damaged, the index contradicts the files or names one elsewhere, or there
                are no safetensors files.
        """
        if self._expects_whole_checkpoint:
            self.allow_patterns_overrides = require_safe_source(self._model_config, self._load_config)
        source = self._model_config.model
        ledger = WeightLedger(self.architecture, quantized=self.quant_config is not None, source=source)
        checked = self._watch_embedding(ledger.watch(weights))
        loaded = AutoWeightsLoader(self).load_weights(checked, mapper=self.hf_to_vllm_mapper)
        if self._expects_whole_checkpoint:
            self._expects_whole_checkpoint = False
            ledger.require_complete(self._is_elsewhere)
        return loaded

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for block in self._expert_blocks():
            block.update_physical_experts(num_physical_experts, num_local_physical_experts)

    def _watch_embedding(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Read the unused ids off the whole embedding, which passes every rank; each keeps a part of it or none."""
        for name, tensor in weights:
            if name == _EMBEDDING:
                self._suppress(tensor)
            yield name, tensor

    def _suppress(self, embedding: Tensor | None) -> None:
        self._suppressed_ids = padding_ids(self.config, embedding)
        self._suppressed_index = None

    def _is_elsewhere(self, name: str) -> bool:
        foreign_expert = self._skips_foreign_experts and ".experts." in name
        return foreign_expert or is_pp_missing_parameter(name, self)

    def _choose_head_dtype(self) -> None:
        """Logits in fp32 unless the config says otherwise; the released model loses characters with a bf16 head."""
        unquantized = isinstance(self.lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        if not unquantized:
            logger.info("lm_head is quantized: logits are computed in the dtype of its kernel")
            self.logits_processor.head_dtype = None
        elif getattr(self.config, "head_dtype", None) is None:
            self.logits_processor.head_dtype = torch.float32

    def _expert_blocks(self) -> list[SparseExperts]:
        return [layer.block_sparse_moe for layer in self.model.layers if not isinstance(layer, PPMissingLayer)]

    def _describe_experts(self) -> None:
        """Attributes by which vLLM's expert load balancer knows a model."""
        blocks = self._expert_blocks()
        self.expert_weights: list[Any] = []
        self.moe_layers = [block.experts for block in blocks]
        self.num_moe_layers = len(blocks)
        self.num_expert_groups = 1
        self.num_shared_experts = 0
        self.num_logical_experts = blocks[0].num_logical_experts
        self.num_routed_experts = blocks[0].num_logical_experts
        self.num_physical_experts = blocks[0].num_physical_experts
        self.num_local_physical_experts = blocks[0].num_local_physical_experts
        self.num_redundant_experts = blocks[0].num_redundant_experts


class MiniMaxText01ForCausalLM(MiniMaxM1ForCausalLM):
    """MiniMax-Text-01: the same architecture and names."""


class MiniMaxForCausalLM(MiniMaxM1ForCausalLM):
    """The converted checkpoints (``-hf``), with the config keys of transformers' own model of the family.

    Heads are rotated on their leading ``rotary_dim`` dimensions as the weights were trained; transformers' own model
    rotates all of them.
    """
