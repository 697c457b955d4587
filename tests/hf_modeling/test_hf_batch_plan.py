# SPDX-License-Identifier: Apache-2.0
"""How the tokens of a forward pass are cut into sequences, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minimax_plugin.hf_modeling.batch import LightningBatch, find_document_bounds

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("value", [1, 3])
def test_every_mask_value_but_zero_is_a_token(dtype: torch.dtype, value: int) -> None:
    mask = torch.tensor([[0, value, value, 0], [value, value, value, value], [0, 0, 0, value]]).to(dtype)
    batch = LightningBatch.build(3, 4, mask, CPU, cached=False)
    assert batch.plan is not None and batch.plan.cu_seqlens.tolist() == [0, 2, 6, 7]
    x = torch.randn(3, 4, 2, 6)
    packed = batch.pack(x)
    assert torch.equal(packed, x[mask != 0])
    assert torch.equal(batch.unpack(packed), x * (mask != 0)[:, :, None, None]), "padding must come out as zero"


@pytest.mark.parametrize("mask", [None, torch.ones(3, 1)], ids=["no-mask", "full-mask"])
def test_rows_of_one_token_are_sequences_of_their_own(mask: Tensor | None) -> None:
    """With a cache they decode, without one they are prompts: never one sequence of three tokens."""
    batch = LightningBatch.build(3, 1, mask, CPU, cached=False)
    assert batch.plan is not None and batch.plan.cu_seqlens.tolist() == [0, 1, 2, 3]
    assert LightningBatch.build(3, 1, mask, CPU, cached=True).plan is None


def test_padding_rows_of_a_decode_step_have_no_slot() -> None:
    batch = LightningBatch.build(3, 1, torch.tensor([[1], [0], [1]]), CPU, cached=True)
    assert batch.slots(CPU).tolist() == [0, -1, 2]
    assert LightningBatch.build(3, 1, None, CPU, cached=True).slots(CPU).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([[0, 1, 2, 3]], None),
        ([[7, 8, 9, 10]], None),
        ([[0, 1, 0, 1]], [0, 2, 4]),
        ([[0, 1, 1, 2]], [0, 2, 4]),
        ([[0, 1, 5, 6]], [0, 2, 4]),
        ([[0, 0, 0, 0]], [0, 1, 2, 3, 4]),
        ([[0, 1, 2, 3], [0, 1, 2, 0]], [0, 4, 7, 8]),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], [0, 2, 4, 8]),
        ([[3], [9]], None),
    ],
)
def test_a_document_starts_where_positions_do_not_go_up_by_one(
    positions: list[list[int]], bounds: list[int] | None
) -> None:
    found = find_document_bounds(torch.tensor(positions), None, len(positions), len(positions[0]))
    assert found == bounds


def test_one_row_of_positions_counts_for_every_row() -> None:
    assert find_document_bounds(torch.tensor([[0, 1, 0]]), None, 2, 3) == [0, 2, 3, 5, 6]


def test_bounds_go_before_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert find_document_bounds(positions, torch.tensor([0, 2, 6]), 1, 6) == [0, 2, 6]
    assert find_document_bounds(positions, torch.tensor([0, 6]), 1, 6) is None
    assert find_document_bounds(None, torch.tensor([0, 0, 6]), 1, 6) == [0, 0, 6]


@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [2, 4]])
def test_bounds_that_leave_tokens_out_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=f"runs from {bounds[0]} to {bounds[1]}, expected from 0 to 6 tokens"):
        find_document_bounds(None, torch.tensor(bounds), 1, 6)
