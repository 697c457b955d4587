#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Errors of lightning attention against the float64 recurrence, per slope, on whatever serves this machine.

    python benchmarks/kernel_accuracy.py                       # the PyTorch path, or the kernels on a GPU
    python benchmarks/kernel_accuracy.py --interpret           # the Triton kernels in the interpreter, on a CPU

Inputs are SiLU of standard normal values, rounded to the dtype; the recurrence gets the same rounded values. Printed
are relative errors of the last 1,024 outputs and of the final state.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder holds a `kernels` module, which transformers would take for the Hugging Face package of that name.
    del sys.path[0]

#: From the fastest head of the first layer to the slowest of the last lightning layer of the released model.
SLOPES = (0.917, 0.0625, 0.0116, 0.0039, 0.0019, 4.95e-5)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpret", action="store_true", help="run the Triton kernels in Triton's interpreter")
    args = parser.parse_args()
    if args.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "MINIMAX_LIGHTNING_BACKEND": "triton"}
        os.environ.setdefault("MINIMAX_LIGHTNING_TILES", f"BT=64,BV={args.head_dim}")
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
        import interpreter_shim

        interpreter_shim.install()
    print(f"{'dtype':6s} {'precision':9s} {'error of':9s}" + "".join(f"{slope:>10.3g}" for slope in SLOPES))
    for dtype in DTYPES:
        for precision in ("default", "high"):
            outputs, states = measure(args.tokens, args.head_dim, DTYPES[dtype], precision, args.seed)
            for name, errors in (("outputs", outputs), ("state", states)):
                print(f"{dtype:6s} {precision:9s} {name:9s}" + "".join(f"{e:10.1e}" for e in errors), flush=True)
    return 0


def measure(tokens: int, head_dim: int, dtype_name: str, precision: str, seed: int) -> tuple[list[float], list[float]]:
    """Relative errors of the last 1,024 outputs and of the final state, one per slope."""
    import torch

    from minimax_plugin.kernels import ops, reference

    device = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, len(SLOPES), 3 * head_dim, generator=generator).to(getattr(torch, dtype_name))
    slopes = torch.tensor(SLOPES, dtype=torch.float32)
    out = torch.empty(tokens, len(SLOPES), head_dim, dtype=qkv.dtype, device=device)
    pool = torch.zeros(1, len(SLOPES), head_dim, head_dim, device=device)
    ops.lightning_prefill(
        qkv.to(device),
        slopes.to(device),
        pool,
        torch.tensor([0], device=device),
        torch.tensor([False], device=device),
        ops.LightningPlan.build([0, tokens], device=device),
        out=out,
        precision=precision,
    )
    expected, state = reference.recurrence_fp64(*reference.split_packed(qkv, "silu"), slopes)
    tail = slice(max(0, tokens - 1024), tokens)
    found, exact = out[tail].cpu().double(), expected[tail]
    outputs = ((found - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).tolist()
    states = ((pool[0].cpu().double() - state).norm(dim=(1, 2)) / state.norm(dim=(1, 2))).tolist()
    return outputs, states


if __name__ == "__main__":
    sys.exit(main())
