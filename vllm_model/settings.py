# SPDX-License-Identifier: Apache-2.0
"""What the vLLM model reads from a checkpoint's config, in the original format and in the ``-hf`` format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minimax_plugin.architecture import WHY_FP32_STATE, Architecture, LayerType, rotary_factor
from minimax_plugin.config_fields import (
    CONVERTED_FACTORS,
    CONVERTED_MODEL_TYPE,
    DEFAULT_MAX_POSITIONS,
    DEFAULT_RMS_NORM_EPS,
    DEFAULT_ROPE_THETA,
    RESIDUAL_FACTORS,
    fields_of,
    stated_rope,
)


@dataclass(frozen=True)
class ResidualFactors:
    """A block returns ``alpha * residual + beta * output``."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and constants of one model, checked.

    Attributes:
        architecture: the sizes.
        attention_factors: residual factors of an attention block by layer type.
        mlp_factors: residual factors of the expert block.
        postnorm: the residual is taken after the norm instead of before it.
        rms_norm_eps: epsilon of every norm but that inside the lightning layers.
        rope_parameters: as vLLM's ``get_rope`` takes them, with the rotated share of the head in
            ``partial_rotary_factor``, the only place it reads.
        max_position: positions that the model was trained for.
    """

    architecture: Architecture
    attention_factors: dict[LayerType, ResidualFactors]
    mlp_factors: ResidualFactors
    postnorm: bool
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position: int

    @classmethod
    def from_config(cls, config: Any) -> ModelSettings:
        """Read a config object of either format.

        The ``-hf`` format names the residual factors differently, has no ``postnorm`` (its model code always norms
        first) and carries ``rotary_dim`` as a leftover that transformers' own model ignores.

        Raises:
            ValueError: a value that no such model can have; the message names the field.
        """
        fields = fields_of(config)
        architecture = Architecture.from_config(fields)
        converted = fields.get("model_type") == CONVERTED_MODEL_TYPE
        names = CONVERTED_FACTORS if converted else RESIDUAL_FACTORS
        factors = [float(fields.get(name, 1.0)) for name in names]
        linear, full, mlp = (ResidualFactors(*factors[i : i + 2]) for i in (0, 2, 4))
        max_position = fields.get("max_position_embeddings", DEFAULT_MAX_POSITIONS)
        return cls(
            architecture=architecture,
            attention_factors={"linear_attention": linear, "full_attention": full},
            mlp_factors=mlp,
            postnorm=fields.get("postnorm", converted),
            rms_norm_eps=fields.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS),
            rope_parameters=_rope_parameters(fields, architecture, max_position),
            max_position=max_position,
        )


def require_fp32_state(cache_config: Any) -> None:
    """Refuse a recurrent state of another dtype; ``cache_config`` is vLLM's.

    Raises:
        ValueError: the command line asks for another dtype.
    """
    for flag, dtype in (
        ("--mamba-cache-dtype", cache_config.mamba_cache_dtype),
        ("--mamba-ssm-cache-dtype", cache_config.mamba_ssm_cache_dtype),
    ):
        if dtype not in ("auto", "float32"):
            raise ValueError(f"{flag} is {dtype!r}, expected 'auto' or 'float32': {WHY_FP32_STATE}; leave {flag} out")


def _rope_parameters(fields: Mapping[str, Any], architecture: Architecture, max_position: int) -> dict[str, Any]:
    _, stated = stated_rope(fields)
    defaults: dict[str, Any] = {"rope_type": stated.get("type", "default")}
    defaults["rope_theta"] = fields.get("rope_theta", DEFAULT_ROPE_THETA)
    rope_parameters = {**defaults, **stated}
    rope_parameters["partial_rotary_factor"] = rotary_factor(architecture.rotary_dim, architecture.head_dim)
    if rope_parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        rope_parameters.setdefault("original_max_position_embeddings", max_position)
    return rope_parameters
