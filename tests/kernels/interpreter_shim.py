# SPDX-License-Identifier: Apache-2.0
"""Make bf16 right in Triton's interpreter, and its remaining traps loud.

The interpreter of Triton 3.6 to 3.9 keeps bf16 as the 16 bits in a uint16 array. A product of such tiles multiplies the
bit patterns, arithmetic on them does too, and a cast from fp32 truncates instead of rounding to nearest even, all in
silence. :func:`install` widens the operands of products, rounds casts, and turns any other bf16 arithmetic into an
error. Call it after ``TRITON_INTERPRET=1`` is set and before the first launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def install() -> None:
    """Patch ``InterpreterBuilder``; a second call changes nothing."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "bf16_is_right", False):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after == tl.float32:
            return TensorHandle(widen(source.data), tl.float32)
        if before == tl.float32 and after == tl.bfloat16:
            return TensorHandle(round_to_bf16(source.data), tl.bfloat16)
        if tl.bfloat16 in (before, after) and before != after:
            raise TypeError(f"cast from {before} to {after}: go through fp32")
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        _refuse_bf16(left, right)
        return binary(self, left, right, op)

    def unary_op(self: Any, argument: Any, op: Any) -> Any:
        _refuse_bf16(argument)
        return unary(self, argument, op)

    def _refuse_bf16(*handles: Any) -> None:
        if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
            raise TypeError("arithmetic in bf16: cast to fp32 first")

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op, unary_op
    InterpreterBuilder.bf16_is_right = True


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) as fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
