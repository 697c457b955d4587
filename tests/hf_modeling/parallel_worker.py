# SPDX-License-Identifier: Apache-2.0
"""One rank of a distributed run on CPU: loads a checkpoint in parallel, runs it, and rank 0 stores what came out."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import minimax_plugin  # noqa: F401


def make_config(mode: str) -> DistributedConfig:
    """``tp``, ``ep`` (experts and the rest in parallel) or ``fsdp``, over two ranks."""
    if mode == "fsdp":
        return DistributedConfig(fsdp_size=2)
    if mode == "tp":
        return DistributedConfig(tp_size=2)
    if "ep_size" in {field.name for field in fields(DistributedConfig)}:
        return DistributedConfig(tp_size=2, ep_size=2, tp_plan="auto")
    return DistributedConfig(tp_size=2, enable_expert_parallel=True)  # Before transformers 5.20.


def local_size(parameter: Any) -> int:
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(path: Path, mode: str, result_path: Path) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=make_config(mode))
    ids = torch.load(path / "ids.pt")
    with torch.no_grad():
        output = model.eval()(ids)
        logits = full(output.logits)
        heads = output.past_key_values.layers[0].recurrent_states[0].shape[1]
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    local = {name: local_size(parameter) for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        result = {"logits": logits, "generated": generated, "loss": full(loss).item(), "gradients": gradients}
        result |= {"local": local, "heads": heads, "suppressed": model.generation_config.suppress_tokens}
        torch.save(result, result_path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
