# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism of lightning layers: each rank keeps a contiguous share of the heads, their states and slopes.

The projections are split as those of any attention layer. What is left is the norm, which spans the heads of all ranks:
one sum of squares per token is added up over the ranks, forwards and backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_plugin.hf_modeling.compat import ALL_PARALLEL_STYLES, TensorParallelLayer
from minimax_plugin.hf_modeling.configuration_minimax_m1 import LIGHTNING_NORM_STYLE


@dataclass(frozen=True)
class HeadShard:
    """Which share of the heads a rank keeps, and the group of ranks that keep the others."""

    rank: int
    size: int
    group: Any

    def take(self, values: Any) -> Any:
        """This rank's share of a sequence or tensor whose first dimension runs over all heads or channels."""
        length = len(values) // self.size
        return values[self.rank * length : (self.rank + 1) * length]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks; the gradient is summed as well, because every rank uses the result."""
        return _Sum.apply(values, self.group)

    def share_gradient(self, values: Tensor) -> Tensor:
        """The same values; the gradients, to which each rank adds a part, are summed over the ranks."""
        return _SumGradient.apply(values, self.group)


class LightningNormParallel(TensorParallelLayer):
    """Tells the norm of a lightning layer, and through it the layer, which heads this rank keeps."""

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        module.head_shard = HeadShard(dist.get_rank(group), dist.get_world_size(group), group)
        return module


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


ALL_PARALLEL_STYLES.register(LIGHTNING_NORM_STYLE, LightningNormParallel())
