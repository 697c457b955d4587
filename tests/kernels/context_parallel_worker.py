# SPDX-License-Identifier: Apache-2.0
"""What each process of ``test_context_parallel.py`` runs; in a module of its own, so that spawned processes find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_plugin.kernels.context_parallel import context_parallel_lightning_attention

WORLD_SIZE = 4

NAMES = ("q", "k", "v", "initial_state")


def run(rank: int, rendezvous: str, cases: list[dict[str, Any]], folder: str) -> None:
    """Run every case that has a part for this rank and save what came out as ``<folder>/<rank>.pt``, by case number."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    groups = {2: dist.new_group([0, 1]), WORLD_SIZE: None}
    mine = {number: case for number, case in enumerate(cases) if rank < len(case["lengths"])}
    try:
        results = {number: run_case(case, rank, groups[len(case["lengths"])]) for number, case in mine.items()}
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_case(case: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> dict[str, Tensor | None]:
    """Outputs and gradients of this rank; the losses of all ranks together are that of the whole sequence."""
    start, stop = sum(case["lengths"][:rank]), sum(case["lengths"][: rank + 1])
    time = case["q"].dim() - 3
    part = {name: case[name].narrow(time, start, stop - start).clone().requires_grad_() for name in ("q", "k", "v")}
    initial = case.get("initial_state")
    part["initial_state"] = None if initial is None else initial.clone().requires_grad_()
    out, state = context_parallel_lightning_attention(
        part["q"],
        part["k"],
        part["v"],
        case["slopes"],
        group,
        initial_state=part["initial_state"],
        output_final_state=True,
    )
    assert state is not None
    loss = (out.float() * case["grad_out"].narrow(time, start, stop - start)).sum()
    if rank in case["grad_states"]:
        loss = loss + (state * case["grad_states"][rank]).sum()
    loss.backward()
    grads = {f"grad_{name}": None if part[name] is None else part[name].grad for name in NAMES}
    return {"out": out.detach(), "state": state.detach(), **grads}
