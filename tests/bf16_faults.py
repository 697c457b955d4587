# SPDX-License-Identifier: Apache-2.0
"""Faults that a check of a bf16 model must see, planted in a model of either backend and in the PyTorch kernels.

Each was once invisible: as a whole, a bf16 model with any of them is as close to the truth as a sound one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from minimax_plugin.kernels import reference


def slopes_in_bf16(model: nn.Module) -> Any:
    return _changed_slopes(model, lambda slopes: slopes.bfloat16().float())


def slopes_one_percent_off(model: nn.Module) -> Any:
    return _changed_slopes(model, lambda slopes: slopes * 1.01)


def history_decayed_once_more(model: nn.Module) -> Any:
    """What a chunk takes over from the chunks before it is one step too old."""

    def scan(*args: Any, **kwargs: Any) -> None:
        q, k, v, state, out, table = args
        state.mul_(table.powers[:, 1:2])
        chunk_scan(q, k, v, state, out, table, **kwargs)

    chunk_scan = reference.chunk_scan
    return mock.patch.object(reference, "chunk_scan", scan)


def history_decayed_once_less_in_the_output(model: nn.Module) -> Any:
    """The first token of a chunk sees the state before it undecayed; the state that is kept is right."""

    def scan(*args: Any, **kwargs: Any) -> None:
        q, k, v, state, out, table = args
        young = state / table.powers[:, 1:2]
        chunk_scan(q, k, v, state, torch.empty_like(out), table, **kwargs)
        chunk_scan(q, k, v, young, out, table, **kwargs)

    chunk_scan = reference.chunk_scan
    return mock.patch.object(reference, "chunk_scan", scan)


def state_in_bf16_per_chunk(model: nn.Module) -> Any:
    def scan(*args: Any, **kwargs: Any) -> None:
        chunk_scan(*args, **kwargs)
        state = args[3]
        state.copy_(state.bfloat16())

    chunk_scan = reference.chunk_scan
    return mock.patch.object(reference, "chunk_scan", scan)


def state_in_bf16_while_decoding(model: nn.Module) -> Any:
    def decode(*args: Any, **kwargs: Any) -> None:
        decode_loop(*args, **kwargs)
        _, _, state_pool, slots, _ = args
        for slot in slots:
            state_pool[slot].copy_(state_pool[slot].bfloat16())

    decode_loop = reference.decode_loop
    return mock.patch.object(reference, "decode_loop", decode)


def router_weights_in_bf16(model: nn.Module) -> Any:
    return _changed_router(model, lambda hidden, weight: hidden.float() @ weight.bfloat16().float().T)


def router_product_in_bf16(model: nn.Module) -> Any:
    """As a router is that was left in the dtype of the model."""
    return _changed_router(model, lambda hidden, weight: (hidden.bfloat16() @ weight.bfloat16().T).float())


def share_in_bf16(model: nn.Module) -> Any:
    return _changed_output(model, "coefficient", lambda module, inputs, output: output.bfloat16().float())


def logits_in_bf16(model: nn.Module) -> Any:
    head = "logits_processor" if hasattr(model, "logits_processor") else "lm_head"
    return _changed_output(model, head, lambda module, inputs, output: output.bfloat16().float())


def attention_one_percent_off(model: nn.Module) -> Any:
    return _changed_output(model, "self_attn", lambda module, inputs, output: output * 1.01)


def softmax_attention_one_percent_off(model: nn.Module) -> Any:
    def change(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output if hasattr(module, "slopes") else output * 1.01

    return _changed_output(model, "self_attn", change)


def experts_one_percent_off(model: nn.Module) -> Any:
    return _changed_output(model, "block_sparse_moe", lambda module, inputs, output: output * 1.01)


def shared_expert_one_percent_off(model: nn.Module) -> Any:
    return _changed_output(model, "shared_mlp", lambda module, inputs, output: output * 1.01)


Fault = Callable[[nn.Module], Any]

#: Faults of a lightning layer between projection and norm -> the part in ``bf16_layers`` that sees them first.
RECURRENCE_FAULTS: dict[Fault, str] = {
    slopes_in_bf16: "state",
    slopes_one_percent_off: "state",
    history_decayed_once_more: "state",
    history_decayed_once_less_in_the_output: "out",
    state_in_bf16_per_chunk: "state",
    state_in_bf16_while_decoding: "state",
}

FAULTS: dict[Fault, str] = RECURRENCE_FAULTS | {
    router_weights_in_bf16: "router",
    router_product_in_bf16: "router",
    share_in_bf16: "share",
    logits_in_bf16: "logits",
    attention_one_percent_off: "lightning",
    softmax_attention_one_percent_off: "softmax",
    experts_one_percent_off: "routed",
    shared_expert_one_percent_off: "shared",
}


def _changed_router(model: Any, product: Callable[[Tensor, Tensor], Tensor]) -> Any:
    name = "block_sparse_moe.gate"
    gates = [module for path, module in model.named_modules() if path.endswith(name)]
    # What a gate makes of the unit vectors: vLLM repacks the weight itself.
    unit = torch.eye(model.config.hidden_size, dtype=model.lm_head.weight.dtype, device=model.lm_head.weight.device)
    weights = {gate: gate(unit)[0].T.float() for gate in gates}
    return _changed_output(model, name, lambda module, inputs, output: product(inputs[0], weights[module]))


@contextmanager
def _changed_output(model: nn.Module, name: str, change: Callable[[Any, Any, Tensor], Tensor]) -> Iterator[None]:
    """Change what every module gives whose name ends in ``name``; of several results, the first."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(module, inputs, output[0]), *output[1:])
        return change(module, inputs, output)

    hooks = [module.register_forward_hook(hook) for path, module in model.named_modules() if path.endswith(name)]
    assert hooks
    yield
    for handle in hooks:
        handle.remove()


@contextmanager
def _changed_slopes(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    device = next(model.parameters()).device
    # A buffer of the vLLM layers; the Hugging Face layers keep one tensor per device behind a method.
    found = [module.slopes for module in model.modules() if hasattr(module, "slopes")]
    tensors = [slopes if isinstance(slopes, Tensor) else slopes(device) for slopes in found]
    assert tensors
    kept = [slopes.clone() for slopes in tensors]
    for slopes in tensors:
        slopes.copy_(change(slopes))
    yield
    for slopes, value in zip(tensors, kept, strict=True):
        slopes.copy_(value)
