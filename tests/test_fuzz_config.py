# SPDX-License-Identifier: Apache-2.0
"""Drawn configs: each is read as an independent reader reads it, by every reader alike, or refused in one line.

What a refusal costs is held down by the memory that it takes, not by the clock.
"""

from __future__ import annotations

import json
import math
import random
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from config_cases import CONVERTED_FACTORS, DEEP, FACTORS, FLAGS, HUGE, RIGHT, SHARES, SIZES, WRONG
from oracle import tensor_shapes, tiny_config
from transformers import AutoConfig

import minimax_plugin  # noqa: F401 - registers the classes
from minimax_plugin.config_fields import config_faults
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1ForCausalLM
from minimax_plugin.vllm_model.settings import ModelSettings

CASES_PER_SEED = 300

#: A chunk that has not ended after this many seconds hangs.
HANG = 900

#: Bytes that reading one config may take at once. A list with an entry per expert of an absurd config takes more.
MAX_PEAK = 32_000_000

#: Keys that nobody knows, and keys that a config class uses itself.
FOREIGN_KEYS = ("foo", "größe", "a b", "", "\n", "rope", "layernorm_alpha", "text", "\ud800", "lora", "kwargs", "_x")
RESERVED_KEYS = (
    "to_dict",
    "check",
    "self",
    "__class__",
    "__dict__",
    "attribute_map",
    "is_heterogeneous",
    "sub_configs",
)

#: Fields that transformers reads before it asks the config class, so that a file with them may fail elsewhere.
READ_BEFORE = ("quantization_config", "attn_implementation", *RESERVED_KEYS)

TEXTS = (
    "",
    " ",
    "silu",
    "8",
    "-1",
    "1e5",
    "true",
    "null",
    "NaN",
    "größe",
    "\u202e",
    "\x00",
    "\n\n",
    "𝕏" * 99,
    "\udcff",
    "a'\"\\",
)
NUMBERS: tuple[int | float, ...] = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 48, 64, 127, 128, 255, 4096, 65_536, 65_537, 2**20, 2**31, 2**32, 2**63, 10**12),
    *(-1, -2, -(2**31), -(2**63), HUGE, -HUGE, 10**400),
    *(0.0, -0.0, 0.1, 0.5, 1.0, 1.5, 8.0, 1e-5, 1e-40, 5e-324, 1e18, 1e19, 1e30, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf),
)


def drawn(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, as Python reads it, and a little more."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(TEXTS)
    if kind in (2, 3):
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice((rng.randint(-(10 ** rng.randint(0, 40)), 10 ** rng.randint(0, 40)), rng.uniform(-10, 10)))
    if kind == 5:
        return rng.choice(([], {}, DEEP, nested(rng.randint(20, 60))))
    if kind in (6, 7):
        return [drawn(rng, depth + 1) for _ in range(rng.randint(0, 5))]
    return {
        rng.choice((*TEXTS, "rope_type", "factor", "rope_theta")): drawn(rng, depth + 1)
        for _ in range(rng.randint(0, 4))
    }


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def changed(rng: random.Random, value: Any) -> Any:
    """A value near ``value``."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return rng.choice((value, not value, str(value), [value], int(bool(value))))
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, 2 * value, value / 2, -value, float(value), str(value), [value]))
    if isinstance(value, list) and value:
        copy = list(value)
        copy[rng.randrange(len(copy))] = rng.choice((0, 1, 2, drawn(rng)))
        return rng.choice((copy, copy[:-1], [*copy, 0], value[::-1]))
    return drawn(rng)


def drawn_config(rng: random.Random) -> dict[str, Any]:
    config = tiny_config()
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        kind = rng.random()
        if kind < 0.04:
            config[rng.choice((*FOREIGN_KEYS, *RESERVED_KEYS))] = drawn(rng)
            continue
        field = rng.choice(tuple(WRONG))
        if kind < 0.30:
            config[field] = drawn(rng)
        elif kind < 0.50:
            config[field] = rng.choice(WRONG[field])
        elif kind < 0.65 and field in config:
            config[field] = changed(rng, config[field])
        elif kind < 0.95:
            config[field] = rng.choice(RIGHT.get(field, (drawn(rng),)))
        else:
            config.pop(field, None)
    return config


def refusal(call: Any) -> tuple[str | None, Any]:
    """The one line of a refusal, or None and the result. Anything else that is raised fails the test."""
    try:
        return None, call()
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, repr(error)
        assert message and len(message.splitlines()) == 1 and len(message) < 500, message
        assert message.isprintable(), message
        return message, None


@contextmanager
def not_hanging() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"a config kept its reader busy for {HANG} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_plausible(raw: dict[str, Any]) -> None:
    """Types, signs and ends of the ranges of what was taken, by the meaning of the fields."""
    for name in raw.keys() & {*SIZES, "head_dim", "rotary_dim", "num_experts", "num_labels", "block_size"}:
        value = raw[name]
        assert (value is None and name in ("head_dim", "rotary_dim")) or (type(value) is int and 0 < value <= 2**30), (
            name
        )
    for name in raw.keys() & {*FACTORS, *SHARES, "router_aux_loss_coef", "initializer_range", "rms_norm_eps"}:
        limit = 1 if name in (*SHARES, "rms_norm_eps") else 1e5
        assert type(raw[name]) in (int, float) and 0 <= raw[name] <= limit, name
    assert all(type(raw[name]) is bool for name in raw.keys() & {*FLAGS})
    assert raw.get("hidden_act", "silu") == "silu" and raw.get("sliding_window") is None
    assert raw.get("head_dtype", "model") in ("model", "float32")
    assert raw.get("shared_moe_mode", "sigmoid") in ("sigmoid", "softmax")
    assert all(type(code) is int for code in raw.get("attn_type_list") or ())
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        value = raw.get(name)
        tokens = value if isinstance(value, list) and name == "eos_token_id" else [value]
        assert tokens and all(t is None or (type(t) is int and 0 <= t < raw["vocab_size"]) for t in tokens), name


def check_reading(raw: dict[str, Any], config: MiniMaxM1Config, settings: ModelSettings) -> None:
    """Both results against what the file says, read here with the defaults of the released code."""
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or hidden // heads
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    rotary = raw.get("rotary_dim") or (head_dim if share is None else round(share * head_dim))
    codes = raw.get("attn_type_list") or [int(kind == "full_attention") for kind in raw["layer_types"]]
    sizes = {
        **{name: raw[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **{name: raw[name] for name in ("num_attention_heads", "num_key_value_heads")},
        **{name: raw[name] for name in ("num_local_experts", "num_experts_per_tok")},
        "head_dim": head_dim,
        "rotary_dim": rotary,
        "shared_intermediate_size": raw.get("shared_intermediate_size") or 0,
        "shared_moe_mode": raw.get("shared_moe_mode", "sigmoid"),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    for name, value in sizes.items():
        assert type(getattr(config, name)) is type(value) and getattr(config, name) == value, name
        assert getattr(settings.architecture, name) == value, name
    kinds = [{0: "linear_attention", 1: "full_attention"}[code] for code in codes]
    assert config.attn_type_list == codes and config.layer_types == kinds == list(settings.architecture.layer_types)
    factors = [raw.get(name, 1.0) for name in FACTORS]
    linear, full = (settings.attention_factors[kind] for kind in ("linear_attention", "full_attention"))
    read = [linear.alpha, linear.beta, full.alpha, full.beta, settings.mlp_factors.alpha, settings.mlp_factors.beta]
    assert read == factors == [getattr(config, name) for name in FACTORS]
    assert settings.postnorm is raw.get("postnorm", False) and config.postnorm is settings.postnorm
    assert settings.rms_norm_eps == config.rms_norm_eps == raw.get("rms_norm_eps", 1e-5)
    assert 0 < settings.rms_norm_eps < math.inf
    theta = rope.get("rope_theta", raw.get("rope_theta", 1e6))
    assert 1 < theta < math.inf and config.rope_theta == theta == settings.rope_parameters["rope_theta"]
    assert int(head_dim * settings.rope_parameters["partial_rotary_factor"]) == rotary
    check_model(raw | {**sizes, "attn_type_list": codes}, config)


def check_model(raw: dict[str, Any], config: MiniMaxM1Config) -> None:
    """The model has as many parameters as the checkpoint that the oracle lists."""
    # transformers itself names the implementations of attention that it knows.
    if raw["num_local_experts"] * raw["num_hidden_layers"] > 64 or raw.get("attn_implementation") is not None:
        return
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    assert model.num_parameters() == sum(math.prod(shape) for shape in tensor_shapes(raw).values())


def read_file(raw: dict[str, Any], path: Path) -> str | None:
    """What loading the file says, where Python can write one and it reaches our class."""
    try:
        text = json.dumps(raw)
        foreign = raw.get("model_type") != "minimax_m1" or raw.keys() & {*READ_BEFORE}
        if foreign or json.loads(text) != raw:
            return None
    except (ValueError, TypeError, RecursionError):
        return None
    (path / "config.json").write_text(text, encoding="utf-8")
    message, _ = refusal(lambda: AutoConfig.from_pretrained(path))
    return message or ""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))])
def test_drawn_config_is_read_right_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    accepted = files = 0
    with not_hanging():
        for _ in range(CASES_PER_SEED):
            raw = drawn_config(rng)
            tracemalloc.start()
            message, config = refusal(lambda raw=raw: MiniMaxM1Config.from_dict(dict(raw)))
            other, settings = refusal(lambda raw=raw: ModelSettings.from_config(SimpleNamespace(**raw)))
            faults = config_faults(raw)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MAX_PEAK, raw.keys()
            assert all(len(fault.splitlines()) == 1 and fault.isprintable() for fault in faults)
            if not raw.keys() & {*RESERVED_KEYS, *FOREIGN_KEYS}:
                assert message == other
                assert [message] == faults[:1] or message is None and not faults
            if message is None and other is None:
                accepted += 1
                check_plausible(raw)
                check_reading(raw, config, settings)
            said = read_file(raw, tmp_path)
            if said is not None:
                files += 1
                assert (said or None) == message
    # Neither everything nor nothing is taken, and files are read too.
    assert 30 < accepted < CASES_PER_SEED - 100 and files > 100


def test_converted_names_are_read_alike() -> None:
    """The factors of the ``-hf`` format, drawn: the same line as under the original name, with the other name."""
    rng = random.Random(7)
    for _ in range(300):
        position = rng.randrange(len(FACTORS))
        original, converted = FACTORS[position], CONVERTED_FACTORS[position]
        value = rng.choice((drawn(rng), rng.choice(WRONG[original]), rng.choice(RIGHT[original])))
        config = {name: value for name, value in tiny_config().items() if name not in (*FACTORS, "attn_type_list")}
        config |= {"model_type": "minimax", "layer_types": ["linear_attention"] * 4, converted: value}
        message, settings = refusal(lambda config=config: ModelSettings.from_config(SimpleNamespace(**config)))
        same = tiny_config() | {original: value}
        expected, _ = refusal(lambda same=same: ModelSettings.from_config(SimpleNamespace(**same)))
        assert message == (expected and expected.replace(original, converted))
        if settings is not None:
            factors = (*settings.attention_factors.values(), settings.mlp_factors)
            assert [factor for pair in factors for factor in (pair.alpha, pair.beta)][position] == value
