# SPDX-License-Identifier: Apache-2.0
"""Where the laws of lightning attention are tested, how, and how near the results must come.

Shared by ``lightning_laws.py`` and ``gradient_laws.py``. The oracle is always the float64 recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recurrence import recurrence, split_heads
from torch import Tensor

from minimax_plugin.kernels import ops

#: The fastest head of the first layer and the slowest head of the last lightning layer of the released model.
FASTEST, SLOWEST = 0.917, 4.95e-5

#: Values of one head below which rounding errors may line up instead of averaging out, and how much more they may be.
FEW = ((100, 3.0), (1000, 1.5))


@dataclass(frozen=True)
class Setting:
    """Where and how small: sizes and the error that the arithmetic of ``dtype`` and ``precision`` may have."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "default"
    exact_states: bool = True
    head_dim: int = 32
    segment: int = 64
    slopes: tuple[float, ...] = (FASTEST, SLOWEST)

    @property
    def num_heads(self) -> int:
        return len(self.slopes)

    @property
    def output_error(self) -> float:
        return 1e-6 if self.dtype == torch.float32 else 3e-3

    @property
    def state_error(self) -> float:
        return 1e-6 if self.exact_states else 3e-3

    @property
    def gradient_error(self) -> float:
        return 1e-5 if self.dtype == torch.float32 else 5e-3

    def slopes_tensor(self) -> Tensor:
        return torch.tensor(self.slopes, dtype=torch.float32, device=self.device)

    def qkv(self, num_tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_tokens, self.num_heads, 3 * self.head_dim)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def states(self, count: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, self.num_heads, self.head_dim, self.head_dim)
        return torch.randn(shape, generator=generator).to(self.device)

    def plan(self, *lengths: int, computed: list[int] | None = None) -> ops.LightningPlan:
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return ops.LightningPlan.build(bounds, computed, device=self.device, segment=self.segment)

    def lengths(self) -> tuple[int, ...]:
        """Empty, one token, around a chunk, around a segment, several ragged segments."""
        edges = (0, 1, 63, 64, 65, self.segment - 1, self.segment, self.segment + 1, 3 * self.segment + 7)
        return tuple(sorted(set(edges)))


@dataclass
class Run:
    """Result of one prefill."""

    out: Tensor
    pool: Tensor
    sumsq: Tensor


def prefill(
    setting: Setting,
    qkv: Tensor,
    pool: Tensor,
    lengths: tuple[int, ...],
    slots: list[int],
    *,
    has_initial: list[bool] | None = None,
    computed: list[int] | None = None,
    checkpoints: list[int] | None = None,
    null_slot: int = -1,
) -> Run:
    """Prefill on a copy of ``pool``; outputs start as NaN so that a row nobody wrote is seen."""
    device = setting.device
    num_tokens, num_heads, width = qkv.shape
    out = torch.full((num_tokens, num_heads, width // 3), float("nan"), dtype=qkv.dtype, device=device)
    sumsq = torch.full((num_tokens, num_heads), float("nan"), device=device)
    pool = pool.clone()
    flags = [True] * len(slots) if has_initial is None else has_initial
    ops.lightning_prefill(
        qkv,
        setting.slopes_tensor(),
        pool,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(flags, device=device, dtype=torch.bool),
        setting.plan(*lengths, computed=computed),
        out=out,
        sumsq=sumsq,
        checkpoint_slots=None if checkpoints is None else torch.tensor(checkpoints, dtype=torch.int32, device=device),
        precision=setting.precision,
        null_slot=null_slot,
    )
    return Run(out, pool, sumsq)


def decode(setting: Setting, qkv: Tensor, pool: Tensor, slots: list[int], null_slot: int = -1) -> Tensor:
    """One decode step in place on ``pool``."""
    out = torch.full((*qkv.shape[:2], setting.head_dim), float("nan"), dtype=qkv.dtype, device=setting.device)
    slot_ids = torch.tensor(slots, dtype=torch.int32, device=setting.device)
    ops.lightning_decode(qkv, setting.slopes_tensor(), pool, slot_ids, out=out, null_slot=null_slot)
    return out


def oracle(setting: Setting, qkv: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float64 recurrence on the activated inputs as the released module rounds them."""
    q, k, v = split_heads(qkv.cpu())
    return recurrence(q, k, v, setting.slopes_tensor().cpu(), None if initial is None else initial.cpu())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in the Euclidean norm."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(name: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Every head by itself: a wrong fast head must not hide behind the large values of a slow one."""
    axis = 0 if "state" in name else -2
    values = expected.numel() // max(expected.shape[axis], 1)
    bound *= next((factor for limit, factor in FEW if values < limit), 1.0)
    for head in range(expected.shape[axis]):
        error = relative_error(found.select(axis, head), expected.select(axis, head))
        assert error <= bound, f"{name}, head {head}: relative error {error:.2e}, expected at most {bound:.0e}"
