# SPDX-License-Identifier: Apache-2.0
"""Configuration of MiniMax-M1 and MiniMax-Text-01 checkpoints in the original format.

Field names are those of the released ``config.json``. What transformers and vLLM expect under other names is derived:
``layer_types`` from ``attn_type_list``, ``rope_parameters`` from ``rope_theta`` and ``rotary_dim``, ``num_experts``
from ``num_local_experts``. All sizes are checked by :class:`minimax_plugin.architecture.Architecture`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minimax_plugin.architecture import Architecture, codes_from_layer_types, layer_types_from_codes, rotary_factor
from minimax_plugin.hf_modeling.compat import EXPERT_PARALLEL_PLAN

#: One softmax layer after every seven lightning layers in the released models.
RELEASED_PERIOD = 8

#: Parallel style of the norm that spans all heads of a lightning layer, registered by :mod:`.parallel`.
LIGHTNING_NORM_STYLE = "minimax_lightning_norm"

_ALIGNED_FIELDS = ("num_hidden_layers", "head_dim", "rotary_dim")

#: How the logits are computed: in fp32, or in the dtype of the model.
_HEAD_DTYPES = ("float32", "model")


@strict
class MiniMaxM1Config(PreTrainedConfig):
    """Configuration of a MiniMax-M1 model; the sizes default to those of the released model.

    Keys that a ``config.json`` may leave out take the values the released modeling code falls back to: residual factors
    1, ``postnorm`` False, no shared expert, ``rotary_dim`` the whole head. Keys that state the size of the model must
    be present in a file that is loaded (:meth:`from_dict`).

    Args:
        attn_type_list: one code per layer, 0 for lightning attention and 1 for softmax attention. None takes
            ``layer_types`` if given, else the released pattern of seven lightning layers and one softmax layer.
        layernorm_linear_attention_alpha, layernorm_linear_attention_beta: factors of the residual and of the output of
            a lightning layer; likewise ``layernorm_full_attention_*`` for softmax layers and ``layernorm_mlp_*``.
        postnorm: the residual is taken after the norm instead of before it.
        rotary_dim: leading dimensions of each head that are rotated, in softmax layers only.
        shared_intermediate_size: width of the shared expert, 0 for none.
        shared_moe_mode: "sigmoid" or "softmax", how the output of the shared expert is mixed in.
        head_dtype: dtype of the logits product. Both backends read it; "model" means the dtype of the weights.

    Raises:
        ValueError: a value no such model can have; the message names the field, its value and what was expected.
    """

    model_type = "minimax_m1"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts"}
    #: TRL reads the attribute of any config. Empty, as no code file belongs to this class; None breaks transformers.
    auto_map: ClassVar[dict[str, str]] = {}
    #: RoPE base of the released configuration class, used where config.json states none.
    default_theta = 1_000_000.0

    # Every matrix is split over the ranks, attention of both kinds by heads.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.qkv_proj": "colwise",
        "layers.*.self_attn.output_gate": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.self_attn.norm": LIGHTNING_NORM_STYLE,
        "layers.*.block_sparse_moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.block_sparse_moe.experts.down_proj": "rowwise",
        "layers.*.block_sparse_moe.experts": "moe_tp_experts",
        "layers.*.shared_mlp.gate_proj": "colwise",
        "layers.*.shared_mlp.up_proj": "colwise",
        "layers.*.shared_mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = EXPERT_PARALLEL_PLAN
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # "| Any" marks fields that accept None and hold a value once the config is built.
    vocab_size: int = 200_064
    hidden_size: int = 6144
    intermediate_size: int = 9216
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int | Any = 8
    head_dim: int | Any = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 10_240_000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    attn_type_list: list[int] | Any = None
    layernorm_full_attention_alpha: float | int = 1.0
    layernorm_full_attention_beta: float | int = 1.0
    layernorm_linear_attention_alpha: float | int = 1.0
    layernorm_linear_attention_beta: float | int = 1.0
    layernorm_mlp_alpha: float | int = 1.0
    layernorm_mlp_beta: float | int = 1.0
    postnorm: bool = False
    rotary_dim: int | Any = None
    rope_parameters: dict[str, Any] | Any = None
    shared_intermediate_size: int | Any = 0
    shared_moe_mode: str = "sigmoid"
    head_dtype: str = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        # The entries name code files of the original repository, which no checkpoint saved from here contains, and a
        # pipeline would run those of a folder.
        kwargs.pop("auto_map", None)
        kwargs.pop("custom_pipelines", None)
        self._resolve_layers(kwargs.pop("layer_types", None))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.rotary_dim is None:
            factor = (self.rope_parameters or {}).get("partial_rotary_factor", kwargs.get("partial_rotary_factor"))
            self.rotary_dim = self.head_dim if factor is None else round(self.head_dim * factor)
        self.shared_intermediate_size = self.shared_intermediate_size or 0
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MiniMaxM1Config:
        """Build from the contents of a ``config.json``.

        Raises:
            ValueError: a key that states the size of the model is absent, or a value is out of range.
        """
        Architecture.from_config(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> Architecture:
        """Check every field against what the model code supports and return the architecture.

        Raises:
            ValueError: see the class.
        """
        architecture = Architecture.from_config(self)
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected 'silu', the only activation of this family")
        if self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window!r}, expected null: softmax layers see everything")
        if self.head_dtype not in _HEAD_DTYPES:
            raise ValueError(f"head_dtype is {self.head_dtype!r}, expected 'float32' or 'model' (that of the weights)")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}, expected a positive number")
        for name in ("attention_dropout", "router_jitter_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected 0 <= {name} < 1")
        for part in ("full_attention", "linear_attention", "mlp"):
            for factor in ("alpha", "beta"):
                name = f"layernorm_{part}_{factor}"
                if not math.isfinite(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, expected a finite number")
        self._check_rope()
        return architecture

    @property
    def layer_types(self) -> list[str]:
        """``"linear_attention"`` or ``"full_attention"`` per layer: the names that caches, masks and vLLM go by."""
        return list(layer_types_from_codes(self.attn_type_list or []))

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        self.attn_type_list = codes_from_layer_types(value)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, kept in ``rope_parameters``."""
        parameters = self.__dict__.get("rope_parameters") or {}
        if "rope_theta" not in parameters:
            raise AttributeError("rope_parameters holds no rope_theta")
        return parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "rope_parameters":
            value = self._completed(value)
        super().__setattr__(key, value)
        if key in _ALIGNED_FIELDS:
            self._align(key)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Put ``rope_theta`` and the rotated share of the head into ``rope_parameters``, the only place vLLM reads.

        Raises:
            ValueError: ``rope_parameters`` and ``rotary_dim`` contradict each other.
        """
        # Copied because the caller's dictionary would be completed in place.
        self.rope_parameters = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        theta = self.rope_parameters.get("rope_theta", kwargs.get("rope_theta"))
        if theta != kwargs.get("rope_theta", theta):
            raise ValueError(
                f"rope_parameters['rope_theta'] = {theta} contradicts rope_theta = {kwargs['rope_theta']}; state one"
            )
        kwargs["partial_rotary_factor"] = self._rotary_factor()
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        kwargs.pop("partial_rotary_factor", None)
        self._check_rope()
        self.rope_parameters["partial_rotary_factor"] = self._rotary_factor()
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``, with the keys that loaders of the original format read.

        Without a top-level ``rope_theta`` those loaders fall back to 1e6 and compute other logits without a word.
        """
        output = super().to_dict()
        output["rope_theta"] = self.rope_theta
        output["layer_types"] = self.layer_types
        return output

    def _resolve_layers(self, layer_types: list[str] | None) -> None:
        if self.attn_type_list is None:
            if layer_types is None:
                period = RELEASED_PERIOD
                self.attn_type_list = [int(i % period == period - 1) for i in range(max(self.num_hidden_layers, 0))]
            else:
                self.attn_type_list = codes_from_layer_types(layer_types)
        elif layer_types is not None and codes_from_layer_types(layer_types) != list(self.attn_type_list):
            raise ValueError(f"layer_types = {layer_types} contradicts attn_type_list = {self.attn_type_list}")

    def _rotary_factor(self) -> float:
        return rotary_factor(self.rotary_dim, self.head_dim)

    def _check_rope(self) -> None:
        parameters = self.rope_parameters or {}
        if not {"rope_type", "partial_rotary_factor"} <= parameters.keys():
            return  # Not completed yet.
        known = ("default", *ROPE_INIT_FUNCTIONS)
        if parameters["rope_type"] not in known:
            raise ValueError(f"rope_type is {parameters['rope_type']!r}, expected one of {', '.join(known)}")
        stated = parameters["partial_rotary_factor"]
        if round(stated * self.head_dim) != self.rotary_dim:
            raise ValueError(
                f"rope_parameters['partial_rotary_factor'] = {stated} rotates {round(stated * self.head_dim)} of "
                f"{self.head_dim} dimensions, but rotary_dim = {self.rotary_dim}; state one of them"
            )

    def _completed(self, rope_parameters: Any) -> Any:
        """Other rotary parameters for a finished config, with what they leave out taken from the present ones.

        Without the rotated share of the head the scaled variants of transformers would rotate all of it.
        """
        present = self.__dict__.get("rope_parameters") or {}
        kept = {key: present[key] for key in ("rope_theta", "partial_rotary_factor") if key in present}
        if not isinstance(rope_parameters, dict) or len(kept) < 2:
            return rope_parameters
        return {"rope_type": rope_parameters.get("type", "default")} | kept | rope_parameters

    def _align(self, key: str) -> None:
        """Keep derived fields in step with one that is assigned after construction.

        ``AutoConfig.from_pretrained(path, num_hidden_layers=4)`` and vLLM's ``hf_overrides`` assign to a finished
        config. Fewer layers keep the first codes, as the released code does.
        """
        fields = self.__dict__
        if key == "num_hidden_layers":
            codes = fields.get("attn_type_list")
            if codes and fields[key] < len(codes):
                self.attn_type_list = codes[: fields[key]]
        elif not (fields.get("rotary_dim") and fields.get("head_dim")):
            return  # Not resolved yet, or refused by check().
        elif (fields.get("rope_parameters") or {}).get("partial_rotary_factor") is not None:
            self.rope_parameters = {**fields["rope_parameters"], "partial_rotary_factor": self._rotary_factor()}


@strict
class MiniMaxText01Config(MiniMaxM1Config):
    """Configuration of MiniMax-Text-01: the same architecture under the model type ``minimax_text_01``."""

    model_type = "minimax_text_01"


@strict
class MiniMaxM1ResavedConfig(MiniMaxM1Config):
    """Reads ``MiniMaxM1``, the model type that the released configuration class writes when it saves.

    Loading gives a :class:`MiniMaxM1Config`, so that what is saved from here carries the released model type again.
    """

    model_type = "MiniMaxM1"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MiniMaxM1Config:
        return MiniMaxM1Config.from_dict(config_dict | {"model_type": MiniMaxM1Config.model_type}, **kwargs)


#: Every configuration class that is registered.
CONFIG_CLASSES: tuple[type[MiniMaxM1Config], ...] = (MiniMaxM1Config, MiniMaxText01Config, MiniMaxM1ResavedConfig)
