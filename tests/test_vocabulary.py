# SPDX-License-Identifier: Apache-2.0
"""Ids that stand for nothing: rows of zeros, and the end of the released vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_plugin.architecture import EOS_TOKEN_ID, RELEASED_VOCAB_SIZE
from minimax_plugin.vocabulary import padding_ids, zero_rows


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 20),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_of_zeros_are_found(rows: int, columns: int, data: st.DataObject, dtype: torch.dtype) -> None:
    zeros = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    embedding = torch.zeros(rows, columns, dtype=dtype)
    for row in range(rows):
        if row not in zeros:  # one value anywhere makes a row one that was trained
            embedding[row, data.draw(st.integers(0, columns - 1))] = -1.0
    assert zero_rows(embedding) == sorted(zeros)


def test_more_rows_than_are_read_at_once() -> None:
    embedding = torch.zeros(5000, 16)
    embedding[:100, 15] = 1
    embedding[2048, 15] = 1
    assert zero_rows(embedding) == [row for row in range(100, 5000) if row != 2048]


@pytest.mark.parametrize(
    "embedding",
    [
        None,
        torch.zeros(4, 8),  # not loaded yet: says nothing
        torch.empty(4, 8, device="meta"),
        torch.tensor([[1], [0]], dtype=torch.int8),  # quantised
        torch.tensor([1.0, 0.0]),
        torch.full((4, 8), float("nan")),
    ],
)
def test_nothing_is_read_into_other_weights(embedding: torch.Tensor | None) -> None:
    assert zero_rows(embedding) == []
    assert padding_ids(SimpleNamespace(vocab_size=4), embedding) == []


def test_end_of_the_released_vocabulary() -> None:
    config = SimpleNamespace(vocab_size=RELEASED_VOCAB_SIZE)
    fixed = list(range(200_032, 200_064))
    assert padding_ids(config, None) == fixed
    embedding = torch.ones(RELEASED_VOCAB_SIZE, 1)
    embedding[[200_024, 200_040]] = 0
    assert padding_ids(config, embedding) == [200_024, *fixed]
    assert EOS_TOKEN_ID not in fixed
    config.mask_vocab_padding = False
    assert padding_ids(config, embedding) == []
