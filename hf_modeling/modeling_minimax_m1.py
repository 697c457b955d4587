# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 and MiniMax-Text-01 for transformers.

Seven lightning layers alternate with one softmax layer; each layer is attention and a mixture of experts, with
residuals that are scaled by ``alpha`` and outputs that are scaled by ``beta``.

Shapes: ``B`` batch, ``T`` tokens, ``L`` layers, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple

from minimax_plugin.hf_modeling.batch import (
    LightningBatch,
    check_unpacked,
    find_document_bounds,
    flash_attention_bounds,
    positions_from_bounds,
)
from minimax_plugin.hf_modeling.cache import adopt_cache
from minimax_plugin.hf_modeling.compat import OutputRecorder, capture_outputs, merge_with_config_defaults
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config, MiniMaxText01Config
from minimax_plugin.hf_modeling.generation import MiniMaxM1GenerationMixin
from minimax_plugin.hf_modeling.layers import (
    MiniMaxM1Attention,
    MiniMaxM1Experts,
    MiniMaxM1LightningAttention,
    MiniMaxM1LMHead,
    MiniMaxM1RMSNorm,
    MiniMaxM1RotaryEmbedding,
    MiniMaxM1SharedCoefficient,
    MiniMaxM1SharedMLP,
    MiniMaxM1SparseMoeBlock,
    MiniMaxM1TopKRouter,
)
from minimax_plugin.hf_modeling.loading import StrictLoadingMixin
from minimax_plugin.hf_modeling.weight_mapping import IGNORED_CHECKPOINT_KEYS

#: torch's grouped matmul takes rows of a multiple of 16 bytes, 8 values of bf16.
GROUPED_MM_MULTIPLE = 8


class MiniMaxM1DecoderLayer(GradientCheckpointingLayer):
    """Attention and experts. With ``postnorm`` each residual is taken after the norm, otherwise before it."""

    def __init__(self, config: MiniMaxM1Config, layer_idx: int) -> None:
        super().__init__()
        self.postnorm = config.postnorm
        self.layer_type = config.layer_types[layer_idx]
        self.attention_alpha = getattr(config, f"layernorm_{self.layer_type}_alpha")
        self.attention_beta = getattr(config, f"layernorm_{self.layer_type}_beta")
        self.mlp_alpha = config.layernorm_mlp_alpha
        self.mlp_beta = config.layernorm_mlp_beta
        attention = MiniMaxM1LightningAttention if self.layer_type == "linear_attention" else MiniMaxM1Attention
        self.self_attn = attention(config, layer_idx)
        self.block_sparse_moe = MiniMaxM1SparseMoeBlock(config)
        self.input_layernorm = MiniMaxM1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MiniMaxM1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_shared_expert = config.shared_intermediate_size > 0
        if self.has_shared_expert:
            self.shared_mlp = MiniMaxM1SharedMLP(config)
            self.coefficient = MiniMaxM1SharedCoefficient(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``[B, T, hidden]`` -> the same; ``kwargs`` go to the attention module."""
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.postnorm else hidden_states
        attended, _ = self.self_attn(normed, **kwargs)
        hidden_states = residual * self.attention_alpha + attended * self.attention_beta

        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.postnorm else hidden_states
        return residual * self.mlp_alpha + self._experts(normed) * self.mlp_beta

    def _experts(self, hidden_states: Tensor) -> Tensor:
        routed = self.block_sparse_moe(hidden_states)
        if not self.has_shared_expert:
            return routed
        share = self.coefficient(hidden_states)
        mixed = routed * (1 - share) + self.shared_mlp(hidden_states) * share
        return mixed.to(hidden_states.dtype)


class MiniMaxM1PreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Base of all heads: what transformers needs to know about the model."""

    config_class = MiniMaxM1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMaxM1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The whole path: "gate" alone would also match output_gate and gate_up_proj.
    _keep_in_fp32_modules_strict = ["block_sparse_moe.gate"]
    _keys_to_ignore_on_load_unexpected = IGNORED_CHECKPOINT_KEYS
    _can_record_outputs = {
        "router_logits": OutputRecorder(MiniMaxM1TopKRouter, index=0),
        "hidden_states": MiniMaxM1DecoderLayer,
        "attentions": OutputRecorder(MiniMaxM1Attention, index=1),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers decides by searching the source file of the model class for the decorator, which is in layers.py,
        # and would quietly run one expert after the other.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """One expert after the other where torch's grouped matmul refuses the sizes and the user chose nothing."""
        sizes = (self.config.hidden_size, self.config.intermediate_size)
        if requested_experts is None and any(size % GROUPED_MM_MULTIPLE for size in sizes):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MiniMaxM1Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MiniMaxM1TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class MiniMaxM1Model(MiniMaxM1PreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        # Checked again: fields may have been assigned since the config was built.
        config.check()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.layer_types = config.layer_types
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MiniMaxM1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiniMaxM1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniMaxM1RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, hidden].
            attention_mask: [B, past + T], zero for padding, anywhere in a row. Or a dictionary of prepared masks by
                layer type, as ``generate`` passes it with a static cache.
            position_ids: [B, T] or [1, T]. Without mask and cache, a position that does not follow on the one before
                starts a new document; documents do not see each other. No cache is returned for packed documents.
            past_key_values: ``DynamicCache`` or ``StaticCache``; updated in place.
            cu_seq_lens_q: [N + 1] bounds of the documents of one row, as FlashAttention takes them.

        Raises:
            ValueError: inputs that contradict each other, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, length = embeds.shape[:2]

        bounds = self._document_bounds(embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        document_positions = position_ids
        if bounds is not None:
            attention_mask, use_cache = None, False
            document_positions = positions_from_bounds(bounds, batch_size, length, embeds.device)
            kwargs |= flash_attention_bounds(bounds, embeds.device)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0
        if past_key_values is not None:
            adopt_cache(past_key_values, self.layer_types)
            past_length = past_key_values.get_seq_length()
        if isinstance(attention_mask, Tensor):
            self._check_mask(attention_mask, (batch_size, length), past_length, position_ids)
        if position_ids is None:
            positions = torch.arange(length, device=embeds.device).unsqueeze(0) + past_length
            position_ids = positions if document_positions is None else document_positions

        softmax_mask, lightning_mask = self._masks(attention_mask, embeds, past_key_values, document_positions)
        if bounds is not None:
            lightning_batch = LightningBatch.build_packed(batch_size, length, bounds, embeds.device)
        else:
            cached = past_key_values is not None
            lightning_batch = LightningBatch.build(batch_size, length, lightning_mask, embeds.device, cached=cached)

        hidden_states = embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                lightning_batch=lightning_batch,
                attention_mask=softmax_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    @staticmethod
    def _document_bounds(
        embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        cu_seq_lens: Tensor | None,
    ) -> list[int] | None:
        """Bounds of packed documents in the flattened [B * T], None where every row is one document."""
        if cu_seq_lens is None and (attention_mask is not None or past_key_values is not None):
            return None
        bounds = find_document_bounds(position_ids, cu_seq_lens, *embeds.shape[:2])
        if bounds is None or (past_key_values is None and attention_mask is None):
            return bounds
        if past_key_values is not None:
            raise ValueError("packed documents cannot continue a cache; pass past_key_values=None")
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or not attention_mask.all():
            raise ValueError("packed documents take no attention_mask; leave padding out of cu_seq_lens_q")
        return bounds

    @staticmethod
    def _check_mask(mask: Tensor, new: tuple[int, int], past_length: int | Tensor, position_ids: Tensor | None) -> None:
        """Refuse a mask that does not say of every cached and new token of ``new`` = (B, T) whether it is padding."""
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected [batch, tokens]: lightning layers "
                "cannot apply a mask between pairs of tokens. To pack documents, pass position_ids without a mask"
            )
        if torch.compiler.is_compiling():
            return  # A trace may know neither how much is cached nor what a tensor holds.
        (batch_size, length), past_length = new, int(past_length)
        if mask.shape != (batch_size, past_length + length):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected {(batch_size, past_length + length)}: "
                f"{past_length} cached and {length} new tokens"
            )
        if position_ids is not None and past_length == 0:
            check_unpacked(position_ids, mask)

    def _masks(
        self,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        embeds: Tensor,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of the softmax layers as their backend takes it, and the mask [B, T] of the lightning layers."""
        if isinstance(attention_mask, dict):
            return attention_mask.get("full_attention"), attention_mask.get("linear_attention")
        softmax_mask = None
        if "full_attention" in self.layer_types:
            softmax_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        return softmax_mask, None if attention_mask is None else attention_mask[:, -embeds.shape[1] :]


class MiniMaxM1ForCausalLM(MiniMaxM1GenerationMixin, MiniMaxM1PreTrainedModel, GenerationMixin):
    """The decoder with a language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__(config)
        self.model = MiniMaxM1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = MiniMaxM1LMHead(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        # Resizing hands over a plain nn.Linear; taking only its weight keeps the logits in fp32.
        self.lm_head.weight = new_embeddings.weight
        self.lm_head.out_features = new_embeddings.weight.shape[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; see :meth:`MiniMaxM1Model.forward` for the inputs.

        Args:
            labels: [B, T], -100 for positions without a target; the loss shifts them.
            output_router_logits: also return the router logits and the load balancing loss, and add the latter to the
                loss with the factor ``router_aux_loss_coef``.
            logits_to_keep: compute the logits of the last so many positions only (0 = all), or of the given positions.

        Returns:
            logits [B, T, V], loss, caches and what else was asked for.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            length = outputs.last_hidden_state.shape[1]
            tokens = attention_mask[:, -length:] if isinstance(attention_mask, Tensor) else None
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.num_local_experts, self.config.num_experts_per_tok, tokens
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class MiniMaxM1ForSequenceClassification(GenericForSequenceClassification, MiniMaxM1PreTrainedModel):
    """The decoder with a classification head, for reward models."""


class MiniMaxText01Model(MiniMaxM1Model):
    """MiniMax-Text-01 is the same architecture under another model type."""

    config_class = MiniMaxText01Config


class MiniMaxText01ForCausalLM(MiniMaxM1ForCausalLM):
    """The language model of MiniMax-Text-01."""

    config_class = MiniMaxText01Config


class MiniMaxText01ForSequenceClassification(MiniMaxM1ForSequenceClassification):
    """The classifier of MiniMax-Text-01."""

    config_class = MiniMaxText01Config
