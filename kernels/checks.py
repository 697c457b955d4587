# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions: what was found, what was expected.

The ``check_*_values`` functions read tensor contents and are called only where that costs no device synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_plugin.architecture import WHY_FP32_STATE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PRECISIONS = ("default", "high")

ACTIVATIONS = ("silu", None)


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected 'default' or 'high'")


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected 'silu' or None")


def check_packed(qkv: Tensor, dims: tuple[int, ...]) -> None:
    if qkv.dim() not in dims or qkv.shape[-1] % 3:
        shapes = " or ".join(("[T, H, 3 * D]", "[B, T, H, 3 * D]")[d - 3] for d in dims)
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected {shapes}")
    _check_tokens("qkv", qkv)


def check_alike(**tensors: Tensor) -> None:
    """The given tensors are [B, T, H, D] or [T, H, D], all like the first one."""
    (first, like), *others = tensors.items()
    if like.dim() not in (3, 4):
        raise ValueError(f"{first} has shape {tuple(like.shape)}, expected [B, T, H, D] or [T, H, D]")
    _check_tokens(first, like)
    for name, x in others:
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected like {first}: {like.dtype} "
                f"{tuple(like.shape)} on {like.device}"
            )
        _check_tokens(name, x)


def check_slopes(slopes: Tensor, num_heads: int, device: torch.device) -> None:
    if slopes.dtype != torch.float32 or slopes.shape != (num_heads,) or slopes.device != device:
        raise ValueError(
            f"slopes are {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}, expected torch.float32 "
            f"({num_heads},) on {device}"
        )
    if num_heads > 1 and slopes.stride(0) != 1:
        raise ValueError(f"slopes have stride {slopes.stride(0)}, expected contiguous")


def check_slope_values(slopes: Tensor) -> None:
    if not bool((slopes > 0).all()):
        raise ValueError(f"slopes are {slopes.tolist()}, expected every one positive (the state decays by exp(-slope))")


def check_index(name: str, index: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape) != shape:
        raise ValueError(f"{name} is {index.dtype} {tuple(index.shape)}, expected int32 or int64 {shape}")
    _check_device(name, index, device)


def check_slot_values(name: str, slots: list[int], num_slots: int, null_slot: int, *, unique: bool = True) -> None:
    live = [slot for slot in slots if slot > null_slot]
    outside = [slot for slot in live if slot >= num_slots]
    if outside:
        raise ValueError(f"{name} holds {outside}, expected slots below {num_slots}, the size of the pool")
    if unique and len(set(live)) != len(live):
        repeated = sorted({slot for slot in live if live.count(slot) > 1})
        raise ValueError(f"{name} holds {repeated} more than once, expected a slot of its own for every sequence")


def check_checkpoint_values(checkpoints: list[int], slots: list[int], null_slot: int) -> None:
    shared = sorted({slot for slot in checkpoints if slot > null_slot} & set(slots))
    if shared:
        raise ValueError(
            f"checkpoint_slots holds {shared}, slots of sequences of the same call, expected others: segments run in "
            "any order"
        )


def check_has_initial(has_initial: Tensor, num_sequences: int, device: torch.device) -> None:
    if has_initial.dtype != torch.bool or has_initial.shape != (num_sequences,):
        raise ValueError(
            f"has_initial is {has_initial.dtype} {tuple(has_initial.shape)}, expected torch.bool ({num_sequences},)"
        )
    _check_device("has_initial", has_initial, device)


def check_state(name: str, state: Tensor, heads: int, head_dim: int, device: torch.device) -> None:
    if state.dtype != torch.float32:
        raise ValueError(f"{name} is {state.dtype}, expected torch.float32: {WHY_FP32_STATE}")
    if state.dim() != 4 or state.shape[1:] != (heads, head_dim, head_dim):
        raise ValueError(f"{name} has shape {tuple(state.shape)}, expected [*, {heads}, {head_dim}, {head_dim}]")
    _check_device(name, state, device)


def check_gated_norm(o: Tensor, gate: Tensor, weight: Tensor, sumsq: Tensor | None, norm_size: int | None) -> None:
    if o.shape != gate.shape or weight.shape != o.shape[-1:]:
        raise ValueError(
            f"gated_rmsnorm got o {tuple(o.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}; expected "
            "o and gate alike and weight of their last dim"
        )
    _check_device("gate", gate, o.device)
    _check_device("weight", weight, o.device)
    if sumsq is None:
        if norm_size not in (None, o.shape[-1]):
            raise ValueError(f"norm_size is {norm_size} without sumsq, expected {o.shape[-1]}, the channels of o")
        return
    if sumsq.dtype != torch.float32 or sumsq.shape not in (o.shape[:-1], (*o.shape[:-1], 1)):
        rows = tuple(o.shape[:-1])
        raise ValueError(
            f"sumsq is {sumsq.dtype} {tuple(sumsq.shape)}, expected torch.float32 {rows} or {(*rows, 1)}: one sum over "
            "all channels of a row"
        )
    _check_device("sumsq", sumsq, o.device)


def check_num_tokens(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"cu_seqlens ends with {found}, expected the number of tokens {expected}")


def check_pool_call(
    qkv: Tensor, slopes: Tensor, state_pool: Tensor, out: Tensor, sumsq: Tensor | None, activation: str | None
) -> None:
    """What every in-place function over a pool of slots asks of its tensors."""
    check_activation(activation)
    check_packed(qkv, (3,))
    num_tokens, num_heads, head_dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    check_slopes(slopes, num_heads, qkv.device)
    check_state("state_pool", state_pool, num_heads, head_dim, qkv.device)
    if tuple(state_pool.stride()[1:]) != (head_dim * head_dim, head_dim, 1):
        raise ValueError(f"state_pool has strides {state_pool.stride()}, expected each slot [H, D, D] contiguous")
    if out.shape != (num_tokens, num_heads, head_dim):
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {(num_tokens, num_heads, head_dim)}")
    _check_tokens("out", out)
    _check_device("out", out, qkv.device)
    if sumsq is None:
        return
    if sumsq.dtype != torch.float32 or sumsq.shape != (num_tokens, num_heads):
        raise ValueError(
            f"sumsq is {sumsq.dtype} {tuple(sumsq.shape)}, expected torch.float32 {(num_tokens, num_heads)}"
        )
    _check_device("sumsq", sumsq, qkv.device)


def _check_tokens(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}, expected the last dim contiguous")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, expected {device}")
