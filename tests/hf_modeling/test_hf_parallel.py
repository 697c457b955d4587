# SPDX-License-Identifier: Apache-2.0
"""Tensor, expert and fully sharded parallelism over two processes, beside one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import load_fp32, random_ids, relative_error
from oracle import random_tensors, tiny_config, write_checkpoint

from minimax_plugin.hf_modeling.compat import EXPERT_PARALLEL_TRAINS

WORKER = Path(__file__).with_name("parallel_worker.py")

#: Parameters of which each of two ranks holds half, by mode.
SHARDED = {
    "tp": ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "ep": ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "fsdp": ["qkv_proj", "output_gate", "out_proj", "q_proj", "gate_up_proj", "down_proj", "embed_tokens"],
}


def sharded_parts(mode: str) -> list[str]:
    """Where expert parallelism does not train, it also leaves everything but the experts whole."""
    whole_attention = mode == "ep" and not EXPERT_PARALLEL_TRAINS
    return ["gate_up_proj", "down_proj"] if whole_attention else SHARDED[mode]


def run_two_ranks(path: Path, mode: str, result: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(WORKER), str(path), mode, str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return torch.load(result)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tp", "ep", "fsdp"])
def test_two_ranks_equal_one(tmp_path: Path, mode: str) -> None:
    config = tiny_config(shared_intermediate_size=24)
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"][-5:] = 0  # ids that belong to no token
    path = write_checkpoint(tmp_path / "model", config, tensors)
    ids = random_ids(2, 70, 120)
    torch.save(ids, path / "ids.pt")
    result = run_two_ranks(path, mode, tmp_path / "result.pt")

    model = load_fp32(path)
    with torch.no_grad():
        assert (result["logits"] - model(ids).logits).abs().max() <= 1e-3
    assert result["suppressed"] == model.generation_config.suppress_tokens == list(range(123, 128))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert result["generated"].tolist() == expected.tolist()
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if mode == "ep" and not EXPERT_PARALLEL_TRAINS:
            break
        assert relative_error(result["gradients"][name], parameter.grad) <= 1e-4, name

    assert result["heads"] == (2 if "out_proj" in sharded_parts(mode) and mode != "fsdp" else 4)
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for part in sharded_parts(mode):
        names = [name for name in whole if f".{part}" in name and "shared" not in name]
        assert names
        for name in names:
            assert result["local"][name] == whole[name] // 2, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            "num_attention_heads = 3 is not divisible by the tensor",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            "num_key_value_heads = 1 is not divisible by the tensor",
        ),
    ],
    ids=["heads", "kv-heads"],
)
def test_heads_that_do_not_split_are_refused(tmp_path: Path, heads: dict[str, int], message: str) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(**heads))
    torch.save(random_ids(1, 5), path / "ids.pt")
    with pytest.raises(RuntimeError, match=message):
        run_two_ranks(path, "tp", tmp_path / "result.pt")
