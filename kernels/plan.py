# SPDX-License-Identifier: Apache-2.0
"""The plan of one step: how packed tokens are cut into sequences and parallel segments.

Shapes: ``T`` tokens, ``N`` sequences, ``G`` segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens of one parallel segment. The batch-invariant grid is fixed to it.
SEGMENT = 1024

#: A segment is a whole number of the smallest chunk that any kernel configuration uses.
SEGMENT_MULTIPLE = 16

#: Segments that :func:`suggest_segment` chooses from. Below 256 the extra state traffic (two reads and two writes of
#: 64 KiB per head and segment) passes that of the tokens themselves.
_SEGMENT_CHOICES = (256, 512, 1024, 2048, 4096)

#: Thread blocks that keep a large GPU busy: two for each of the 132 multiprocessors of an H200.
_ENOUGH_BLOCKS = 264


@dataclass(frozen=True)
class LightningPlan:
    """How the tokens of one step are cut into sequences and segments; built once per step, shared by all layers.

    Attributes:
        cu_seqlens: [N + 1] int32 on the device of the tokens, from 0 to T.
        segments: [G, 3] int32, rows ``(sequence, start, stop)``, in time order within each sequence, none empty.
        segment_offsets: [N + 1] int32; the segments of sequence n are rows ``segment_offsets[n]`` up to
            ``segment_offsets[n + 1]``.
        max_segments: largest number of segments of one sequence (host integer).
        num_tokens: T (host integer).
    """

    cu_seqlens: Tensor
    segments: Tensor
    segment_offsets: Tensor
    max_segments: int
    num_tokens: int

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        num_computed: Tensor | Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        segment: int = SEGMENT,
    ) -> LightningPlan:
        """Plan from host metadata: no device synchronisation, one upload.

        Segment borders lie on multiples of ``segment`` counted from the absolute position 0 of each sequence, so they
        depend on nothing but the sequence itself: with a fixed ``segment`` a sequence gives the same bits in any batch.
        A caller that does not need this may pass :func:`suggest_segment`.

        Args:
            cu_seqlens: [N + 1] integers on the host, starting at 0, never decreasing.
            num_computed: [N] tokens of each sequence that are already in its state; None means none.
            device: where the kernels will run.
            segment: tokens of a segment, a positive multiple of 16; multiples of 64 waste no part of a chunk.

        Raises:
            ValueError: the lengths or the segment size are not as described.
        """
        bounds = _host_list("cu_seqlens", cu_seqlens)
        if not bounds or bounds[0] != 0:
            raise ValueError(f"cu_seqlens starts with {bounds[:1]}, expected [0]")
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"cu_seqlens decreases somewhere: {bounds}")
        if segment <= 0 or segment % SEGMENT_MULTIPLE:
            raise ValueError(f"segment is {segment}, expected a positive multiple of {SEGMENT_MULTIPLE}")
        num_sequences = len(bounds) - 1
        computed = [0] * num_sequences if num_computed is None else _host_list("num_computed", num_computed)
        if len(computed) != num_sequences or any(n < 0 for n in computed):
            raise ValueError(f"num_computed is {computed}, expected {num_sequences} integers >= 0")
        rows, offsets = _cut(bounds, computed, segment)
        cu, segments, segment_offsets = _upload((bounds, rows, offsets), device)
        return cls(
            cu_seqlens=cu,
            segments=segments.reshape(-1, 3),
            segment_offsets=segment_offsets,
            max_segments=max((b - a for a, b in zip(offsets, offsets[1:], strict=False)), default=0),
            num_tokens=bounds[-1],
        )

    @classmethod
    def uniform(
        cls, batch: int, length: int, *, device: torch.device | str = "cpu", segment: int = SEGMENT
    ) -> LightningPlan:
        """Plan of ``batch`` sequences of ``length`` tokens each, made on the device and traceable by torch.compile."""
        per_sequence = (length + segment - 1) // segment
        index = torch.arange(batch * per_sequence, device=device, dtype=torch.int32)
        sequence = torch.div(index, max(per_sequence, 1), rounding_mode="floor")
        start = sequence * length + (index - sequence * per_sequence) * segment
        stop = torch.minimum(start + segment, (sequence + 1) * length)
        bounds = torch.arange(batch + 1, device=device, dtype=torch.int32)
        return cls(
            cu_seqlens=bounds * length,
            segments=torch.stack([sequence, start, stop], dim=1),
            segment_offsets=bounds * per_sequence,
            max_segments=per_sequence,
            num_tokens=batch * length,
        )


def suggest_segment(num_tokens: int, num_heads: int, blocks_per_head: int = 2) -> int:
    """Largest segment that still gives a large GPU enough thread blocks for ``num_tokens`` in ``num_heads`` heads.

    Not batch-invariant: the answer depends on everything in the step.
    """
    fitting = [s for s in _SEGMENT_CHOICES if -(-num_tokens // s) * num_heads * blocks_per_head >= _ENOUGH_BLOCKS]
    return max(fitting, default=_SEGMENT_CHOICES[0])


def _cut(bounds: list[int], computed: list[int], segment: int) -> tuple[list[int], list[int]]:
    rows: list[int] = []
    offsets = [0]
    for n, done in enumerate(computed):
        start, stop = bounds[n], bounds[n + 1]
        shift = done - start
        while start < stop:
            end = min(stop, start + segment - (start + shift) % segment)
            rows += (n, start, end)
            start = end
        offsets.append(len(rows) // 3)
    return rows, offsets


def _host_list(name: str, values: Tensor | Sequence[int]) -> list[int]:
    if not isinstance(values, Tensor):
        return list(values)
    if values.device.type != "cpu":
        raise ValueError(
            f"LightningPlan.build got {name} on {values.device}, expected host memory: reading it from the device "
            "would synchronise every step"
        )
    return values.tolist()


def _upload(lists: tuple[list[int], ...], device: torch.device | str) -> tuple[Tensor, ...]:
    """The lists as int32 tensors on ``device``, all in one copy."""
    packed = torch.tensor([value for values in lists for value in values], dtype=torch.int32)
    if torch.device(device).type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return packed.split([len(values) for values in lists])
