# SPDX-License-Identifier: Apache-2.0
"""How the tokens of one forward pass are cut into sequences for the lightning layers; built once, shared by all layers.

Lightning attention has no attention mask: a padding token that reaches the kernel still decays the state, and a packed
document that is not cut off still sees the one before it. So padding is taken out and documents are cut apart before
the kernel runs.

Shapes: ``B`` batch, ``T`` tokens per row, ``P`` tokens that are not padding, ``N`` sequences, ``H`` heads, ``D``
head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minimax_plugin.kernels.ops import LightningPlan

_PLAN_TENSORS = ("cu_seqlens", "segments", "segment_offsets")


@dataclass(frozen=True)
class LightningBatch:
    """The tokens ``[B, T]`` of one forward pass as sequences.

    Attributes:
        batch_size, length: B and T.
        mask: [B, T] bool, True for tokens; None where nothing is padding.
        plan: sequences and segments of the P tokens; None for one token per row with a cache, which takes no plan.
        token_index: [P] int64, places of the tokens in the flattened [B * T]; None where nothing is taken out.
        zero_padding: padding is multiplied by zero instead of taken out. Only while a graph is traced, where the number
            of tokens cannot depend on data. Outputs are right for any padding, states for left padding.
    """

    batch_size: int
    length: int
    mask: Tensor | None = None
    plan: LightningPlan | None = None
    token_index: Tensor | None = None
    zero_padding: bool = False

    @classmethod
    def build(
        cls, batch_size: int, length: int, mask: Tensor | None, device: torch.device, *, cached: bool
    ) -> LightningBatch:
        """One sequence per row.

        Args:
            batch_size, length: B and T.
            mask: [B, T], nonzero for tokens, zero for padding on either side or in between; None for no padding.
            device: device of the tokens.
            cached: the rows continue the states of a cache.
        """
        if mask is not None:
            mask = mask.to(device) != 0
        if cached and length == 1:
            return cls(batch_size, length, mask)
        uniform = LightningPlan.uniform(batch_size, length, device=device)
        if mask is None:
            return cls(batch_size, length, None, uniform)
        if torch.compiler.is_compiling():
            return cls(batch_size, length, mask, uniform, zero_padding=True)
        counts = mask.sum(dim=1).tolist()
        if sum(counts) == batch_size * length:
            return cls(batch_size, length, None, uniform)
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        index = mask.flatten().nonzero().squeeze(1)
        return cls(batch_size, length, mask, LightningPlan.build(bounds, device=device), index)

    @classmethod
    def build_packed(cls, batch_size: int, length: int, bounds: Sequence[int], device: torch.device) -> LightningBatch:
        """Several documents per row; ``bounds`` are the N + 1 document bounds in the flattened [B * T]."""
        return cls(batch_size, length, None, LightningPlan.build(bounds, device=device))

    def to(self, device: torch.device, non_blocking: bool = False) -> LightningBatch:
        """The same on another device, for models whose layers are spread over several."""
        own = {"mask": self.mask, "token_index": self.token_index}
        of_plan = {name: getattr(self.plan, name) for name in _PLAN_TENSORS} if self.plan else {}
        if all(tensor is None or tensor.device == device for tensor in (*own.values(), *of_plan.values())):
            return self

        def move(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
            return {n: t if t is None else t.to(device, non_blocking=non_blocking) for n, t in tensors.items()}

        return replace(self, **move(own), plan=replace(self.plan, **move(of_plan)) if self.plan else None)

    def pack(self, qkv: Tensor) -> Tensor:
        """``[B, T, H, 3D]`` -> ``[P, H, 3D]``."""
        if self.zero_padding and self.mask is not None:
            # SiLU maps zero to zero, so these keys add nothing to a state.
            qkv = qkv * self.mask[:, :, None, None].to(qkv.dtype)
        flat = qkv.flatten(0, 1)
        return flat if self.token_index is None else flat.index_select(0, self.token_index)

    def unpack(self, out: Tensor) -> Tensor:
        """``[P, H, D]`` -> ``[B, T, H, D]``, zero at padding."""
        if self.token_index is not None:
            rows = self.batch_size * self.length
            out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, self.token_index, out)
        return out.view(self.batch_size, self.length, *out.shape[1:])

    def slots(self, device: torch.device) -> Tensor:
        """[B] int64: the slot of each row, -1 for rows of a decode step whose one token is padding."""
        slots = torch.arange(self.batch_size, device=device)
        if self.plan is None and self.mask is not None:
            slots = torch.where(self.mask[:, 0], slots, -1)
        return slots


def find_document_bounds(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, batch_size: int, length: int
) -> list[int] | None:
    """Bounds of packed documents in the flattened ``[B * T]``, or None where every row is one document.

    Args:
        position_ids: [B, T] or [1, T]; a document starts wherever the position does not go up by one.
        cu_seq_lens: [N + 1] bounds as FlashAttention takes them, only with B = 1. Goes before ``position_ids``.
        batch_size, length: B and T.

    Raises:
        ValueError: ``cu_seq_lens`` with more than one row, or bounds that decrease or do not end at T.
    """
    if cu_seq_lens is not None:
        if batch_size != 1:
            raise ValueError(f"cu_seq_lens_q with a batch of {batch_size} rows, expected one row that holds all")
        bounds = [int(bound) for bound in cu_seq_lens.tolist()]
        if bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(f"cu_seq_lens_q runs from {bounds[0]} to {bounds[-1]}, expected from 0 to {length} tokens")
        if any(start > stop for start, stop in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"cu_seq_lens_q decreases somewhere: {bounds}")
        return bounds if len(bounds) > 2 else None
    if position_ids is None or length == 1:
        return None
    starts = position_ids.expand(batch_size, length).diff(dim=1) != 1
    places = starts.nonzero().tolist()
    if not places:
        return None
    first = {row * length for row in range(batch_size)}
    return sorted(first | {row * length + column + 1 for row, column in places}) + [batch_size * length]


def check_unpacked(position_ids: Tensor, mask: Tensor) -> None:
    """Refuse positions that start a new document between two tokens of a row that comes with a mask.

    Neither kind of layer would cut the row there. Jumps at padding are no documents.

    Args:
        position_ids: [B, T] or [1, T].
        mask: [B, T], zero for padding.

    Raises:
        ValueError: names the first such place.
    """
    tokens = mask.to(position_ids.device) != 0
    positions = position_ids.expand(tokens.shape)
    places = ((positions.diff(dim=1) != 1) & tokens[:, 1:] & tokens[:, :-1]).nonzero()
    if places.shape[0]:
        row, column = places[0].tolist()
        before, after = positions[row, column : column + 2].tolist()
        raise ValueError(
            f"row {row} of position_ids goes from {before} to {after} at token {column + 1}, but an attention_mask is "
            "given: to pack documents, pass position_ids without a mask; otherwise count up by one"
        )


def flash_attention_bounds(bounds: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Bounds of packed documents in the flattened ``[B * T]`` as the FlashAttention interface takes them.

    It builds no mask, and by itself reads bounds out of ``position_ids`` only where the batch is one row.
    """
    cu_seq_lens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def positions_from_bounds(bounds: Sequence[int], batch_size: int, length: int, device: torch.device) -> Tensor:
    """``[B, T]`` positions that start from 0 in every document."""
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)])
    return positions.view(batch_size, length).to(device)
