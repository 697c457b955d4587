# SPDX-License-Identifier: Apache-2.0
"""Tokens and slots that lie 2^31 elements and more into their tensors, in memory that is never touched in between.

The interpreter computes addresses in the integer types of the kernel, so a 32-bit product wraps around as on a GPU.
"""

from __future__ import annotations

import interpreter_shim
import pytest
import torch
from law_tools import Setting, assert_close, oracle
from torch import Tensor

from minimax_plugin.kernels import ops

interpreter_shim.install()

SETTING = Setting(dtype=torch.bfloat16, exact_states=False, head_dim=16, slopes=(0.5,))

#: The largest stride between tokens that is read in place; the chunk that starts at token 192 lies past 2^31.
FAR = 2**24 - 16


def spread(shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose first dim has a huge stride. Its pages are not backed by memory before they are touched."""
    inner = shape[1:]
    strides = [1]
    for size in reversed(inner[1:]):
        strides.insert(0, strides[0] * size)
    try:
        memory = torch.empty(shape[0] * stride, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve address space: {error}")
    return memory.as_strided(shape, (stride, *strides))


def test_tokens_and_slots_beyond_2_to_the_31() -> None:
    length, slots = 200, 3
    qkv = spread((length, 1, 48), FAR, torch.bfloat16)
    qkv.copy_(SETTING.qkv(length))
    out = spread((length, 1, 16), FAR, torch.bfloat16)
    pool = spread((slots, 1, 16, 16), 2**30 + 256, torch.float32)
    pool.copy_(SETTING.states(slots))
    assert qkv.stride(0) * length > 2**31
    assert pool.stride(0) * 2 > 2**31
    plan = SETTING.plan(length)
    ops.lightning_prefill(
        qkv, SETTING.slopes_tensor(), pool, torch.tensor([2]), torch.tensor([True]), plan, out=out,
        checkpoint_slots=torch.tensor([-1, 1, -1, -1]),
    )  # fmt: skip
    before = SETTING.states(slots)
    expected, final = oracle(SETTING, qkv, before[2])
    assert_close("output", out, expected, SETTING.output_error)
    assert_close("state", pool[2], final, SETTING.state_error)
    _, middle = oracle(SETTING, qkv[:128], before[2])
    assert_close("state at the checkpoint", pool[1], middle, SETTING.state_error)
    assert torch.equal(pool[0], before[0])
