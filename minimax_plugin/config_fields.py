# SPDX-License-Identifier: Apache-2.0
"""Type, sign and range of every field of a MiniMax-M1 ``config.json``, in one place and in pure Python.

Both backends, the doctor and whatever plans a deployment read configs through this module, so that they refuse the same
values with the same line. A fault is one line that names the field, its value and what was expected.

The bounds are far above every released model. Sizes are checked before anything is built from them, so an absurd one is
refused at once instead of after minutes and gigabytes; bounds of other numbers keep fp32 arithmetic finite. Keys that
no rule knows are left alone, except that no value may be nested too deeply or hold an integer too long to print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from minimax_plugin.config_rules import (
    Rule,
    expect,
    instance,
    integer,
    is_integer,
    list_of,
    number,
    one_of,
    or_null,
    shown,
    size,
    structure_fault,
)

LayerType = Literal["linear_attention", "full_attention"]

#: How the output of a shared expert is mixed in, by ``shared_moe_mode``.
SHARED_MOE_MODES = ("sigmoid", "softmax")

#: Values of the released configuration class, used where a config states none.
DEFAULT_ROPE_THETA = 1_000_000.0
DEFAULT_RMS_NORM_EPS = 1e-5
DEFAULT_MAX_POSITIONS = 10_240_000

#: ``model_type`` of the converted checkpoints whose names end in ``-hf``.
CONVERTED_MODEL_TYPE = "minimax"

MAX_VOCAB_SIZE = 2**24
MAX_WIDTH = 2**20
MAX_LAYERS = 10_000
MAX_HEADS = 2**16
MAX_HEAD_DIM = 2**14
MAX_EXPERTS_PER_LAYER = 2**16
#: Experts of all layers together; a checkpoint has three tensors for each. The released model has 2,560.
MAX_EXPERTS = 2**17
MAX_POSITIONS = 2**30

#: Bound of the residual factors; those of the released model are 3.6 and 1.
MAX_FACTOR = 1e4
#: How much all residual factors together may enlarge the residual. The norms square it in fp32, which ends at 3.4e38.
MAX_RESIDUAL_GROWTH = 1e15

#: Bounds of ``rope_theta``; at 1 every pair would turn at the same speed.
ROPE_THETA_BOUNDS = (1.0, 1e18)

#: How the logits are computed: in fp32, or in the dtype of the model.
HEAD_DTYPES = ("float32", "model")

#: Keys that every ``config.json`` of this family states.
REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
)

#: Names of the residual factors in the original and in the converted format.
RESIDUAL_FACTORS = tuple(
    f"layernorm_{part}_{kind}" for part in ("linear_attention", "full_attention", "mlp") for kind in ("alpha", "beta")
)
CONVERTED_FACTORS = tuple(
    f"{part}_{kind}_factor" for part in ("linear_attn", "full_attn", "mlp") for kind in ("alpha", "beta")
)


def config_faults(config: Mapping[str, Any] | Any) -> list[str]:
    """Everything that is wrong with a config, one line each; empty for a sound one.

    Args:
        config: contents of a ``config.json``, original or converted (``-hf``), or a config object.
    """
    fields = fields_of(config)
    absent = [
        f"config has no {name!r}; every MiniMax-M1 config.json states it"
        for name in REQUIRED_FIELDS
        if fields.get(name) is None
    ]
    if fields.get("attn_type_list") is None and fields.get("layer_types") is None:
        absent.append("config has neither 'attn_type_list' nor 'layer_types'; one of them gives the layer pattern")
    wrong = field_faults(
        {name: value for name, value in fields.items() if not (value is None and name in REQUIRED_FIELDS)}
    )
    return [*absent, *wrong.values(), *_contradictions(fields, wrong.keys())]


def require_sound(config: Mapping[str, Any] | Any) -> None:
    """:func:`config_faults`, raising the first.

    Raises:
        ValueError: the config has a fault.
    """
    for fault in config_faults(config):
        raise ValueError(fault)


def field_faults(fields: Mapping[str, Any]) -> dict[str, str]:
    """Name -> one line, for every field that is wrong by itself.

    In the order of the rules, not of the config, so that every reader names the same one first. Absent fields are not
    asked for.
    """
    names = [*(name for name in RULES if name in fields), *(name for name in fields if name not in RULES)]
    faults = {name: field_fault(name, fields[name]) for name in names}
    return {name: fault for name, fault in faults.items() if fault is not None}


def field_fault(name: str, value: Any) -> str | None:
    """What is wrong with one field by itself, or None; a name that no rule knows may hold anything printable."""
    if not isinstance(name, str):
        return f"config has the key {shown(name)}, expected strings as keys"
    rule = RULES.get(name)
    return structure_fault(_printable(name), value) or (rule(name, value) if rule else None)


def require_field(name: str, value: Any) -> None:
    """:func:`field_fault`, raised.

    Raises:
        ValueError: the value has a wrong type, sign or range.
    """
    fault = field_fault(name, value)
    if fault is not None:
        raise ValueError(fault)


def require_pattern(name: str, value: Any) -> None:
    """:func:`require_field` for ``attn_type_list`` or ``layer_types`` where it must not be null."""
    if value is None:
        raise ValueError(f"{name} is None, expected a list with one entry per layer")
    require_field(name, value)


def fields_of(config: Mapping[str, Any] | Any) -> Mapping[str, Any]:
    """A mapping as it is; of a config object the fields that a rule knows.

    Names that repeat another field, some of them with a warning, are read only where the object really has them.
    """
    if isinstance(config, Mapping):
        return config
    own = getattr(config, "__dict__", {})
    names = [name for name in RULES if name in own or (name not in _REPEATED and hasattr(config, name))]
    return {name: getattr(config, name) for name in names}


def head_dim_of(fields: Mapping[str, Any]) -> int:
    """``head_dim``, by default ``hidden_size / num_attention_heads``."""
    head_dim = fields.get("head_dim")
    return fields["hidden_size"] // fields["num_attention_heads"] if head_dim is None else head_dim


def rotary_dim_of(fields: Mapping[str, Any]) -> int:
    """Rotated dimensions of a head: ``rotary_dim``, else those of ``partial_rotary_factor``, else all."""
    rotary_dim, head_dim = fields.get("rotary_dim"), head_dim_of(fields)
    if rotary_dim is not None:
        return rotary_dim
    factors = [factor for _, factor in _rotary_factors(fields)]
    return round(head_dim * factors[0]) if factors else head_dim


def stated_rope(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and contents of the field that holds the rotary parameters: ``rope_scaling`` is the older name."""
    for name in ("rope_scaling", "rope_parameters"):
        if fields.get(name):
            return name, fields[name]
    return "rope_parameters", {}


def _rope_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"{name} is {shown(value)}, expected an object or null"
    kind = value.get("rope_type", value.get("type", "default"))
    fault = _rope_type(f"{name}.rope_type", kind)
    if fault is not None or value.get("type", kind) != kind:
        return fault or f"{name}.type is {shown(value['type'])}, expected {kind!r}, the rope_type beside it"
    needed, optional = _ROPE_TYPES[kind]
    for entry in needed:
        if value.get(entry) is None:
            return f"{name}.{entry} is absent, expected it for rope_type {kind!r}"
    for entry, held in value.items():
        if entry in ("type", "rope_type"):
            continue
        if entry not in _ROPE_ENTRIES or entry not in (*needed, *optional, *_ROPE_OF_ALL_TYPES):
            known = ", ".join((*needed, *optional, *_ROPE_OF_ALL_TYPES))
            return f"{name}.{_printable(entry)} is {shown(held)}, expected only {known} for rope_type {kind!r}"
        fault = _ROPE_ENTRIES[entry](f"{name}.{entry}", held)
        if fault is not None:
            return fault
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in value and high in value and not value[low] < value[high]:
            return f"{name}.{high} is {value[high]}, expected more than {low} = {value[low]}"
    return None


def _dtype_fault(name: str, value: Any) -> str | None:
    # torch.dtype by its name: this module is read where no torch is installed.
    word = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
    return None if _dtype_word(name, word) is None else _dtype_word(name, value)


def _labels_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, Mapping) or len(value) > MAX_LABELS:
        return f"{name} is {shown(value)}, expected an object with at most {MAX_LABELS:,} labels or null"
    for key in value:
        if name == "id2label" and not (is_integer(key) or isinstance(key, str) and key.isdecimal() and len(key) < 10):
            return f"{name} has the key {shown(key)}, expected numbers of labels as keys"
    return None


def _printable(name: str) -> str:
    return name if name.isidentifier() and len(name) < 80 else shown(name)


def _rotary_factors(fields: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Every place that states a rotated share of the head: name and value."""
    rope_name, rope = stated_rope(fields)
    places = {f"{rope_name}['partial_rotary_factor']": rope.get("partial_rotary_factor")}
    places["partial_rotary_factor"] = fields.get("partial_rotary_factor")
    return [(name, factor) for name, factor in places.items() if factor is not None]


def _pattern_fault(fields: Mapping[str, Any]) -> str | None:
    codes, layer_types = fields.get("attn_type_list"), fields.get("layer_types")
    if codes is not None and layer_types is not None and [LAYER_TYPES[code] for code in codes] != list(layer_types):
        return f"layer_types = {shown(layer_types)} contradicts attn_type_list = {shown(codes)}; state one of them"
    name, pattern = ("layer_types", layer_types) if codes is None else ("attn_type_list", codes)
    if pattern is not None and len(pattern) != fields["num_hidden_layers"]:
        return f"{name} has {len(pattern)} entries, expected num_hidden_layers = {fields['num_hidden_layers']}"
    return None


def _rotary_fault(fields: Mapping[str, Any]) -> str | None:
    head_dim, rotary_dim = head_dim_of(fields), rotary_dim_of(fields)
    if not 0 < head_dim <= MAX_HEAD_DIM:
        sizes = f"hidden_size = {fields['hidden_size']} and num_attention_heads = {fields['num_attention_heads']}"
        return f"head_dim is absent and {head_dim:,} by {sizes}, expected 1 to {MAX_HEAD_DIM:,}"
    if rotary_dim > head_dim:
        return f"rotary_dim = {rotary_dim} exceeds head_dim = {head_dim}"
    if rotary_dim % 2 or rotary_dim == 0:
        kind = "odd" if rotary_dim else "zero"
        return f"rotary_dim = {rotary_dim} is {kind}, expected an even number (pairs are rotated)"
    for name, factor in _rotary_factors(fields):
        rotated = round(factor * head_dim)
        if rotated != rotary_dim:
            return (
                f"{name} = {factor} rotates {rotated} of {head_dim} dimensions, but rotary_dim = {rotary_dim}; "
                "state one of them"
            )
    rope_name, rope = stated_rope(fields)
    for name in ("short_factor", "long_factor"):
        if name in rope and len(rope[name]) != rotary_dim // 2:
            return f"{rope_name}.{name} has {len(rope[name])} entries, expected {rotary_dim // 2}, half of rotary_dim"
    return None


def _key_value_heads_fault(fields: Mapping[str, Any]) -> str | None:
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads:
        return f"num_attention_heads = {heads} is not divisible by num_key_value_heads = {kv_heads}"
    return None


def _experts_fault(fields: Mapping[str, Any]) -> str | None:
    experts, top_k, layers = (
        fields[name] for name in ("num_local_experts", "num_experts_per_tok", "num_hidden_layers")
    )
    if top_k > experts:
        return f"num_experts_per_tok (top_k) = {top_k} exceeds num_local_experts = {experts}"
    if fields.get("num_experts") not in (None, experts):
        return f"num_experts = {fields['num_experts']} contradicts num_local_experts = {experts}; state one of them"
    if experts * layers > MAX_EXPERTS:
        return (
            f"num_local_experts = {experts:,} in each of num_hidden_layers = {layers:,} makes {experts * layers:,}, "
            f"expected at most {MAX_EXPERTS:,}"
        )
    return None


def _theta_fault(fields: Mapping[str, Any]) -> str | None:
    rope_name, rope = stated_rope(fields)
    other = fields.get("rope_parameters")
    if rope_name == "rope_scaling" and other and other != rope:
        return f"rope_scaling = {shown(rope)} contradicts rope_parameters = {shown(other)}; state one of them"
    theta = fields.get("rope_theta")
    inner = rope.get("rope_theta", theta)
    if theta is not None and inner != theta:
        return f"{rope_name}['rope_theta'] = {inner} contradicts rope_theta = {theta}; state one of them"
    return None


def _token_fault(fields: Mapping[str, Any]) -> str | None:
    for name in TOKEN_FIELDS:
        tokens = fields.get(name)
        for token in tokens if isinstance(tokens, list | tuple) else () if tokens is None else (tokens,):
            if token >= fields["vocab_size"]:
                return f"{name} is {token}, expected an id below vocab_size = {fields['vocab_size']}"
    return None


def _growth_fault(fields: Mapping[str, Any]) -> str | None:
    """Without ``postnorm`` every layer multiplies the residual by its two alphas and nothing brings it back."""
    converted = fields.get("model_type") == CONVERTED_MODEL_TYPE
    if fields.get("postnorm", converted):
        return None
    names = CONVERTED_FACTORS if converted else RESIDUAL_FACTORS
    linear, full, mlp = (math.log10(max(fields.get(name, 1.0), 1.0)) for name in names[::2])
    codes, layer_types = fields.get("attn_type_list"), fields.get("layer_types")
    softmax = list(codes).count(1) if codes is not None else list(layer_types or ()).count("full_attention")
    layers = fields["num_hidden_layers"]
    growth = (layers - softmax) * linear + softmax * full + layers * mlp
    if growth > math.log10(MAX_RESIDUAL_GROWTH):
        return (
            f"{names[0]}, {names[2]} and {names[4]} enlarge the residual by 1e{growth:.0f} over {layers} layers where "
            f"postnorm is False, expected at most {MAX_RESIDUAL_GROWTH:g}"
        )
    return None


class _Check(NamedTuple):
    """A rule over several fields, applied where those it needs are stated and none that it reads is wrong."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    fault: Callable[[Mapping[str, Any]], str | None]


def _contradictions(fields: Mapping[str, Any], wrong: Collection[str]) -> Iterator[str]:
    for check in _CHECKS:
        stated = all(fields.get(name) is not None for name in check.needs)
        if stated and not any(name in wrong for name in (*check.needs, *check.reads)):
            fault = check.fault(fields)
            if fault is not None:
                yield fault


#: ``attn_type_list`` value -> layer type.
LAYER_TYPES: dict[int, LayerType] = {0: "linear_attention", 1: "full_attention"}

#: Properties of transformers configs that stand for another field.
_REPEATED = ("torch_dtype", "rope_scaling", "num_labels", "per_layer_config")

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

MAX_LABELS = 2**16

_boolean = instance("true or false", bool)
_string = instance("a string", str)
_factor = number(0, MAX_FACTOR)
_share = number(0, 1, below=True)
_positive = number(0, 1e6, above=True)
_rotated = number(0, 1, above=True)
_theta = number(*ROPE_THETA_BOUNDS, above=True)
_token = integer(0, MAX_VOCAB_SIZE - 1)
_tokens = list_of(_token, "an integer or a list of integers that is not empty", empty=False)
_dtype_word = one_of("bfloat16", "float16", "float32", "float64", "half", "float", "double")
_code = expect(
    "0 (lightning attention) or 1 (softmax attention)", lambda value: is_integer(value) and value in LAYER_TYPES
)
_layer_type = expect(
    f"one of {sorted(LAYER_TYPES.values())}", lambda value: isinstance(value, str) and value in LAYER_TYPES.values()
)

#: ``rope_type`` -> entries that it needs and entries that it may have. The same in both backends; types that rotate
#: other dimensions than the leading ``rotary_dim`` of a head, and entries that only one backend reads, are left out.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_ROPE_OF_ALL_TYPES = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_ENTRIES: dict[str, Rule] = {
    "rope_theta": _theta,
    "partial_rotary_factor": _rotated,
    "original_max_position_embeddings": size(MAX_POSITIONS),
    "factor": number(1, 1e6),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), _positive),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _positive),
    **dict.fromkeys(("mscale", "mscale_all_dim"), number(0, 1e6)),
    **dict.fromkeys(("short_factor", "long_factor"), list_of(_positive, "a list of numbers")),
    "truncate": _boolean,
}

#: Fields of every transformers config that a wrong value would break without being named.
_TRANSFORMERS_FIELDS: dict[str, Rule] = {
    "model_type": _string,
    "architectures": or_null(list_of(_string, "a list of strings")),
    "transformers_version": or_null(_string),
    "problem_type": or_null(one_of("regression", "single_label_classification", "multi_label_classification")),
    "num_labels": size(MAX_LABELS),
    "id2label": or_null(_labels_fault),
    "label2id": or_null(_labels_fault),
    "output_attentions": or_null(_boolean),
    "output_hidden_states": or_null(_boolean),
    "return_dict": or_null(_boolean),
    "is_encoder_decoder": expect("false: this is a decoder", lambda value: value is False),
    "chunk_size_feed_forward": expect(
        "0: experts run on whole sequences", lambda value: is_integer(value) and value == 0
    ),
    "per_layer_config": expect("null: all layers have the same sizes", lambda value: value is None),
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        or_null(instance("a string", str, Mapping)),
    ),
    "quantization_config": or_null(
        expect("an object", lambda value: isinstance(value, Mapping) or hasattr(value, "to_dict"))
    ),
}

_rope_type = one_of(*_ROPE_TYPES)

#: Field -> rule. A field that is not here may hold anything.
RULES: dict[str, Rule] = {
    "vocab_size": size(MAX_VOCAB_SIZE),
    "hidden_size": size(MAX_WIDTH),
    "intermediate_size": size(MAX_WIDTH),
    "num_hidden_layers": size(MAX_LAYERS),
    "num_attention_heads": size(MAX_HEADS),
    "num_key_value_heads": size(MAX_HEADS),
    "head_dim": or_null(size(MAX_HEAD_DIM)),
    "rotary_dim": or_null(size(MAX_HEAD_DIM)),
    "num_local_experts": size(MAX_EXPERTS_PER_LAYER),
    "num_experts": size(MAX_EXPERTS_PER_LAYER),
    "num_experts_per_tok": size(MAX_EXPERTS_PER_LAYER),
    "max_position_embeddings": size(MAX_POSITIONS),
    "shared_intermediate_size": or_null(integer(0, MAX_WIDTH)),
    "shared_moe_mode": one_of(*SHARED_MOE_MODES),
    "attn_type_list": or_null(list_of(_code, "a list with one entry per layer")),
    "layer_types": or_null(list_of(_layer_type, "a list with one entry per layer")),
    **dict.fromkeys((*RESIDUAL_FACTORS, *CONVERTED_FACTORS), _factor),
    "postnorm": _boolean,
    "block_size": size(MAX_POSITIONS),
    "rms_norm_eps": number(1e-30, 1),
    "hidden_act": expect("'silu', the only activation of this family", lambda value: value == "silu"),
    "sliding_window": expect("null: softmax layers see everything", lambda value: value is None),
    "head_dtype": expect(
        "'float32' or 'model' (that of the weights)", lambda value: isinstance(value, str) and value in HEAD_DTYPES
    ),
    "mask_vocab_padding": _boolean,
    "rope_theta": _theta,
    "partial_rotary_factor": or_null(_rotated),
    "rope_parameters": or_null(_rope_fault),
    "rope_scaling": or_null(_rope_fault),
    "attention_dropout": _share,
    "router_jitter_noise": _share,
    "router_aux_loss_coef": number(0, 1e4),
    "initializer_range": number(0, 1e4),
    "bos_token_id": or_null(_token),
    "pad_token_id": or_null(_token),
    "eos_token_id": or_null(lambda name, value: (_tokens if isinstance(value, list | tuple) else _token)(name, value)),
    "tie_word_embeddings": _boolean,
    "use_cache": _boolean,
    "output_router_logits": _boolean,
    "dtype": or_null(_dtype_fault),
    "torch_dtype": or_null(_dtype_fault),
    **_TRANSFORMERS_FIELDS,
}

_ROTARY = ("head_dim", "rotary_dim", "partial_rotary_factor", "rope_parameters", "rope_scaling")
_CHECKS = (
    _Check(("num_hidden_layers",), ("attn_type_list", "layer_types"), _pattern_fault),
    _Check(("hidden_size", "num_attention_heads"), _ROTARY, _rotary_fault),
    _Check(("num_attention_heads", "num_key_value_heads"), (), _key_value_heads_fault),
    _Check(("num_local_experts", "num_experts_per_tok", "num_hidden_layers"), ("num_experts",), _experts_fault),
    _Check((), ("rope_theta", "rope_parameters", "rope_scaling"), _theta_fault),
    _Check(("vocab_size",), TOKEN_FIELDS, _token_fault),
    _Check(
        ("num_hidden_layers",),
        ("attn_type_list", "layer_types", "postnorm", "model_type", *RESIDUAL_FACTORS, *CONVERTED_FACTORS),
        _growth_fault,
    ),
)
