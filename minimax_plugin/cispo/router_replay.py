# SPDX-License-Identifier: Apache-2.0
"""Records which experts the tokens of a batch were routed to, and routes them there again.

Rounding alone sends some tokens to other experts in training than in the rollout (0.75 % per layer in bf16 on a small
model), and those tokens carry the largest errors in probability. Replayed, a token keeps its experts, while their
weights are computed anew from the live router logits, so that the router goes on learning.

Works by hooks on the routers: modules that return (logits [T, E], weights [T, K], expert indices [T, K]), the weights
being the softmax over all experts at the chosen ones, renormalised unless the module has ``norm_topk_prob = False``.

Shapes: ``B`` rows, ``S`` tokens of a padded row, ``T`` tokens of one call of the backbone, ``L`` routers, ``E``
experts, ``K`` experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimax_plugin.cispo.packing import PackedRow, current_row

DEFAULT_ROUTER = "block_sparse_moe.gate"

#: Stands for the experts of a token whose route is unknown; it is routed anew.
NO_ROUTE = -1


@dataclass
class _Batch:
    """What one recording or replay covers: B rows, taken up by calls of the model in order."""

    routes: Tensor | None = None  # [B, S, L, K] to replay
    recorded: list[Tensor] = field(default_factory=list)  # [rows, S, L, K], one for each call of the model so far
    unfinished: Tensor | None = None  # the next of them, while packed rows of it are still to come
    row: int = 0  # rows taken so far
    checked: bool = False  # whether routes name experts


@dataclass
class _Call:
    """One call of the backbone; recomputation under gradient checkpointing meets the same object again."""

    shape: tuple[int, int]  # (B, S) of the padded batch
    row: PackedRow | None
    routes: Tensor | None = None  # [T, L, K]
    chosen: dict[int, Tensor] = field(default_factory=dict)  # router -> indices [T, K] that it chose by itself


class RouterReplay:
    """Hooks on the routers of a model.

    Args:
        model: a model without wrappers; ``model.base_model`` is its backbone.
        router: ending of the names of its routers.

    Attributes:
        layers: number of the layer of each router, read from its name.

    Raises:
        ValueError: no module has such a name.
    """

    def __init__(self, model: PreTrainedModel, router: str = DEFAULT_ROUTER) -> None:
        routers = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{router}")}
        if not routers:
            raise ValueError(
                f"{type(model).__name__} has no module whose name ends in {router!r}, so there are no routes to "
                "replay; set router_replay to 'off', or router_module to the end of the names of its routers"
            )
        self._backbone = model.base_model
        self._names = list(routers)
        self.layers = [int(re.findall(r"\.(\d+)\.", name)[-1]) for name in self._names]
        self._batch: _Batch | None = None
        self._active: ContextVar[_Call | None] = ContextVar("router_replay_call", default=None)
        self._entered: list[Token[_Call | None]] = []
        self._last_call_replayed = False
        self._checked: set[int] = set()
        self._counts: Tensor | None = None
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._handles = [
            # First in line: expert parallelism has a hook that renumbers the experts.
            module.register_forward_hook(self._router_hook(number), prepend=True)
            for number, module in enumerate(routers.values())
        ]
        self._handles += [
            self._backbone.register_forward_pre_hook(self._before_call, with_kwargs=True),
            self._backbone.register_forward_hook(self._after_call, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within it, every call of the model appends its routes ``[B, S, L, K]`` int16, -1 where no token ran."""
        with self._over(_Batch()) as batch:
            yield batch.recorded

    @contextmanager
    def replaying(self, routes: Tensor) -> Iterator[None]:
        """Within it, calls of the model route by ``routes``; several calls take its rows in order.

        Args:
            routes: [B, S, L, K] integers; a token with a negative entry is routed anew.

        Raises:
            ValueError: indices of no expert or one expert twice for a token (looked at on the first call of the model),
                or routes of another number of rows, tokens or routers than the model runs.
        """
        if routes.dim() != 4 or routes.shape[2] != len(self._names):
            raise ValueError(
                f"routes have the shape {tuple(routes.shape)}, expected [rows, tokens, {len(self._names)} routers, "
                "experts per token]"
            )
        with self._over(_Batch(routes)) as batch:
            yield
        if batch.row != routes.shape[0]:
            raise ValueError(f"routes are of {routes.shape[0]} rows, but the model ran {batch.row}")

    def pop_counts(self) -> Tensor:
        """[2] fp32: of the tokens and layers replayed since the last call of this, how many would have gone to other
        experts, and how many there are."""
        counts, self._counts = self._counts, None
        return torch.zeros(2, device=next(self._backbone.parameters()).device) if counts is None else counts

    @contextmanager
    def _over(self, batch: _Batch) -> Iterator[_Batch]:
        before, self._batch = self._batch, batch
        try:
            yield batch
        finally:
            self._batch = before

    def _before_call(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered.append(self._active.set(None))  # taken off again even if what follows raises
        batch, row, call = self._batch, current_row(), None
        if batch is not None and (row is None or row.batch_shape[0]):
            for module in self._checkpointing:
                _carry_call(module, self._active)
            call = _Call(_padded_shape(args, kwargs) if row is None else row.batch_shape, row)
            if batch.routes is not None and not (row and row.idle):
                call.routes = _routes_of(batch, call)
        self._last_call_replayed = call is not None and call.routes is not None
        self._active.set(call)

    def _after_call(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, batch = self._active.get(), self._batch
        self._active.reset(self._entered.pop())
        if call is None or batch is None or output is None:
            return
        missing = [name for number, name in enumerate(self._names) if number not in call.chosen]
        if missing:
            raise ValueError(f"the routers {missing} did not run; router replay needs every layer to")
        if batch.routes is None:
            _record(batch, call)
        if call.row is None or call.row.last:
            batch.row += call.shape[0]

    def _router_hook(self, number: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(router: nn.Module, args: Any, output: Any) -> Any:
            call = self._active.get()
            if call is None:
                # A private call of torch without a public counterpart: is this thread running a backward pass?
                if self._last_call_replayed and torch._C._current_graph_task_id() != -1:
                    raise RuntimeError(
                        "a layer is recomputed without its replayed routes; use the gradient checkpointing of "
                        "transformers (gradient_checkpointing=True), or set router_replay to 'off'"
                    )
                return None
            logits, weights, own = self._outputs(number, output)
            recomputed, call.chosen[number] = number in call.chosen, own
            renormalise = getattr(router, "norm_topk_prob", True)
            if number not in self._checked:
                self._check(number, output, renormalise)
            if call.routes is None:
                return None
            if self._batch is not None and not self._batch.checked:
                _check_routes(self._batch, logits.shape[1])
            given = call.routes[:, number].to(own.device, own.dtype)
            known = (given >= 0).all(dim=1, keepdim=True)
            indices = torch.where(known, given, own)
            if not recomputed:
                self._compare(own, indices, known)
            return logits, _weights(logits, indices, renormalise).to(weights.dtype), indices

        return hook

    def _outputs(self, number: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point():
            return output
        raise ValueError(
            f"the router {self._names[number]} returns {type(output).__name__}, expected the tuple (logits, weights, "
            "expert indices); set router_replay to 'off'"
        )

    @torch.no_grad()
    def _check(self, number: int, output: tuple[Tensor, Tensor, Tensor], renormalise: bool) -> None:
        """Refuse a router that weighs experts in another way; once for each."""
        logits, weights, own = output
        self._checked.add(number)
        tolerance = 1e-5 if weights.dtype == torch.float32 else 1e-2
        if own.numel() and not torch.allclose(_weights(logits, own, renormalise), weights.float(), atol=tolerance):
            raise ValueError(
                f"the router {self._names[number]} does not weigh experts by a softmax over all of them, which router "
                "replay would compute; set router_replay to 'off'"
            )

    @torch.no_grad()
    def _compare(self, own: Tensor, replayed: Tensor, known: Tensor) -> None:
        differing = (own.sort(dim=1).values != replayed.sort(dim=1).values).any(dim=1)
        counts = torch.stack([differing.sum(), known.sum()]).float()
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)


class _CarryCall:
    """A checkpointing function whose layer meets, when it is recomputed, the call that it ran in at first.

    The backward pass may run in another thread and after other calls, hence a closure for each.
    """

    def __init__(self, checkpoint: Callable[..., Any], active: ContextVar[_Call | None]) -> None:
        self.checkpoint, self.active = checkpoint, active

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.active.get()
        if call is None:
            return self.checkpoint(layer, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            token = self.active.set(call)
            try:
                return layer(*args, **kwargs)
            finally:
                self.active.reset(token)

        return self.checkpoint(run, *args, **kwargs)


def rollout_routes(
    routes: Sequence[Any], attention_mask: Tensor, layers: Sequence[int], *, dtype: torch.dtype = torch.int16
) -> Tensor:
    """Routes of an inference engine, sequence by sequence, as the padded batch [B, S, L, K] of the trainer.

    Args:
        routes: B arrays [tokens, layers of the model, K] of prompt and completion. An engine never runs the last token
            it samples, so its route may be missing: -1 then.
        attention_mask: [B, S], nonzero for tokens. A completion that was masked as a whole takes no routes.
        layers: layers with a router.

    Raises:
        ValueError: fewer routes than tokens before the last, or another number of sequences.
    """
    mask = attention_mask != 0
    if len(routes) != mask.shape[0]:
        raise ValueError(f"the rollout engine returned routes of {len(routes)} sequences, expected {mask.shape[0]}")
    result = torch.full((*mask.shape, len(layers), routes[0].shape[-1]), NO_ROUTE, dtype=dtype)
    for row, values in enumerate(routes):
        places = mask[row].nonzero().squeeze(1).cpu()
        if values.shape[0] < places.shape[0] - 1:
            raise ValueError(
                f"the rollout engine returned routes of {values.shape[0]} tokens for sequence {row} of "
                f"{places.shape[0]} tokens; set router_replay to 'train'"
            )
        places = places[: values.shape[0]]
        chosen = torch.as_tensor(values[: places.shape[0]].astype("int64"))[:, list(layers)]
        result[row, places] = chosen.to(dtype)
    return result.to(attention_mask.device)


def _padded_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and tokens of a backbone's inputs."""
    given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    rows, length = next(tensor.shape[:2] for tensor in given if tensor is not None)
    return rows, length


def _carry_call(module: Any, active: ContextVar[_Call | None]) -> None:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is not None and not isinstance(checkpoint, _CarryCall):
        module._gradient_checkpointing_func = _CarryCall(checkpoint, active)


def _routes_of(batch: _Batch, call: _Call) -> Tensor:
    """Routes [T, L, K] of the tokens that a call runs."""
    assert batch.routes is not None
    rows, length = call.shape
    routes = batch.routes[batch.row : batch.row + rows]
    if routes.shape[:2] != (rows, length):
        raise ValueError(
            f"routes are of {tuple(batch.routes.shape[:2])} rows and tokens, but the model runs rows {batch.row} to "
            f"{batch.row + rows} of {length} tokens"
        )
    flat = routes.flatten(0, 1)
    return flat if call.row is None else flat[call.row.token_index.to(flat.device)]


def _record(batch: _Batch, call: _Call) -> None:
    chosen = torch.stack([call.chosen[number] for number in range(len(call.chosen))], dim=1).to(torch.int16)
    if call.row is None:
        batch.recorded.append(chosen.view(*call.shape, *chosen.shape[1:]))
        return
    if batch.unfinished is None:
        batch.unfinished = chosen.new_full((*call.shape, *chosen.shape[1:]), NO_ROUTE)
    if not call.row.idle:
        batch.unfinished.flatten(0, 1)[call.row.token_index] = chosen
    if call.row.last:
        batch.recorded.append(batch.unfinished)
        batch.unfinished = None


@torch.no_grad()
def _check_routes(batch: _Batch, num_experts: int) -> None:
    assert batch.routes is not None
    batch.checked = True
    routes = batch.routes[(batch.routes >= 0).all(dim=-1)].sort(dim=-1).values
    if routes.numel() and int(routes.max()) >= num_experts:
        raise ValueError(f"routes name the expert {int(routes.max())}, but the model has {num_experts}")
    if bool((routes.diff(dim=-1) == 0).any()):
        raise ValueError("routes name an expert twice for one token, so they are no top-k choice of experts")


def _weights(logits: Tensor, indices: Tensor, renormalise: bool) -> Tensor:
    """Weights [T, K] fp32 of the experts at ``indices`` [T, K] by ``logits`` [T, E]."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, indices)
    return weights / weights.sum(dim=-1, keepdim=True) if renormalise else weights
