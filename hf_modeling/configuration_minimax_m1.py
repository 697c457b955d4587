# SPDX-License-Identifier: Apache-2.0
"""Configuration of MiniMax-M1 and MiniMax-Text-01 checkpoints in the original format.

Field names are those of the released ``config.json``. What transformers and vLLM expect under other names is derived:
``layer_types`` from ``attn_type_list``, ``rope_parameters`` from ``rope_theta`` and ``rotary_dim``, ``num_experts``
from ``num_local_experts``.

Every value is checked by :mod:`minimax_plugin.config_fields`: a single one when it is assigned, fields against each
other when a config is built or read from a file and when a model is built from it. The ``@strict`` of
``huggingface_hub`` is not used: it knows no ranges, takes a boolean for a number and raises no ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from minimax_plugin.architecture import Architecture, codes_from_layer_types, layer_types_from_codes, rotary_factor
from minimax_plugin.config_fields import (
    DEFAULT_MAX_POSITIONS,
    DEFAULT_RMS_NORM_EPS,
    DEFAULT_ROPE_THETA,
    head_dim_of,
    require_field,
    require_sound,
    rotary_dim_of,
)
from minimax_plugin.hf_modeling.compat import EXPERT_PARALLEL_PLAN

#: One softmax layer after every seven lightning layers in the released models.
RELEASED_PERIOD = 8

#: Parallel style of the norm that spans all heads of a lightning layer, registered by :mod:`.parallel`.
LIGHTNING_NORM_STYLE = "minimax_lightning_norm"

_ALIGNED_FIELDS = ("num_hidden_layers", "head_dim", "rotary_dim")

#: Fields that hold a value once the config is built, though they may be built from None.
_RESOLVED_FIELDS = (
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "attn_type_list",
    "rope_parameters",
)

#: Attributes of the class that a key of config.json must not replace, besides its methods.
_CLASS_TABLES = ("attribute_map", "sub_configs", "base_config_key", "has_no_defaults_at_init")


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
    default_theta = DEFAULT_ROPE_THETA

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
    max_position_embeddings: int = DEFAULT_MAX_POSITIONS
    initializer_range: float = 0.02
    rms_norm_eps: float = DEFAULT_RMS_NORM_EPS
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
        _check_names(type(self), kwargs)
        for name, value in kwargs.items():
            require_field(name, value)
        self._take_num_experts(kwargs.pop("num_experts", None))
        if self.attn_type_list is None:
            self.attn_type_list = self._pattern(kwargs.get("layer_types"))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        fields = self.__dict__ | kwargs
        require_sound(fields)
        kwargs.pop("layer_types", None)
        self.head_dim = head_dim_of(fields)
        self.rotary_dim = rotary_dim_of(fields)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MiniMaxM1Config:
        """Build from the contents of a ``config.json``.

        Raises:
            ValueError: a key that states the size of the model is absent, or a value has a wrong type, sign or range.
        """
        _check_names(cls, config_dict)
        require_sound(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> Architecture:
        """Check every field against what the model code supports and return the architecture.

        Raises:
            ValueError: see the class.
        """
        for name in _RESOLVED_FIELDS:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name} is None, expected a value: only a config that is being built may leave it out"
                )
        return Architecture.from_config(self)

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
        if not (key in _RESOLVED_FIELDS and value is None):
            require_field(key, value)
        if key == "rope_parameters":
            value = self._completed(value)
        elif key == "shared_intermediate_size":
            value = value or 0
        super().__setattr__(key, value)
        if key in _ALIGNED_FIELDS:
            self._align(key)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Put ``rope_theta`` and the rotated share of the head into ``rope_parameters``, the only place vLLM reads."""
        # Copied because the caller's dictionary would be completed in place.
        self.rope_parameters = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        kwargs["partial_rotary_factor"] = self._rotary_factor()
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        kwargs.pop("partial_rotary_factor", None)
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

    def _take_num_experts(self, num_experts: int | None) -> None:
        experts = self.num_local_experts
        if num_experts not in (None, experts):
            if experts != type(self).num_local_experts:
                raise ValueError(f"num_experts = {num_experts} contradicts num_local_experts = {experts}; state one")
            self.num_local_experts = num_experts

    def _pattern(self, layer_types: list[str] | None) -> list[int]:
        if layer_types is not None:
            return codes_from_layer_types(layer_types)
        return [int(i % RELEASED_PERIOD == RELEASED_PERIOD - 1) for i in range(self.num_hidden_layers)]

    def _rotary_factor(self) -> float:
        return rotary_factor(self.rotary_dim, self.head_dim)

    def _completed(self, rope_parameters: Any) -> Any:
        """Other rotary parameters for a finished config, with what they leave out taken from the present ones.

        None and an empty dictionary end a scaling. Without the rotated share of the head the scaled variants of
        transformers would rotate all of it.
        """
        present = self.__dict__.get("rope_parameters") or {}
        kept = {key: present[key] for key in ("rope_theta", "partial_rotary_factor") if key in present}
        if len(kept) < 2:
            return rope_parameters
        rope_parameters = rope_parameters or {}
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
            return
        head_dim, rotary_dim = fields.get("head_dim"), fields.get("rotary_dim")
        stated = (fields.get("rope_parameters") or {}).get("partial_rotary_factor")
        # More rotated dimensions than a head has stay for check(): the other of the two may be assigned next.
        if stated is not None and head_dim and rotary_dim and rotary_dim <= head_dim:
            self.rope_parameters = {**fields["rope_parameters"], "partial_rotary_factor": self._rotary_factor()}


def _check_names(config_class: type[MiniMaxM1Config], names: Iterable[str]) -> None:
    """Refuse keys that would replace a part of the class: a method, a table that it works by, a computed value."""
    for name in names:
        held = getattr(config_class, name, None) if isinstance(name, str) else None
        computed = isinstance(held, property) and held.fset is None
        if name == "self" or name in _CLASS_TABLES or callable(held) or computed or str(name).startswith("__"):
            raise ValueError(f"{name} is a key of the config, expected no key of this name: the config class uses it")


class MiniMaxText01Config(MiniMaxM1Config):
    """Configuration of MiniMax-Text-01: the same architecture under the model type ``minimax_text_01``."""

    model_type = "minimax_text_01"


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
