# SPDX-License-Identifier: Apache-2.0
"""A bf16 model part by part against the float64 oracle, and that the comparison sees the faults it is there for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from bf16_faults import FAULTS, RECURRENCE_FAULTS, Fault
from bf16_layers import CONFIG, Record, check_layers, check_recurrence, recorded
from hf_helpers import random_ids
from oracle import Oracle, random_tensors, slopes, tiny_config, write_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from minimax_plugin.hf_modeling.batch import LightningBatch
from minimax_plugin.hf_modeling.cache import adopt_cache
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.layers import MiniMaxM1LightningAttention

#: Two pieces of a prompt over several chunks of 64 tokens, then single tokens.
STEPS = [150, 65, *[1] * 8]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Oracle]:
    tensors = random_tensors(CONFIG)
    path = write_checkpoint(tmp_path_factory.mktemp("bf16"), CONFIG, tensors)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), Oracle(CONFIG, tensors)


def check(
    model: PreTrainedModel, oracle: Oracle, steps: Sequence[int] = STEPS, bounds: dict[str, float] | None = None
) -> dict[str, float]:
    """Feed random tokens through a cache in ``steps`` and compare every part of every layer."""
    ids = random_ids(1, sum(steps))
    record, cache = Record(), DynamicCache(config=model.config)
    with torch.no_grad(), recorded(model, record):
        for piece in ids.split(list(steps), dim=1):
            output = model(piece, past_key_values=cache, output_hidden_states=True)
            record.add("head_input", output.hidden_states[-1][0])
            record.add("logits", output.logits[0])
            for index, layer in enumerate(cache.layers):
                if hasattr(layer, "recurrent_states"):
                    record.add(f"{index}.state", layer.recurrent_states[0])
    assert record.steps() == list(steps)
    return check_layers(oracle, ids[0].tolist(), steps, record.tensors(), bounds)


def test_every_part_is_right_but_for_its_own_roundings(pair: tuple[PreTrainedModel, Oracle]) -> None:
    check(*pair)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees(fault: Fault, pair: tuple[PreTrainedModel, Oracle]) -> None:
    with fault(pair[0]), pytest.raises(AssertionError, match=rf"\({FAULTS[fault]}\): relative error"):
        check(*pair)


def check_released_layer(layer_idx: int, faults: Sequence[Fault] = ()) -> None:
    """A lightning layer with the slopes of the released model: a long prompt in two pieces, then single tokens."""
    num_heads, num_layers, steps = 64, 80, [500, 300, 1, 1]
    config = MiniMaxM1Config(**tiny_config(num_hidden_layers=num_layers, num_attention_heads=num_heads))
    layer = MiniMaxM1LightningAttention(config, layer_idx)
    nn.init.normal_(layer.qkv_proj.weight, std=config.hidden_size**-0.5)
    layer.to(torch.bfloat16)
    qkv, out, states = [], [], []
    layer.qkv_proj.register_forward_hook(lambda module, inputs, output: qkv.append(output[0]))
    layer.norm.register_forward_hook(lambda module, inputs, output: out.append(inputs[0][0]))
    cache = DynamicCache(config=config)
    adopt_cache(cache, config.layer_types)
    with torch.no_grad(), ExitStack() as planted:
        for fault in faults:
            planted.enter_context(fault(layer))
        for length in steps:
            batch = LightningBatch.build(1, length, None, torch.device("cpu"), cached=True)
            hidden = torch.randn(1, length, config.hidden_size).bfloat16()
            layer(hidden, lightning_batch=batch, past_key_values=cache)
            states.append(cache.layers[layer_idx].recurrent_states[0][0].clone())
    heads = (torch.cat(parts).unflatten(-1, (num_heads, -1)) for parts in (qkv, out))
    found_qkv, found_out = heads
    check_recurrence(slopes(num_heads, layer_idx, num_layers), found_qkv, steps, torch.stack(states), found_out)


@pytest.mark.parametrize("layer_idx", [0, 40, 78])
def test_layers_with_released_slopes(layer_idx: int) -> None:
    """From 0.917 in the fastest head of layer 0 to 4.95e-5 in the slowest of layer 78."""
    check_released_layer(layer_idx)


@pytest.mark.parametrize("fault", RECURRENCE_FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees_in_the_slowest_layer(fault: Fault) -> None:
    with pytest.raises(AssertionError, match=rf"\({RECURRENCE_FAULTS[fault]}\): relative error"):
        check_released_layer(78, [fault])
