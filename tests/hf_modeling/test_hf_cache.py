# SPDX-License-Identifier: Apache-2.0
"""Caches: continuation, beams, static shapes, rollback, speculative decoding."""

from pathlib import Path

import pytest
import torch
from hf_helpers import load_fp32, make_pair, random_ids, relative_error, states_of
from oracle import Oracle, OracleCache, random_tensors, tiny_config, write_checkpoint
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from minimax_plugin.hf_modeling.cache import LightningCacheLayer, adopt_cache

PROMPT = 300


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Oracle]:
    return make_pair(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(pair: tuple[PreTrainedModel, Oracle]) -> PreTrainedModel:
    return pair[0]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(2, PROMPT)


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def greedy(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> list[list[int]]:
    kwargs = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, **kwargs)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("split", [1, 7, 255, 256, 257, PROMPT - 1])
def test_prompt_in_two_parts(model: PreTrainedModel, ids: Tensor, reference: Tensor, split: int) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :split], ids[:, split:])]
    assert (torch.cat(parts, dim=1) - reference).abs().max() <= 1e-3


def test_token_by_token(pair: tuple[PreTrainedModel, Oracle]) -> None:
    model, oracle = pair
    ids, expected_cache = random_ids(1, 40), OracleCache()
    expected = oracle(ids[0].tolist(), expected_cache).logits
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(40)])
    assert (logits - expected).abs().max() <= 1e-3
    for layer, state in expected_cache.states.items():
        assert states_of(cache)[layer].dtype == torch.float32
        assert relative_error(states_of(cache)[layer][0], state) <= 1e-5


def test_class_name_does_not_disable_caches(model: PreTrainedModel, ids: Tensor) -> None:
    # transformers refuses default caches to every class with "minimax" in its name.
    assert model._supports_default_dynamic_cache()
    result = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert type(result.past_key_values) is DynamicCache
    assert result.past_key_values.get_seq_length() == PROMPT


def test_cache_kinds_agree(model: PreTrainedModel, ids: Tensor) -> None:
    expected = greedy(model, ids, use_cache=False)
    assert greedy(model, ids) == expected
    assert greedy(model, ids, cache_implementation="static") == expected
    assert greedy(model, ids, past_key_values=DynamicCache()) == expected


@pytest.mark.slow
def test_chunked_prefill_of_generate(model: PreTrainedModel, ids: Tensor) -> None:
    # Slow because generate compiles the model for it.
    assert greedy(model, ids, prefill_chunk_size=64) == greedy(model, ids)


@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (4, 2)])
def test_beam_search_reorders_states(model: PreTrainedModel, beams: int, returned: int) -> None:
    ids = random_ids(2, 20)
    kwargs = {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 10}
    assert greedy(model, ids, **kwargs) == greedy(model, ids, use_cache=False, **kwargs)


def test_several_samples_per_prompt_share_no_state(model: PreTrainedModel) -> None:
    ids = random_ids(1, 20)
    kwargs = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 10, "temperature": 0.5}
    torch.manual_seed(3)
    cached = greedy(model, ids, **kwargs)
    torch.manual_seed(3)
    assert cached == greedy(model, ids, use_cache=False, **kwargs)
    assert len({tuple(row) for row in cached}) > 1


def test_next_turn_continues_the_cache(model: PreTrainedModel) -> None:
    first, cache = random_ids(1, 30), DynamicCache(config=model.config)
    answer = model.generate(first, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    second = torch.cat([answer, random_ids(1, 12, seed=5)], dim=1)
    assert greedy(model, second, past_key_values=cache) == greedy(model, second)


def test_reset_forgets_everything(model: PreTrainedModel, ids: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 4)
    with torch.no_grad():
        first = model(ids[:, :50], past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(ids[:, :50], past_key_values=cache).logits, first)


def test_compiled_decode_is_one_graph(tmp_path: Path) -> None:
    model, _ = make_pair(tmp_path)  # One that has made none of its constants yet.
    ids = random_ids(1, 20)
    cache = StaticCache(config=model.config, max_cache_len=64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        steps = []
        for position in range(20):
            position_ids = torch.tensor([[position]])
            output = compiled(ids[:, position : position + 1], past_key_values=cache, position_ids=position_ids)
            steps.append(output.logits)
        torch.compiler.reset()
        assert (torch.cat(steps, dim=1) - model(ids, use_cache=False).logits).abs().max() <= 1e-3


@pytest.mark.parametrize("removed", [1, 3, 10])
@pytest.mark.parametrize("recorded", [(40,), (20, 1, 1, 1, 20), (290,), (200, 100)], ids=str)
def test_crop_takes_tokens_back(
    model: PreTrainedModel, ids: Tensor, reference: Tensor, recorded: tuple[int, ...], removed: int
) -> None:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    total = 0
    with torch.no_grad():
        for length in recorded:
            model(ids[:, total : total + length], past_key_values=cache)
            total += length
        adopt_cache(cache, model.config.layer_types)
        assert cache.layers[0].tail_length == min(total, LightningCacheLayer.MAX_TAIL)
        cache.crop(-removed)
        assert cache.get_seq_length() == total - removed
        again = model(ids[:, total - removed :], past_key_values=cache).logits
    assert (again - reference[:, total - removed :]).abs().max() <= 1e-3


def test_recording_keeps_no_more_than_the_tail(model: PreTrainedModel, ids: Tensor) -> None:
    """A view of the last tokens would keep the projections of the whole prompt in memory."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :5], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.tail_length == LightningCacheLayer.MAX_TAIL
    kept = sum(qkv.untyped_storage().nbytes() for qkv, _ in layer._tail)
    per_token = layer._tail[0][0][:, 0].numel() * layer._tail[0][0].element_size()
    # The oldest of the first part fall out one step at a time; their memory goes with the part.
    assert kept <= (LightningCacheLayer.MAX_TAIL + 5) * per_token


def test_crop_refuses_what_it_cannot_take_back(model: PreTrainedModel, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    layer = cache.layers[0]
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, 20:25], past_key_values=cache)
    with pytest.raises(RuntimeError, match="only 5 tokens are recorded"):
        layer.crop(-6)
    with pytest.raises(RuntimeError, match="negative"):
        layer.crop(1)


def test_assisted_generation_equals_greedy(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = random_ids(1, 40)
    expected = greedy(model, ids, max_new_tokens=24)
    config = tiny_config()
    noisy = {k: v + 0.02 * torch.randn_like(v.float()).to(v.dtype) for k, v in random_tensors(config).items()}
    draft = load_fp32(write_checkpoint(tmp_path, config, noisy))
    assert greedy(model, ids, max_new_tokens=24, assistant_model=draft) == expected
    assert greedy(model, ids, max_new_tokens=24, assistant_model=model) == expected


def test_prompt_lookup_equals_greedy(model: PreTrainedModel) -> None:
    ids = random_ids(1, 12).repeat(1, 30)
    expected = greedy(model, ids, max_new_tokens=24)
    assert greedy(model, ids, max_new_tokens=24, prompt_lookup_num_tokens=4) == expected


def test_gradients_run_through_the_cached_state(model: PreTrainedModel) -> None:
    embeds = model.model.embed_tokens(random_ids(1, 30)).detach()
    grads = []
    for parts in ([30], [13, 17]):
        leaf = embeds.clone().requires_grad_()
        cache, start = DynamicCache(config=model.config), 0
        for length in parts:
            logits = model(inputs_embeds=leaf[:, start : start + length], past_key_values=cache).logits
            start += length
        logits[0, -1].square().sum().backward()
        grads.append(leaf.grad)
    assert relative_error(grads[1], grads[0]) <= 1e-4


def test_rows_can_be_repeated_and_selected(model: PreTrainedModel, ids: Tensor, reference: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        cache.activate_past_recording()  # What rows are rolled back to is then no longer zero and the same for all.
        model(ids[:, 12:20], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1]))
        cache.crop(-2)
        logits = model(ids[:, 18:30].flip(0), past_key_values=cache).logits
    assert (logits - reference[:, 18:30].flip(0)).abs().max() <= 1e-3


def test_a_cache_of_another_batch_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds 2 rows, but the batch has 1"):
            model(ids[:1, 9:12], past_key_values=cache)


def test_state_is_visible_to_transformers(model: PreTrainedModel, ids: Tensor) -> None:
    """transformers sets these for models with a convolution; unset, it hides states and moves them to no device."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    layer = cache.layers[0]
    assert (layer.has_previous_state[0], layer.dtype, layer.device) == (True, torch.float32, model.device)
    states = layer.recurrent_states[0].clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.recurrent_states[0], states)
    cache.reset()
    assert not layer.has_previous_state[0]


def test_static_cache_with_padding_and_again_with_another_batch(model: PreTrainedModel) -> None:
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    expected = greedy(model, ids, attention_mask=mask)
    assert greedy(model, ids, attention_mask=mask, cache_implementation="static") == expected
    ids = random_ids(3, 30)
    assert greedy(model, ids, cache_implementation="static") == greedy(model, ids)


def test_caches_of_a_model_without_softmax_layers(tmp_path: Path) -> None:
    """Nothing but the lightning layers can tell how long the sequence is."""
    model, oracle = make_pair(tmp_path, num_hidden_layers=3, attn_type_list=[0, 0, 0])
    ids = random_ids(1, 12).repeat(1, 30)
    expected = [oracle.greedy(ids[0].tolist(), 16)]
    assert greedy(model, ids, cache_implementation="static") == expected
    assert greedy(model, ids, prompt_lookup_num_tokens=4) == expected
    assert greedy(model, ids, assistant_model=model) == expected
    assert greedy(model, ids, num_beams=3) == greedy(model, ids, num_beams=3, use_cache=False)


def test_cache_of_another_model_is_refused(model: PreTrainedModel) -> None:
    other = DynamicCache(config=type(model.config)(**tiny_config(attn_type_list=[1, 0, 0, 0])))
    with pytest.raises(ValueError, match=r"layers\[0\] is a DynamicLayer"), torch.no_grad():
        model(random_ids(1, 4), past_key_values=other)
    other = DynamicCache(config=type(model.config)(**tiny_config(num_hidden_layers=2)))
    with pytest.raises(ValueError, match="2 layers, but the model has 4"), torch.no_grad():
        model(random_ids(1, 4), past_key_values=other)


def test_low_precision_state_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, 4), past_key_values=cache)
        cache.layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].bfloat16()
        with pytest.raises(ValueError, match=r"torch.bfloat16, expected torch.float32"):
            model(random_ids(1, 1), past_key_values=cache)
