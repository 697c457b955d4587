# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""RMSNorm over all heads and the sigmoid gate in one pass, and the form that shares the all-reduce of the projection.

Shapes: ``T`` rows, ``W`` channels of this rank (its heads times head_dim), ``M`` hidden size.

The layer ends in ``y = (weight * rmsnorm(o) * sigmoid(gate)) @ out_weight^T``. With heads split over ranks the norm
needs the sum of squares of all ranks before the projection, a second collective beside the sum of the projections. But
the norm only scales each row, and a row scale commutes with the projection::

    y = rsqrt(sum_r |o_r|^2 / size + eps) * sum_r (weight_r * o_r * sigmoid(gate_r)) @ out_weight_r^T

so the sum of squares can ride in the same all-reduce: :func:`single_collective_projection`. It rounds at other places
than the released module, hence it is an option. fp16 is refused there: rows that are not normed yet can overflow it.
"""

from typing import Any

import torch
from torch import Tensor

from minimax_plugin.kernels.dispatch import lightning_backend
from minimax_plugin.kernels.launch_config import LAUNCH_OPTIONS, LaunchConfig, on_device
from minimax_plugin.kernels.optional_triton import HAS_TRITON, tl, triton

LOG2E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634

#: Channels of one program where the sum of squares is given, so that a row can be shared out.
SPLIT_BLOCK = 1024


@torch.library.custom_op("minimax_plugin::gated_rmsnorm", mutates_args=())
def gated_rmsnorm(o: Tensor, gate: Tensor, weight: Tensor, eps: float, sumsq: Tensor | None, norm_size: int) -> Tensor:
    """:func:`minimax_plugin.kernels.ops.gated_rmsnorm` as one kernel, bit for bit the roundings of the reference.

    Differentiable in all tensors; the backward is plain PyTorch in fp32.

    Args:
        o, gate: [..., W].
        weight: [W].
        sumsq: [...] or [..., 1] fp32, or None to take them from ``o``.
        norm_size: channels that ``sumsq`` covers; W where it is None.
    """
    width = o.shape[-1]
    out = torch.empty(o.shape, dtype=_result_dtype(o, gate, weight), device=o.device)
    rows, gates = _rows(o), _rows(gate)
    if rows.shape[0] == 0:
        return out
    flat = None if sumsq is None else sumsq.reshape(-1).contiguous()
    block, warps = _tile(width, sumsq is not None)
    with on_device(o.device):
        _gated_rmsnorm[(rows.shape[0], triton.cdiv(width, block))](
            rows,
            gates,
            weight.contiguous(),
            flat,
            out,
            None,
            rows.stride(0),
            gates.stride(0),
            WIDTH=width,
            SIZE=norm_size,
            EPS=eps,
            BLOCK=block,
            num_warps=warps,
            **LAUNCH_OPTIONS,
        )
    return out


@gated_rmsnorm.register_fake
def _(o: Tensor, gate: Tensor, weight: Tensor, eps: float, sumsq: Tensor | None, norm_size: int) -> Tensor:
    return torch.empty(o.shape, dtype=_result_dtype(o, gate, weight), device=o.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, gate, weight, ctx.eps, sumsq, ctx.norm_size = inputs
    ctx.save_for_backward(o, gate, weight, sumsq)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    o, gate, weight, sumsq = ctx.saved_tensors
    wide, scale = o.float(), weight.float()
    squares = wide.square().sum(-1, keepdim=True) if sumsq is None else sumsq.reshape(*o.shape[:-1], 1)
    inverse = torch.rsqrt(squares / ctx.norm_size + ctx.eps)
    opened = torch.sigmoid(gate.float())
    normed = wide * inverse
    grad = grad.float()
    grad_normed = grad * opened * scale
    grad_squares = (grad_normed * wide).sum(-1, keepdim=True) * inverse.pow(3) * (-0.5 / ctx.norm_size)
    grad_o = grad_normed * inverse
    if sumsq is None:
        grad_o = grad_o + 2 * wide * grad_squares
    grad_gate = grad * scale * normed * opened * (1 - opened)
    grad_weight = (grad * opened * normed).reshape(-1, o.shape[-1]).sum(0)
    return (
        grad_o.to(o.dtype),
        grad_gate.to(gate.dtype),
        grad_weight.to(weight.dtype),
        None,
        None if sumsq is None else grad_squares.reshape(sumsq.shape),
        None,
    )


gated_rmsnorm.register_autograd(_backward, setup_context=_setup_context)


def single_collective_projection(
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    out_weight: Tensor,
    eps: float,
    *,
    norm_size: int | None = None,
    group: Any = None,
) -> Tensor:
    """Gated norm and output projection of heads split over ranks, with one all-reduce instead of two. Inference only.

    Args:
        o, gate: [..., W] of this rank, fp32 or bf16; gate before the sigmoid.
        weight: [W] of this rank.
        out_weight: [M, W] of this rank (its columns of the projection).
        eps: ``architecture.LIGHTNING_NORM_EPS``.
        norm_size: channels of all ranks; None means W times the size of the group.
        group: a ``torch.distributed`` process group, or None where one rank holds all heads.

    Returns:
        [..., M] like ``o``, equal on every rank. The all-reduce carries ``M + 1`` fp32 numbers per row: a sum of
        squares rounded to bf16 would scale the whole row wrongly by up to 2^-10.

    Raises:
        ValueError: shapes do not fit, or the dtype is fp16.
    """
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if out_weight.dim() != 2 or out_weight.shape[1] != o.shape[-1]:
        raise ValueError(f"out_weight has shape {tuple(out_weight.shape)}, expected [M, {o.shape[-1]}]")
    gated, sumsq = gate_before_norm(o, gate, weight)
    packed = pack_for_reduce(torch.nn.functional.linear(gated, out_weight), sumsq)
    if group is not None:
        torch.distributed.all_reduce(packed, group=group)
    return norm_after_reduce(packed, eps, norm_size or ranks * o.shape[-1]).to(o.dtype)


def gate_before_norm(o: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight * o * sigmoid(gate)`` [..., W] like ``o``, and the sums of squares of ``o`` [...] fp32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the dtype is fp16.
    """
    if o.shape != gate.shape or weight.shape != o.shape[-1:] or o.dtype != gate.dtype:
        raise ValueError(
            f"gate_before_norm got o {o.dtype} {tuple(o.shape)}, gate {gate.dtype} {tuple(gate.shape)}, weight "
            f"{tuple(weight.shape)}; expected o and gate alike and weight of their last dim"
        )
    if o.dtype == torch.float16:
        raise ValueError("o is torch.float16, expected bf16 or fp32: before its norm a row can overflow fp16")
    if lightning_backend(o.device) == "triton":
        return torch.ops.minimax_plugin.gate_before_norm(o, gate, weight)
    wide = o.float()
    return (wide * weight.float() * torch.sigmoid(gate.float())).to(o.dtype), wide.square().sum(-1)


def pack_for_reduce(projected: Tensor, sumsq: Tensor) -> Tensor:
    """``projected`` [..., M] and ``sumsq`` [...] as one fp32 tensor [..., M + 1] to be summed over the ranks."""
    return torch.cat([projected.float(), sumsq.unsqueeze(-1)], dim=-1)


def norm_after_reduce(packed: Tensor, eps: float, norm_size: int) -> Tensor:
    """The normed rows [..., M] fp32 from the sum of :func:`pack_for_reduce` over the ranks."""
    return packed[..., :-1] * torch.rsqrt(packed[..., -1:] / norm_size + eps)


@torch.library.custom_op("minimax_plugin::gate_before_norm", mutates_args=())
def _gate_before_norm(o: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    width = o.shape[-1]
    out = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    sumsq = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    rows, gates = _rows(o), _rows(gate)
    if rows.shape[0] == 0:
        return out, sumsq
    block, warps = _tile(width, False)
    with on_device(o.device):
        _gated_rmsnorm[(rows.shape[0], 1)](
            rows,
            gates,
            weight.contiguous(),
            None,
            out,
            sumsq,
            rows.stride(0),
            gates.stride(0),
            WIDTH=width,
            SIZE=width,
            EPS=0.0,
            BLOCK=block,
            num_warps=warps,
            **LAUNCH_OPTIONS,
        )
    return out, sumsq


@_gate_before_norm.register_fake
def _(o: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(o.shape, dtype=o.dtype, device=o.device), o.new_empty(o.shape[:-1], dtype=torch.float32)


def launch_configs(architecture: str) -> list[LaunchConfig]:
    """Every form of the kernel at the widths of MiniMax-M1 on 1 and 8 ranks; the same on every architecture."""
    configs = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for width in (8192, 1024):
            for form, sumsq, sumsq_out in (("", None, None), (" sumsq", torch.float32, None), (" deferred", None, 1)):
                if dtype == torch.float16 and sumsq_out:
                    continue
                block, warps = _tile(width, sumsq is not None)
                configs.append(
                    LaunchConfig(
                        name=f"norm {width} {name}{form}",
                        kernel=_gated_rmsnorm,
                        arguments={
                            "o_ptr": dtype,
                            "gate_ptr": dtype,
                            "weight_ptr": dtype,
                            "sumsq_ptr": sumsq,
                            "out_ptr": dtype,
                            "sumsq_out_ptr": torch.float32 if sumsq_out else None,
                            "o_row": width,
                            "gate_row": width,
                        },
                        constants={"WIDTH": width, "SIZE": 8192, "EPS": 1e-6, "BLOCK": block},
                        num_warps=warps,
                    )
                )
    return configs


def _rows(x: Tensor) -> Tensor:
    """[T, W] with contiguous rows; a view wherever the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _result_dtype(o: Tensor, gate: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(o.dtype, weight.dtype), gate.dtype)


def _tile(width: int, split: bool) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    if split:
        block = min(block, SPLIT_BLOCK)
    return block, max(1, min(16, block // 512))


@triton.jit
def _gated_rmsnorm(
    o_ptr,
    gate_ptr,
    weight_ptr,
    sumsq_ptr,
    out_ptr,
    sumsq_out_ptr,
    o_row,
    gate_row,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or a block of it where its sum of squares is given; not normed where ``sumsq_out_ptr`` is given."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    o = tl.load(o_ptr + row * o_row + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp2(gate * -LOG2E))
    if sumsq_out_ptr is not None:
        tl.store(sumsq_out_ptr + row, tl.sum(o * o, axis=0))
        result = o * weight * opened
    else:
        squares = tl.sum(o * o, axis=0) if sumsq_ptr is None else tl.load(sumsq_ptr + row)
        normed = (o * tl.rsqrt(squares / SIZE + EPS)).to(o_ptr.dtype.element_ty).to(tl.float32)
        scaled = weight * normed
        if weight_ptr.dtype.element_ty == o_ptr.dtype.element_ty:
            scaled = scaled.to(o_ptr.dtype.element_ty).to(tl.float32)
        result = scaled * opened.to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, result.to(out_ptr.dtype.element_ty), mask=inside)
