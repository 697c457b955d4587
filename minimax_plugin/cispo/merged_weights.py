# SPDX-License-Identifier: Apache-2.0
"""Full tensors of a trained model, one at a time, under the names of the model without adapters or wrappers.

Adapters are merged into copies. Merging in place and subtracting afterwards, as PEFT's ``merge_adapter`` and
``unmerge_adapter`` do, leaves rounding errors in the frozen weights each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: Parts of parameter names that wrappers add: activation checkpointing, torch.compile, adapters.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "base_layer", "token_adapter")


def full_parameters(model: nn.Module, *, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of every parameter, adapters merged; sharded ones gathered when their turn comes.

    Gathering is a collective operation: every process must iterate to the end.

    Args:
        model: any model, or a PEFT model.
        device: where sharded parameters that are offloaded to the CPU are gathered.

    Raises:
        ValueError: a weight is quantised by bitsandbytes, or an adapter can be active only beside the weights.
    """
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            yield _plain_name(name), full_tensor(parameter, device)
        return
    yield from _merged_parameters(model, device)


def full_tensor(tensor: Any, device: torch.device | None = None) -> Tensor:
    """The tensor without autograd, gathered if it is sharded.

    Raises:
        ValueError: it is quantised by bitsandbytes.
    """
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        raise ValueError(
            f"a weight is a {type(tensor).__name__} of bitsandbytes, which a rollout engine cannot receive exactly; "
            "load the model without quantization"
        )
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if device is not None and tensor.device.type == "cpu" and device.type != "cpu":
        tensor = tensor.to(device)
    return tensor.full_tensor()


def _merged_parameters(model: nn.Module, device: torch.device | None) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners: dict[nn.Module, list[BaseTunerLayer]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            tuners.setdefault(module.get_base_layer(), []).append(module)
    adapters = {id(p) for layers in tuners.values() for p in _adapter_parameters(layers)}
    bases = {id(p): base for base in tuners for p in base.parameters(recurse=False)}
    active = set(_active_adapters(model))

    merged: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        if id(parameter) in adapters or "original_module" in parts:
            continue
        if "modules_to_save" in parts:
            adapter = parts.pop(parts.index("modules_to_save") + 1)
            parts.remove("modules_to_save")
            if adapter not in active:
                continue
        base = bases.get(id(parameter))
        if base is None:
            tensor = full_tensor(parameter, device)
        else:
            if id(parameter) not in merged:
                merged |= _merge(base, tuners[base], device)
            tensor = merged.pop(id(parameter))
        yield _plain_name(".".join(parts)), tensor


def _merge(base: nn.Module, layers: list[Any], device: torch.device | None) -> dict[int, Tensor]:
    """Merged values of a base module's own parameters, by the id of the parameter; nothing is changed."""
    owners = [base, *(module for layer in layers for module in _adapter_modules(layer))]
    identities = {name: id(parameter) for name, parameter in base.named_parameters(recurse=False)}
    with _stand_ins(owners, device):
        for layer in layers:
            if layer.merged_adapters:
                raise ValueError(f"an adapter is merged into {type(base).__name__} already; call unmerge_adapter first")
            try:
                layer.merge(safe_merge=True)
            finally:
                layer.merged_adapters.clear()
        return {identities[name]: value.data for name, value in base.named_parameters(recurse=False)}


@contextmanager
def _stand_ins(modules: Iterable[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Put full, unsharded parameters in place of the own ones of ``modules``; they share memory where they can.

    A safe merge rebinds the data of a parameter to a new tensor, so what the memory holds stays.
    """
    originals = [(module, dict(module._parameters)) for module in modules]
    try:
        for module, parameters in originals:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(full_tensor(parameter, device), requires_grad=False)
        yield
    finally:
        for module, parameters in originals:
            module._parameters.update(parameters)


def _adapter_modules(layer: Any) -> Iterator[nn.Module]:
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        holder = getattr(layer, name, None)
        if isinstance(holder, nn.Module):
            yield from holder.modules()


def _adapter_parameters(layers: Iterable[Any]) -> Iterator[nn.Parameter]:
    for layer in layers:
        for module in _adapter_modules(layer):
            yield from module.parameters(recurse=False)


def _active_adapters(model: Any) -> list[str]:
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
