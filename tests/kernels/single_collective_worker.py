# SPDX-License-Identifier: Apache-2.0
"""What each process of ``test_norm_single_collective.py`` runs; of its own, so that spawned processes find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_plugin.kernels import ops

WORLD_SIZE = 2


def run(rank: int, rendezvous: str, layers: list[tuple[Tensor, ...]], eps: float, folder: str) -> None:
    """Project this rank's share of every layer; save the results and the collectives as ``<folder>/<rank>.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    reduced: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        results = []
        for layer in layers:
            o, gate, weight, out_weight = (x.chunk(WORLD_SIZE, dim=-1)[rank] for x in layer)
            results.append(ops.single_collective_projection(o, gate, weight, out_weight, eps, group=dist.group.WORLD))
        torch.save((results, reduced), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
