# SPDX-License-Identifier: Apache-2.0
"""One of two processes that score batches of different size under FSDP2; started by ``test_packing_two_processes.py``.

Run as ``torchrun --standalone --nproc_per_node=2 packing_worker.py MODEL``; the first prints its results as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from scoring_batches import LENGTHS, Batch, make_batch, make_model, packed, relative, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from minimax_plugin.cispo.router_replay import RouterReplay

BOUND = 30


def batches() -> list[Batch]:
    """Three packed rows on the first process, two on the second."""
    few = make_batch(((7, 20), (4, 15)), seed=1)
    return [make_batch(LENGTHS), few]


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    calls: list[int] = []
    model = make_model(path, packed(BOUND))
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = batches()[rank]
    replay = RouterReplay(model)
    with torch.no_grad(), replay.recording() as recorded:
        model(**batch.arguments(), fused_lm_head=True)
    calls.clear()
    with replay.replaying(torch.cat(recorded)):
        result = score(model, batch)
    counts = [None, None]
    dist.all_gather_object(counts, len(calls))
    if rank == 0:
        expected = torch.stack([run(make_model(path), each).gradient for each in batches()]).mean(0)
        print(json.dumps({"error": relative(result, expected), "calls": counts, "sharded": sharded}))
    dist.destroy_process_group()


def score(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The gradient of both processes together, in one vector."""
    output = model(**batch.arguments(), fused_lm_head=True)
    log_probs, entropy = (values[:, -batch.completion :] for values in (output.log_probs, output.entropy))
    mix = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5))
    ((mix * log_probs).sum() + 0.1 * entropy.sum()).backward()
    full = []
    for parameter in model.parameters():
        assert isinstance(parameter.grad, DTensor)
        full.append(parameter.grad.full_tensor().flatten())
    return torch.cat(full)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
