# SPDX-License-Identifier: Apache-2.0
"""One process of ``test_sharded_over_two_processes``: shard a model with FSDP2, gather its weights, save them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_merged_weights import EXPERTS, load, with_adapter
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from minimax_plugin.cispo.merged_weights import full_parameters


def main(path: str, folder: str, kind: str) -> None:
    distributed.init_process_group("gloo")
    model = load(Path(path))
    if kind == "lora":
        model = with_adapter(model, target_modules=["qkv_proj"], target_parameters=EXPERTS)
    decoder = model.get_submodule("base_model.model.model" if kind == "lora" else "model")
    for layer in decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    local = [parameter.to_local().clone() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    result = {
        "world_size": distributed.get_world_size(),
        "sharded": len(local),
        "weights": dict(full_parameters(model)),
    }
    after = [parameter.to_local() for parameter in model.parameters()]
    result["unchanged"] = all(torch.equal(x, y) for x, y in zip(local, after, strict=True))
    torch.save(result, Path(folder) / f"rank{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
