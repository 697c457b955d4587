# SPDX-License-Identifier: Apache-2.0
"""Every part of every layer of a bf16 model against the float64 oracle, each part given what the model gave it.

A bf16 model as a whole says little: its roundings add up over the layers until wrong slopes or a wrong router are lost
among them. A part that is given the very numbers that the model had can differ by its own roundings only, and those are
known: rounding to bf16 changes a number by at most 2^-8 of it, fp32 arithmetic by some 1e-7.

:func:`recorded` fills a :class:`Record` from a running model of either backend, :func:`check_layers` judges it.

Shapes: ``T`` tokens of one sequence, fed in ``S`` steps (pieces of the prompt, then one by one), ``H`` heads, ``D``
head_dim, ``E`` experts, ``K`` of them per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from oracle import Oracle, OracleCache, tiny_config
from recurrence import recurrence, split_heads
from torch import Tensor, nn

#: A model for the comparison. Slopes go from 0.5 down to 5.6e-4 in the seventh layer; the last layer, whose factor of
#: 1e-5 leaves no decay to be seen, is a softmax layer.
CONFIG = tiny_config(
    attn_type_list=[0, 1, 0, 0, 0, 0, 0, 1],
    num_hidden_layers=8,
    num_attention_heads=8,
    hidden_size=64,
    intermediate_size=32,
    shared_intermediate_size=32,
)

#: One rounding to bf16, at most; on average over numbers 1.6e-3.
ROUNDED = 2**-8

#: Largest relative error of any row (a token, of one head where there are heads; a state of one head) by part. ``qkv``
#: and ``out`` are rounded once at the end. The others are fp32 and carry nothing of bf16: a sound state has 1.4e-7, one
#: of which anything was rounded to bf16 1e-3.
EXACT_BOUNDS = {"qkv": ROUNDED, "out": ROUNDED, "state": 1e-5, "router": 1e-5, "share": 1e-5, "logits": 1e-5}

#: Relative error in the mean square over rows, of the prompt and of the single tokens, by part. These round on the way:
#: a norm before its weight; residuals at every sum; a lightning layer six times from the recurrence on; a softmax layer
#: its queries, keys and probabilities; an expert both halves and their product. One percent is beyond each.
ROUGH_BOUNDS = {
    "normed": ROUNDED,
    "sum": 1.5 * ROUNDED,
    "lightning": 1.75 * ROUNDED,
    "softmax": 1.75 * ROUNDED,
    "routed": 1.75 * ROUNDED,
    "shared": 1.75 * ROUNDED,
}


class Record:
    """What the parts of a model gave, step by step, by names like ``3.qkv``.

    ``L.input``, ``L.normed``, ``L.attended``, ``L.normed_again``, ``L.routed``, ``L.shared``, ``L.output`` [T, hidden];
    ``L.router`` [T, E], ``L.routing`` [T, E or K] (logits or weights, as the experts take them) and ``L.share`` [T, 1]
    fp32; of a lightning layer ``L.qkv`` [T, 3HD], ``L.out`` [T, HD] and ``L.state`` [S, H, D, D] fp32; ``final``
    [T, hidden]; ``head_input`` and ``logits`` of as many rows as there are.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Append the rows of one step."""
        self._parts.setdefault(name, []).append(value.detach().clone())

    def steps(self) -> list[int]:
        """Number of tokens of each step."""
        return [len(part) for part in self._parts["0.input"]]

    def tensors(self) -> dict[str, Tensor]:
        """All parts, the steps one after the other."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


@contextmanager
def recorded(model: Any, record: Record) -> Iterator[None]:
    """Fill ``record`` while the model runs one sequence, but for the states and what has to do with the LM head.

    The modules of both backends go by the names of the checkpoint. Leading dims other than [T] are flattened.
    """

    def keep(name: str, module: nn.Module, pick: Callable[[Any, Any], Any] = lambda inputs, output: output) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = pick(inputs, output)
            value = value[0] if isinstance(value, tuple) else value
            record.add(name, value.reshape(-1, value.shape[-1]))

        hooks.append(module.register_forward_hook(hook))

    hooks: list[Any] = []
    for index, layer in enumerate(model.model.layers):
        keep(f"{index}.input", layer, lambda inputs, output: inputs[-1])
        keep(f"{index}.normed", layer.input_layernorm)
        keep(f"{index}.attended", layer.self_attn)
        keep(f"{index}.normed_again", layer.post_attention_layernorm)
        keep(f"{index}.router", layer.block_sparse_moe.gate)
        # The vLLM experts take the logits, the Hugging Face experts indices and weights.
        keep(f"{index}.routing", layer.block_sparse_moe.experts, lambda inputs, output: inputs[-1])
        keep(f"{index}.routed", layer.block_sparse_moe)
        keep(f"{index}.output", layer)
        attention = layer.self_attn
        if hasattr(attention, "slopes"):
            # Called otherwise in vLLM, whose LoRA code takes the name for a packed module.
            keep(f"{index}.qkv", attention.in_proj if hasattr(attention, "in_proj") else attention.qkv_proj)
            keep(f"{index}.out", attention.norm, lambda inputs, output: inputs[0])
        if hasattr(layer, "coefficient"):
            # The Hugging Face module gives the share, the vLLM module a tuple with its logit.
            keep(f"{index}.share", layer.coefficient, lambda inputs, output: _share(output))
            keep(f"{index}.shared", layer.shared_mlp)
    keep("final", model.model.norm)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _share(output: Any) -> Tensor:
    return torch.sigmoid(output[0]) if isinstance(output, tuple) else output


def check_layers(
    oracle: Oracle,
    tokens: Sequence[int],
    steps: Sequence[int],
    found: dict[str, Tensor],
    bounds: dict[str, float] | None = None,
) -> dict[str, float]:
    """Hold all parts of a run over ``tokens`` against the oracle.

    Args:
        oracle: the same checkpoint; its weights must be those of the model exactly.
        tokens: ids fed, ``sum(steps)`` of them.
        steps: number of tokens of each step.
        found: :meth:`Record.tensors`.
        bounds: changes of :data:`EXACT_BOUNDS` and :data:`ROUGH_BOUNDS`.

    Returns:
        The largest error of each part.

    Raises:
        AssertionError: naming the first part that is off, its layer and its error.
    """
    assert sum(steps) == len(tokens) and max(steps) > 1 and min(steps) == 1
    check = _Check(oracle, found, steps, bounds or {})
    check.same("0.input", oracle.weights["model.embed_tokens.weight"][list(tokens)])
    for layer in range(oracle.num_layers):
        if layer:
            check.same(f"{layer}.input", check.part(f"{layer - 1}.output"))
        check.layer(layer)
    last = check.part(f"{oracle.num_layers - 1}.output")
    check.close("final", "normed", check.part("final"), oracle.norm("model.norm", last))
    check.close("logits", "logits", check.part("logits"), oracle.head(check.part("head_input")))
    return check.worst


def check_recurrence(
    slopes: Tensor,
    qkv: Tensor,
    steps: Sequence[int],
    states: Tensor,
    out: Tensor,
    bounds: dict[str, float] | None = None,
) -> None:
    """The part of :func:`check_layers` between the projection and the norm of a lightning layer.

    Args:
        slopes: [H].
        qkv: [T, H, 3D] before the activation, in the dtype of the model.
        steps: number of tokens of each step.
        states: [S, H, D, D] after each step.
        out: [T, H, D].
        bounds: changes of :data:`EXACT_BOUNDS`.
    """
    _Check(None, {}, steps, bounds or {}).recurrence("layer", slopes, qkv, states, out)


class _Check:
    def __init__(self, oracle: Any, found: dict[str, Tensor], steps: Sequence[int], bounds: dict[str, float]) -> None:
        self.oracle, self.found, self.steps = oracle, found, list(steps)
        self.bounds = EXACT_BOUNDS | ROUGH_BOUNDS | bounds
        self.worst: dict[str, float] = {}

    def part(self, name: str) -> Tensor:
        return self.found[name].double()

    def same(self, name: str, expected: Tensor) -> None:
        assert torch.equal(self.part(name), expected), f"{name} is not what came before it"

    def close(self, name: str, kind: str, found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape and found.numel(), f"{name}: {found.shape}, expected {expected.shape}"
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        if kind in ROUGH_BOUNDS:
            single = torch.tensor(self.steps).repeat_interleave(torch.tensor(self.steps)) == 1
            error = max(float(errors[rows].square().mean().sqrt()) for rows in (single, ~single))
        else:
            error = float(errors.max())
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        bound = self.bounds[kind]
        assert error <= bound, f"{name} ({kind}): relative error {error:.1e}, expected at most {bound:.1e}"

    def layer(self, layer: int) -> None:
        oracle, prefix = self.oracle, f"model.layers.{layer}"
        hidden, normed, attended = (self.part(f"{layer}.{name}") for name in ("input", "normed", "attended"))
        self.close(f"{layer}.normed", "normed", normed, oracle.norm(f"{prefix}.input_layernorm", hidden))
        softmax = oracle.config["attn_type_list"][layer] == 1
        if softmax:
            expected = oracle.softmax_attention(layer, normed, OracleCache())
            self.close(f"{layer}.attended", "softmax", attended, expected)
        else:
            qkv, out = (self.found[f"{layer}.{name}"].unflatten(-1, (oracle.num_heads, -1)) for name in ("qkv", "out"))
            self.close(f"{layer}.qkv", "qkv", qkv.double(), oracle.lightning_projection(layer, normed))
            self.recurrence(f"{layer}", oracle.slopes(layer), qkv, self.found[f"{layer}.state"], out)
            expected = oracle.lightning_output(layer, normed, out.double())
            self.close(f"{layer}.attended", "lightning", attended, expected)
        residual = normed if oracle.config["postnorm"] else hidden
        hidden = oracle.combine("full_attention" if softmax else "linear_attention", residual, attended)
        expected = oracle.norm(f"{prefix}.post_attention_layernorm", hidden)
        self.close(f"{layer}.normed_again", "sum", self.part(f"{layer}.normed_again"), expected)
        self.experts(layer, hidden)

    def recurrence(self, name: str, slopes: Tensor, qkv: Tensor, states: Tensor, out: Tensor) -> None:
        """From the projection that the model made: the state after every step, and the output of every token."""
        assert states.dtype == torch.float32 and len(states) == len(self.steps)
        state, outputs = None, []
        for step, piece in enumerate(qkv.split(self.steps)):
            part, state = recurrence(*split_heads(piece), slopes, state)
            outputs.append(part)
            self.close(f"{name}.state after step {step}", "state", states[step].double().flatten(1), state.flatten(1))
        self.close(f"{name}.out", "out", out.double(), torch.cat(outputs))

    def experts(self, layer: int, hidden: Tensor) -> None:
        oracle, normed, output = self.oracle, self.part(f"{layer}.normed_again"), self.part(f"{layer}.routed")
        routed, router = oracle.routed_experts(layer, normed)
        self.close(f"{layer}.router", "router", self.part(f"{layer}.router"), router)
        routing = self.part(f"{layer}.routing")
        expected = router if routing.shape == router.shape else oracle.route(layer, normed)[1]
        self.close(f"{layer}.routing", "router", routing, expected)
        self.close(f"{layer}.routed", "routed", output, routed)
        if oracle.config["shared_intermediate_size"]:
            share, shared = self.part(f"{layer}.share"), self.part(f"{layer}.shared")
            self.close(f"{layer}.share", "share", share, oracle.share_of_shared_expert(layer, normed))
            self.close(f"{layer}.shared", "shared", shared, oracle.shared_expert(layer, normed))
            output = output * (1 - share) + shared * share
        residual = normed if oracle.config["postnorm"] else hidden
        self.close(f"{layer}.output", "sum", self.part(f"{layer}.output"), oracle.combine("mlp", residual, output))
