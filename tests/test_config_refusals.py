# SPDX-License-Identifier: Apache-2.0
"""Every field of ``config.json`` times wrong values: one line that names the field, from every reader of a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from config_cases import CONVERTED_FACTORS, FACTORS, RIGHT, WRONG, WRONG_CASES
from oracle import tiny_config

from minimax_plugin.architecture import Architecture
from minimax_plugin.config_fields import RULES
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1Model
from minimax_plugin.vllm_model.settings import ModelSettings


def converted(config: dict[str, Any]) -> dict[str, Any]:
    """The same config under the names of the ``-hf`` format."""
    names = dict(zip(FACTORS, CONVERTED_FACTORS, strict=True))
    config = {names.get(key, key): value for key, value in config.items() if key not in ("attn_type_list", "postnorm")}
    return config | {"model_type": "minimax", "layer_types": ["linear_attention"] * 3 + ["full_attention"]}


def assigned(field: str, value: Any) -> object:
    config = MiniMaxM1Config(**tiny_config())
    setattr(config, field, value)
    with torch.device("meta"):
        return MiniMaxM1Model(config)


READERS: dict[str, Callable[[str, Any], object]] = {
    "architecture": lambda field, value: Architecture.from_config(tiny_config() | {field: value}),
    "hf file": lambda field, value: MiniMaxM1Config.from_dict(tiny_config() | {field: value}),
    "hf arguments": lambda field, value: MiniMaxM1Config(**tiny_config() | {field: value}),
    "hf assigned": assigned,
    "vllm": lambda field, value: ModelSettings.from_config(SimpleNamespace(**tiny_config() | {field: value})),
    "vllm -hf": lambda field, value: ModelSettings.from_config(
        SimpleNamespace(**converted(tiny_config()) | {field: value})
    ),
}

#: A value that contradicts another field where both are stated, and is right where it replaces the other or stands
#: alone.
_OTHER_PATTERN = ("layer_types", ["linear_attention"] * 4)
RIGHT_FOR_SOME: dict[str, list[tuple[str, Any]]] = {
    "hf arguments": [("num_key_value_heads", None)],
    "hf assigned": [_OTHER_PATTERN, ("num_experts", 5)],
    "vllm -hf": [_OTHER_PATTERN],
}

#: Names under which a config object holds what was assigned to an alias.
HELD_AS = {"layer_types": "attn_type_list", "rope_scaling": "rope_parameters", "torch_dtype": "dtype"}


def one_line(call: Callable[[], object], field: str) -> str:
    """The message of the refusal."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert field in message or HELD_AS.get(field, field) in message
    assert len(message.splitlines()) == 1 and len(message) < 400
    assert any(word in message for word in ("expected", "contradicts", "state one", "exceeds", "config has no"))
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    return message


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_wrong_value_of_one_field_is_refused_by_name(reader: str, field: str) -> None:
    refused = 0
    for value in WRONG[field]:
        if not any(field == name and value == right for name, right in RIGHT_FOR_SOME.get(reader, ())):
            one_line(partial(READERS[reader], field, value), field)
            refused += 1
    assert refused >= len(WRONG[field]) - 1


def test_number_of_cases() -> None:
    """The table must not shrink unseen, and no rule may be without wrong values."""
    assert len(WRONG_CASES) >= 1100
    renamed = {name for name in RULES if name.startswith("_") or name == "experts_implementation"}
    assert RULES.keys() - renamed == WRONG.keys()


@pytest.mark.parametrize("field", RIGHT)
@pytest.mark.parametrize("reader", READERS)
def test_right_value_of_one_field_is_taken(reader: str, field: str) -> None:
    if reader == "hf assigned" and field in ("num_labels", "id2label", "quantization_config"):
        pytest.skip("not a field that is assigned to a built config")
    for value in RIGHT[field]:
        if not (reader == "vllm -hf" and field in ("attn_type_list", "layer_types")):
            READERS[reader](field, value)
