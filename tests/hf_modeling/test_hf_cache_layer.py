# SPDX-License-Identifier: Apache-2.0
"""One cache layer by itself, against the recurrence: what it records, takes back, and lets gradients through."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import relative_error
from recurrence import recurrence, split_heads
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minimax_plugin.hf_modeling.batch import LightningBatch
from minimax_plugin.hf_modeling.cache import CountingLightningCacheLayer, LightningCacheLayer, adopt_cache


def lightning_layer(batch: int, length: int, *, record: bool = True) -> tuple[LightningCacheLayer, Tensor, Tensor]:
    """An empty cache layer, projections [B, T, 2, 3 * 8], and slopes."""
    layer = LightningCacheLayer()
    layer.record_past = record
    return layer, torch.randn(batch, length, 2, 24), torch.tensor([0.9, 0.01])


def attend(layer: LightningCacheLayer, qkv: Tensor, slopes: Tensor, mask: Tensor | None = None) -> Tensor:
    batch = LightningBatch.build(qkv.shape[0], qkv.shape[1], mask, qkv.device, cached=True)
    return layer.attend(qkv, slopes, batch)


def assert_state(layer: LightningCacheLayer, row: int, qkv: Tensor, slopes: Tensor) -> None:
    """Row ``row`` holds the state after exactly the tokens ``qkv`` [T, H, 3D]."""
    expected = recurrence(*split_heads(qkv), slopes)[1]
    assert relative_error(layer.recurrent_states[0][row], expected) <= 1e-6


@pytest.mark.parametrize("padding", [(0, 40), (100, 130), (30, 60), (290, 299)], ids=str)
def test_recorded_prompt_longer_than_the_tail_keeps_its_padding_out(padding: tuple[int, int]) -> None:
    """Padding before, behind and across the place where a long prompt is cut, and after tokens are taken back."""
    layer, qkv, slopes = lightning_layer(2, 300)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, slice(*padding)] = False
    out = attend(layer, qkv, slopes, mask)
    kept = qkv[1][mask[1]]
    assert relative_error(out[1][mask[1]], recurrence(*split_heads(kept), slopes)[0]) <= 1e-6
    assert not out[1][~mask[1]].any()
    assert_state(layer, 0, qkv[0], slopes)
    assert_state(layer, 1, kept, slopes)
    layer.crop(-3)
    assert_state(layer, 0, qkv[0, :-3], slopes)
    assert_state(layer, 1, qkv[1, :-3][mask[1, :-3]], slopes)


def test_the_tail_moves_on_without_its_padding() -> None:
    """Steps behind a long prompt push the oldest recorded tokens, some of them padding, into the snapshot."""
    layer, qkv, slopes = lightning_layer(2, 330)
    mask = torch.ones(2, 330, dtype=torch.bool)
    mask[1, 50:80] = False  # The prompt of 300 tokens is cut at 44, the steps move the cut to 74.
    attend(layer, qkv[:, :300], slopes, mask[:, :300])
    for start in range(300, 330, 5):
        attend(layer, qkv[:, start : start + 5], slopes, mask[:, start : start + 5])
    assert layer.tail_length == LightningCacheLayer.MAX_TAIL
    layer.crop(-LightningCacheLayer.MAX_TAIL)
    assert_state(layer, 0, qkv[0, :74], slopes)
    assert_state(layer, 1, qkv[1, :74][mask[1, :74]], slopes)


@pytest.mark.parametrize("forget", ["reset", "crop"])
def test_what_was_recorded_before_is_forgotten(forget: str) -> None:
    layer, qkv, slopes = lightning_layer(1, 30)
    attend(layer, qkv[:, :20], slopes)
    if forget == "reset":
        layer.reset()
    else:
        layer.crop(0)
    assert layer.tail_length == 0
    attend(layer, qkv[:, 20:], slopes)
    assert layer.tail_length == 10
    layer.crop(-4)
    assert_state(layer, 0, qkv[0, 20 if forget == "reset" else 0 : 26], slopes)
    with pytest.raises(RuntimeError, match="only 0 tokens are recorded"):
        layer.crop(-1)


def test_rows_of_a_tail_with_padding_follow_their_beams() -> None:
    layer, qkv, slopes = lightning_layer(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[2, :15] = False
    attend(layer, qkv[:, :5], slopes, mask[:, :5])
    layer.crop(0)
    attend(layer, qkv[:, 5:], slopes, mask[:, 5:])
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.crop(-2)
    for row, source in enumerate([2, 0, 0]):
        assert_state(layer, row, qkv[source, :18][mask[source, :18]], slopes)


def test_one_token_with_a_graph_leaves_padding_out() -> None:
    """A decode step that is trained through: the rows whose token is padding keep their states."""
    layer, qkv, slopes = lightning_layer(2, 6, record=False)
    attend(layer, qkv[:, :5], slopes)
    mask = torch.tensor([[True], [False]])
    last = qkv[:, 5:].clone().requires_grad_()
    out = attend(layer, last, slopes, mask)
    assert_state(layer, 0, qkv[0], slopes)
    assert_state(layer, 1, qkv[1, :5], slopes)
    assert not out[1].any()
    (gradient,) = torch.autograd.grad(out.sum(), last)
    assert gradient[0].any() and not gradient[1].any()


def test_a_graph_is_refused_while_recording() -> None:
    layer, qkv, slopes = lightning_layer(1, 4)
    with pytest.raises(RuntimeError, match=r"past recording keeps no autograd graph; run .* under torch.no_grad\(\)"):
        attend(layer, qkv.requires_grad_(), slopes)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_state_of_lower_precision_is_refused(gradient: bool) -> None:
    layer, qkv, slopes = lightning_layer(1, 4, record=False)
    attend(layer, qkv, slopes)
    layer.recurrent_states[0] = layer.recurrent_states[0].bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16, expected torch.float32"):
        attend(layer, qkv.requires_grad_(gradient), slopes)


def test_a_layer_that_counts_says_what_it_has_seen() -> None:
    layer = CountingLightningCacheLayer()
    layer.record_past = True
    _, qkv, slopes = lightning_layer(2, 12)
    for start, stop in ((0, 7), (7, 12)):
        assert layer.get_seq_length() == start
        assert layer.get_mask_sizes(stop - start) == (stop, 0)
        attend(layer, qkv[:, start:stop], slopes)
    layer.crop(-4)
    assert layer.get_seq_length() == 8
    assert layer.get_mask_sizes(1) == (9, 0)
    assert_state(layer, 0, qkv[0, :8], slopes)
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.recurrent_states[0].any()


@pytest.mark.parametrize(
    "kinds", [["linear_attention", "full_attention"], ["linear_attention"] * 2], ids=["hybrid", "all"]
)
def test_an_adopted_cache_grows_no_more_layers_and_goes_on_recording(kinds: list[str]) -> None:
    counting = "full_attention" not in kinds
    cache = DynamicCache()
    adopt_cache(cache, kinds)
    layers = list(cache.layers)
    expected = CountingLightningCacheLayer if counting else LightningCacheLayer
    assert [type(layer) for layer in layers] == [expected if k == "linear_attention" else DynamicLayer for k in kinds]
    assert cache.layer_class_to_replicate is None  # transformers would append a softmax layer at every index
    cache.activate_past_recording()
    adopt_cache(cache, kinds)
    assert cache.layers == layers and all(
        layer.record_past for layer in layers if isinstance(layer, LightningCacheLayer)
    )
