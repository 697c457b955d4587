# SPDX-License-Identifier: Apache-2.0
"""What the vLLM model reads from a checkpoint's config, in the original format and in the ``-hf`` format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minimax_plugin.architecture import Architecture, LayerType, rotary_factor


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
        architecture = Architecture.from_config(config)
        converted = config.model_type == "minimax"
        names = ("linear_attn", "full_attn", "mlp") if converted else ("linear_attention", "full_attention", "mlp")
        linear, full, mlp = (_factors(config, name, converted) for name in names)
        rope_parameters = dict(config.rope_parameters)
        rope_parameters["partial_rotary_factor"] = rotary_factor(architecture.rotary_dim, architecture.head_dim)
        return cls(
            architecture=architecture,
            attention_factors={"linear_attention": linear, "full_attention": full},
            mlp_factors=mlp,
            postnorm=bool(getattr(config, "postnorm", converted)),
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope_parameters,
            max_position=config.max_position_embeddings,
        )


def _factors(config: Any, name: str, converted: bool) -> ResidualFactors:
    keys = [f"{name}_{kind}_factor" if converted else f"layernorm_{name}_{kind}" for kind in ("alpha", "beta")]
    alpha, beta = (getattr(config, key, 1.0) for key in keys)
    for key, value in zip(keys, (alpha, beta), strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, expected a finite number")
    return ResidualFactors(float(alpha), float(beta))
