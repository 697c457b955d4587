# SPDX-License-Identifier: Apache-2.0
"""What the public functions refuse and what they take: one spoiled argument at a time.

``test_ops.py`` holds the table of the prefill, ``test_recurrent_replay.py`` that of the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_plugin.kernels import ops

HEADS, DIM = 2, 16
SLOPES = torch.tensor([0.917, 0.01])


def tokens(count: int, width: int = 3 * DIM) -> Tensor:
    return torch.randn(count, HEADS, width, generator=torch.Generator().manual_seed(count))


def decode_call() -> dict[str, Any]:
    return {
        "qkv": tokens(2),
        "slopes": SLOPES,
        "state_pool": torch.zeros(4, HEADS, DIM, DIM),
        "slot_ids": torch.tensor([1, 2]),
        "out": torch.empty(2, HEADS, DIM),
        "sumsq": torch.empty(2, HEADS),
    }


def verify_call() -> dict[str, Any]:
    """Two tokens and one."""
    return {
        "qkv": tokens(3),
        "slopes": SLOPES,
        "state_pool": torch.zeros(6, HEADS, DIM, DIM),
        "read_slots": torch.tensor([0, -1]),
        "write_slots": torch.tensor([[1, 2], [3, 4]]),
        "cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32),
        "out": torch.empty(3, HEADS, DIM),
    }


def prefill_call() -> dict[str, Any]:
    return {
        "qkv": tokens(5),
        "slopes": SLOPES,
        "state_pool": torch.zeros(4, HEADS, DIM, DIM),
        "slot_ids": torch.tensor([2, 0]),
        "has_initial": torch.tensor([False, True]),
        "plan": ops.LightningPlan.build([0, 2, 5]),
        "out": torch.empty(5, HEADS, DIM),
    }


def packed_call() -> dict[str, Any]:
    return {"qkv": tokens(5), "slopes": SLOPES}


def attention_call() -> dict[str, Any]:
    return {name: tokens(5, DIM) for name in ("q", "k", "v")} | {"slopes": SLOPES}


def norm_call() -> dict[str, Any]:
    return {"o": torch.ones(5, 32), "gate": torch.ones(5, 32), "weight": torch.ones(32), "eps": 1e-6}


def combine_call() -> dict[str, Any]:
    return {"states": torch.zeros(2, HEADS, DIM, DIM), "lengths": [1, 2], "slopes": SLOPES}


META = torch.device("meta")

CALLS: dict[str, tuple[Callable[..., object], Callable[[], dict[str, Any]]]] = {
    "decode": (ops.lightning_decode, decode_call),
    "verify": (ops.lightning_verify, verify_call),
    "prefill": (ops.lightning_prefill, prefill_call),
    "packed": (ops.lightning_attention_packed, packed_call),
    "attention": (ops.lightning_attention, attention_call),
    "norm": (ops.gated_rmsnorm, norm_call),
    "combine": (ops.combine_states, combine_call),
}

FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("decode", {"qkv": tokens(2)[None]}, r"qkv has shape \(1, 2, 2, 48\), expected \[T, H, 3 \* D\]"),
    ("decode", {"slopes": -SLOPES}, "slopes are .*, expected every one positive"),
    ("decode", {"state_pool": torch.zeros(4, 3, DIM, DIM)}, r"state_pool has shape \(4, 3, 16, 16\), expected"),
    ("decode", {"slot_ids": torch.tensor([1])}, r"slot_ids is torch\.int64 \(1,\), expected int32 or int64 \(2,\)"),
    ("decode", {"slot_ids": torch.tensor([1, 2]).short()}, r"slot_ids is torch\.int16 \(2,\), expected int32 or int64"),
    ("decode", {"slot_ids": torch.ones(2).int().to(META)}, "slot_ids is on meta, expected cpu"),
    ("decode", {"slot_ids": torch.tensor([1, 4])}, r"slot_ids holds \[4\], expected slots below 4"),
    ("decode", {"out": torch.empty(2, HEADS, DIM, device=META)}, "out is on meta, expected cpu"),
    ("decode", {"out": torch.empty(2, HEADS, DIM).double()}, r"out is torch\.float64, expected one of"),
    ("decode", {"sumsq": torch.empty(2, 1)}, r"sumsq is torch\.float32 \(2, 1\), expected torch\.float32 \(2, 2\)"),
    ("decode", {"sumsq": torch.empty(2, HEADS, device=META)}, "sumsq is on meta, expected cpu"),
    ("decode", {"activation": "relu"}, "activation is 'relu', expected 'silu' or None"),
    ("verify", {"slopes": -SLOPES}, "slopes are .*, expected every one positive"),
    ("verify", {"read_slots": torch.tensor([0, 6])}, r"read_slots holds \[6\], expected slots below 6"),
    ("verify", {"read_slots": torch.zeros(2)}, r"read_slots is torch\.float32 \(2,\), expected int32"),
    ("verify", {"write_slots": torch.tensor([[1, 2]])}, r"write_slots is torch\.int64 \(1, 2\), expected .* \(2, 2\)"),
    ("verify", {"write_slots": torch.tensor([[1, 6], [3, 4]])}, r"write_slots holds \[6\], expected slots below 6"),
    ("verify", {"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens is torch\.int64 \(2,\), expected .* \(3,\)"),
    ("verify", {"cu_seqlens": torch.tensor([1, 2, 3])}, r"cu_seqlens is \[1, 2, 3\], expected to rise from 0"),
    ("verify", {"cu_seqlens": torch.tensor([0, 2, 1])}, r"cu_seqlens is \[0, 2, 1\], expected to rise from 0"),
    (
        "prefill",
        {"has_initial": torch.ones(3).bool()},
        r"has_initial is torch\.bool \(3,\), expected torch\.bool \(2,\)",
    ),
    ("prefill", {"has_initial": torch.ones(2).bool().to(META)}, "has_initial is on meta, expected cpu"),
    ("prefill", {"state_pool": torch.zeros(4, 1, DIM, DIM)}, r"state_pool has shape \(4, 1, 16, 16\), expected"),
    ("packed", {"activation": "relu"}, "activation is 'relu', expected 'silu' or None"),
    ("packed", {"slopes": SLOPES[:1]}, r"slopes are torch\.float32 \(1,\) on cpu, expected torch\.float32 \(2,\)"),
    ("packed", {"slopes": -SLOPES}, "slopes are .*, expected every one positive"),
    (
        "packed",
        {"qkv": torch.ones(6, 48)},
        r"qkv has shape \(6, 48\), expected \[T, H, 3 \* D\] or \[B, T, H, 3 \* D\]",
    ),
    ("packed", {"precision": "exact"}, "precision is 'exact', expected 'default' or 'high'"),
    ("packed", {"plan": ops.LightningPlan.build([0, 4])}, "cu_seqlens ends with 4, expected the number of tokens 5"),
    ("packed", {"initial_state": torch.zeros(2, HEADS, DIM, DIM)}, "initial_state holds 2 states, expected 1"),
    ("attention", {"k": tokens(5, DIM).to(META)}, r"k is torch\.float32 \(5, 2, 16\) on meta, expected like q"),
    ("norm", {"gate": torch.ones(5, 32, device=META)}, "gate is on meta, expected cpu"),
    ("norm", {"sumsq": torch.ones(5, device=META)}, "sumsq is on meta, expected cpu"),
    ("norm", {"weight": torch.ones(1)}, r"weight \(1,\); expected o and gate alike and weight of their last dim"),
    ("combine", {"slopes": SLOPES[:1]}, r"slopes are torch\.float32 \(1,\) on cpu, expected torch\.float32 \(2,\)"),
    ("combine", {"states": torch.zeros(2, HEADS, DIM, DIM).half()}, r"combine_states got states torch\.float16"),
]


@pytest.mark.parametrize(
    ("call", "fault", "message"), FAULTS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None
)
def test_a_spoiled_argument_is_named(call: str, fault: dict[str, Any], message: str) -> None:
    function, make = CALLS[call]
    function(**make())
    with pytest.raises(ValueError, match=message):
        function(**make() | fault)


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("decode", {"slot_ids": torch.tensor([-1, -1])}),
    ("decode", {"slot_ids": torch.tensor([0, 0]), "null_slot": 0}),
    (
        "decode",
        {"qkv": tokens(0), "slot_ids": torch.empty(0).int(), "out": torch.empty(0, HEADS, DIM), "sumsq": None},
    ),
    ("verify", {"write_slots": torch.tensor([[1, 2], [3, 99]])}),  # 99 lies behind the one token of its sequence
    ("verify", {"read_slots": torch.tensor([0, 0])}),
    ("prefill", {"slot_ids": torch.tensor([-1, 0]), "checkpoint_slots": torch.tensor([-1, 1])}),
    ("attention", {name: torch.ones(3, 1, DIM) for name in ("q", "k", "v")} | {"slopes": torch.ones(4)[::4]}),
]


@pytest.mark.parametrize(
    ("call", "change"), ACCEPTED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None
)
def test_unusual_but_right_arguments_are_taken(call: str, change: dict[str, Any]) -> None:
    function, make = CALLS[call]
    function(**make() | change)
