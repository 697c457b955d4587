# SPDX-License-Identifier: Apache-2.0
"""Padded and packed batches, in logits and in states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hf_helpers import assert_matches_oracle, make_pair, random_ids, relative_error, states_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, OracleCache
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel, StaticCache

from minimax_plugin.hf_modeling.batch import LightningBatch

LENGTHS = [70, 9, 1, 66]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Oracle]:
    return make_pair(tmp_path_factory.mktemp("batches"))


def padded(side: str) -> tuple[list[list[int]], Tensor, Tensor]:
    """Rows of :data:`LENGTHS` tokens, padded with a token that is not harmless, and their mask."""
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
    ids, mask = torch.full((len(rows), max(LENGTHS)), 17), torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(max(LENGTHS) - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return rows, ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["none", "from-mask"])
def test_padding_changes_neither_logits_nor_states(
    pair: tuple[PreTrainedModel, Oracle], side: str, positions: str
) -> None:
    rows, ids, mask = padded(side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if positions == "from-mask":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert_matches_oracle(pair[0], pair[1], rows, **inputs)


def test_padding_in_the_middle(pair: tuple[PreTrainedModel, Oracle]) -> None:
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.bool)
    mask[0, 10:17] = False
    mask[1, 39] = False
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [ids[i][mask[i]].tolist() for i in range(2)]
    assert_matches_oracle(pair[0], pair[1], rows, input_ids=ids, attention_mask=mask, position_ids=position_ids)


def test_left_padded_generation(pair: tuple[PreTrainedModel, Oracle]) -> None:
    model, oracle = pair
    rows, ids, mask = padded("left")
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for i, row in enumerate(rows):
        assert generated[i, ids.shape[1] :].tolist() == oracle.greedy(row, 8)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1], [0, 1, 1]])], ids=["dense", "padded"])
def test_a_batch_follows_layers_to_their_device(mask: Tensor | None) -> None:
    batch = LightningBatch.build(2, 3, mask, torch.device("cpu"), cached=False)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.plan is not None and moved.plan.cu_seqlens.device.type == "meta"
    assert moved.plan.segments.device.type == moved.plan.segment_offsets.device.type == "meta"
    assert mask is None or (moved.mask is not None and moved.mask.device.type == "meta")


def test_padding_token_by_token(pair: tuple[PreTrainedModel, Oracle]) -> None:
    """A step whose one token is padding in some rows must leave the states of those rows alone."""
    model, oracle = pair
    rows, ids, mask = padded("right")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for step in range(20):
            model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=cache)
    for i, row in enumerate(rows):
        expected = OracleCache()
        oracle(row[:20], expected)
        for layer, state in expected.states.items():
            assert relative_error(states_of(cache)[layer][i], state) <= 1e-5


@settings(max_examples=15)
@given(data=st.data())
def test_any_padding_in_any_chunks(pair: tuple[PreTrainedModel, Oracle], data: st.DataObject) -> None:
    """A batch fed through a cache chunk by chunk, one-token chunks of padding included, leaves the same states."""
    model, oracle = pair
    length = 24
    bits = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=2, max_size=2))
    mask = torch.tensor(bits)
    mask[:, data.draw(st.integers(0, length - 1))] = True
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    ids = random_ids(2, length)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            output = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop].long(),
                position_ids=position_ids[:, start:stop],
                past_key_values=cache,
            )
            logits.append(output.logits)
    for row in range(2):
        expected_cache = OracleCache()
        expected = oracle(ids[row][mask[row]].tolist(), expected_cache).logits
        assert (torch.cat(logits, dim=1)[row][mask[row]] - expected).abs().max() <= 1e-3
        for layer, state in expected_cache.states.items():
            assert relative_error(states_of(cache)[layer][row], state) <= 1e-5


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both", "cu_seq_lens-and-full-mask"])
def test_packed_documents_do_not_see_each_other(pair: tuple[PreTrainedModel, Oracle], how: str, training: bool) -> None:
    model, oracle = pair
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (30, 5, 1, 70)]
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([sum(rows, [])])}
    if how == "cu_seq_lens-and-full-mask":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if how in ("position_ids", "both"):
        inputs["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    if how != "position_ids":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 30, 35, 36, 106], dtype=torch.int32)
    with torch.set_grad_enabled(training):
        logits = model.train(training)(**inputs).logits[0]
    model.eval()
    expected = torch.cat([oracle(row).logits for row in rows])
    assert (logits - expected).abs().max() <= 1e-3


def test_packed_rows_of_a_batch(pair: tuple[PreTrainedModel, Oracle]) -> None:
    model, oracle = pair
    lengths = [[12, 28], [40]]
    ids = random_ids(2, 40)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        logits = model(ids, position_ids=position_ids).logits
    for row, parts in enumerate(lengths):
        expected = torch.cat([oracle(part.tolist()).logits for part in ids[row].split(parts)])
        assert (logits[row] - expected).abs().max() <= 1e-3


def test_flash_attention_is_told_the_bounds_of_packed_rows(pair: tuple[PreTrainedModel, Oracle]) -> None:
    """FlashAttention takes no mask, and reads ``position_ids`` for bounds only where the batch is one row."""
    model, oracle = pair

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        bounds = kwargs["cu_seq_lens_q"]
        assert mask is None and bounds.dtype == torch.int32
        assert torch.equal(bounds, kwargs["cu_seq_lens_k"])
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == bounds.diff().max()
        batch_size, _, length, _ = query.shape
        groups = query.shape[1] // key.shape[1]
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value))
        parts = [
            scaled_dot_product_attention(
                q[:, a:b],
                k[:, a:b].repeat_interleave(groups, 0),
                v[:, a:b].repeat_interleave(groups, 0),
                is_causal=True,
                scale=scaling,
            )
            for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (batch_size, length)), None

    AttentionInterface.register("packed_stand_in", attend)
    lengths = [[12, 28], [40]]
    ids = random_ids(2, 40)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    model.set_attn_implementation("packed_stand_in")
    try:
        with torch.no_grad():
            logits = model(ids, position_ids=position_ids).logits
            alone = model(ids[:1], cu_seq_lens_q=torch.tensor([0, 12, 40])).logits
    finally:
        model.set_attn_implementation("sdpa")
    for row, parts in enumerate(lengths):
        expected = torch.cat([oracle(part.tolist()).logits for part in ids[row].split(parts)])
        assert (logits[row] - expected).abs().max() <= 1e-3
        assert row or (alone[0] - expected).abs().max() <= 1e-3


def test_packed_documents_with_a_cache_are_refused(pair: tuple[PreTrainedModel, Oracle]) -> None:
    model = pair[0]
    with pytest.raises(ValueError, match="packed documents cannot continue a cache"):
        model(
            random_ids(1, 6),
            cu_seq_lens_q=torch.tensor([0, 2, 6]),
            past_key_values=DynamicCache(config=model.config),
        )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask has shape \(2, 1, 6, 6\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "expected one row"),
        (
            {
                "input_ids": random_ids(1, 6),
                "cu_seq_lens_q": torch.tensor([0, 3, 6]),
                "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            },
            "packed documents take no attention_mask",
        ),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        (
            {
                "attention_mask": torch.ones(2, 6),
                "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]]),
            },
            "row 1 of position_ids goes from 1 to 0 at token 2, but an attention_mask is given",
        ),
        ({"attention_mask": torch.ones(1, 6)}, r"attention_mask has shape \(1, 6\), expected \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask has shape \(2, 9\), expected \(2, 6\)"),
        (
            {"input_ids": random_ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 4, 2, 6])},
            r"cu_seq_lens_q decreases somewhere: \[0, 4, 2, 6\]",
        ),
    ],
    ids=[
        "4d-mask",
        "cu_seq_lens-of-a-batch",
        "cu_seq_lens-and-padding",
        "no-input",
        "packed-rows-with-a-mask",
        "mask-of-one-row",
        "mask-too-long",
        "decreasing-bounds",
    ],
)
def test_contradicting_inputs_are_refused(
    pair: tuple[PreTrainedModel, Oracle], inputs: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pair[0](**({"input_ids": random_ids(2, 6)} | inputs))


@pytest.mark.parametrize(
    "make_cache", [DynamicCache, partial(StaticCache, max_cache_len=12)], ids=["dynamic", "static"]
)
@pytest.mark.parametrize("width", [4, 12], ids=["new-tokens-only", "whole-cache"])
def test_mask_that_does_not_cover_the_cached_tokens_is_refused(
    pair: tuple[PreTrainedModel, Oracle], make_cache: Callable[..., Cache], width: int
) -> None:
    model = pair[0]
    ids, cache = random_ids(2, 10), make_cache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match=rf"\(2, {width}\), expected \(2, 10\): 6 cached and 4 new"):
            model(ids[:, 6:], attention_mask=torch.ones(2, width), past_key_values=cache)


def test_mask_between_pairs_of_tokens_is_refused_while_tracing_too(pair: tuple[PreTrainedModel, Oracle]) -> None:
    compiled = torch.compile(pair[0], backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 6, 6\), expected \[batch"):
        compiled(random_ids(2, 6), attention_mask=torch.ones(2, 1, 6, 6), use_cache=False)
    torch.compiler.reset()


def test_bounds_that_miss_tokens_are_refused(pair: tuple[PreTrainedModel, Oracle]) -> None:
    with pytest.raises(ValueError, match="expected from 0 to 6 tokens"):
        pair[0](random_ids(1, 6), cu_seq_lens_q=torch.tensor([0, 2, 5]))


def test_compiled_training_step_masks_left_padding(pair: tuple[PreTrainedModel, Oracle]) -> None:
    model, oracle = pair
    rows, ids, mask = padded("left")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
    torch.compiler.reset()
    for i, row in enumerate(rows):
        assert (logits[i, -len(row) :] - oracle(row).logits).abs().max() <= 1e-3
