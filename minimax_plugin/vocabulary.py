# SPDX-License-Identifier: Apache-2.0
"""Which ids a model must not generate because they stand for nothing; one decision for both backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimax_plugin.architecture import RELEASED_VOCAB_SIZE, VOCAB_PADDING_START

#: Config entry, true where it is absent. Who has trained the padding of the vocabulary as tokens sets it to false.
MASK_SWITCH = "mask_vocab_padding"

_PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Columns that are looked at first: a row that was trained is told from padding without reading all of it.
_FIRST_COLUMNS = 8
_ROWS_AT_A_TIME = 1024


def padding_ids(config: Any, embedding: Tensor | None) -> list[int]:
    """Ids that belong to no token, ascending: rows that were never trained, and the end of the released vocabulary.

    A vocabulary is rounded up with rows of zeros, and a model gives such an id a logit of nothing in particular, 0
    with a tied head. llama.cpp's converter suppresses the same rows, from the tokenizer's size on. Which rows of the
    released embedding are zero could not be seen here, so that its last 32 ids are suppressed whatever they hold.

    Args:
        config: of the model; :data:`MASK_SWITCH` set to false empties the list.
        embedding: ``[vocabulary, hidden]``, or None if its values are not at hand.
    """
    if not getattr(config, MASK_SWITCH, True):
        return []
    released = config.vocab_size == RELEASED_VOCAB_SIZE
    ids = set(range(VOCAB_PADDING_START, RELEASED_VOCAB_SIZE) if released else ())
    return sorted(ids | set(zero_rows(embedding)))


def zero_rows(embedding: Tensor | None) -> list[int]:
    """Rows of ``[vocabulary, hidden]`` that are all zeros; none if all of them are, or if the weights are quantised."""
    if embedding is None or embedding.is_meta or embedding.dtype not in _PLAIN_DTYPES or embedding.ndim != 2:
        return []
    suspects = (embedding[:, :_FIRST_COLUMNS] == 0).all(dim=1).nonzero().flatten()
    found = [rows[(embedding[rows] == 0).all(dim=1)] for rows in suspects.split(_ROWS_AT_A_TIME)]
    ids = torch.cat([*found, suspects[:0]]).tolist()
    return ids if len(ids) < embedding.shape[0] else []
