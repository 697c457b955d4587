# SPDX-License-Identifier: Apache-2.0
"""Lightning states inside the caches of transformers: one :class:`StatePool` per layer, one slot per batch row.

``DynamicCache`` and ``StaticCache`` put a ``LinearAttentionLayer`` at every index that the config calls
``"linear_attention"``. :func:`adopt_cache` replaces those by :class:`LightningCacheLayer`, which updates its state in
place and can take tokens back, so that assisted generation and prompt lookup work.

Shapes: ``B`` batch rows, ``T`` tokens, ``H`` heads, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from minimax_plugin.hf_modeling.batch import LightningBatch
from minimax_plugin.kernels import ops
from minimax_plugin.state_cache import StatePool


class LightningCacheLayer(LinearAttentionLayer):
    """State of one lightning layer, ``[B, H, D, D]`` fp32, kept in ``recurrent_states[0]``.

    With ``record_past`` (see ``Cache.activate_past_recording``) it remembers the state before the last
    :attr:`MAX_TAIL` tokens at most and the projections of those tokens, and :meth:`crop` runs what remains again.
    """

    #: Tokens that can be taken back. A longer prompt is run in two parts, and only the last tokens are remembered.
    MAX_TAIL = 256

    def __init__(self) -> None:
        super().__init__()
        self._snapshot: Tensor | None = None
        self._tail: list[tuple[Tensor, Tensor | None]] = []
        self._slopes: Tensor | None = None

    @property
    def is_croppable(self) -> bool:
        """True: a rollback of up to :attr:`MAX_TAIL` recorded tokens leaves no trace."""
        return True

    @property
    def tail_length(self) -> int:
        """Number of recorded tokens."""
        return sum(qkv.shape[1] for qkv, _ in self._tail)

    def attend(self, qkv: Tensor, slopes: Tensor, batch: LightningBatch) -> Tensor:
        """Attend to the cached tokens and to the new ones, and add the new ones to the state.

        Args:
            qkv: [B, T, H, 3D], before the activation.
            slopes: [H] fp32.
            batch: the B * T tokens as sequences.

        Returns:
            [B, T, H, D]. Differentiable if ``qkv`` requires a gradient; the graph then runs through the state.

        Raises:
            ValueError: the cache holds another number of rows, or a state that is not fp32.
        """
        states = self._require_states(qkv)
        if torch.is_grad_enabled() and qkv.requires_grad:
            return self._attend_with_graph(qkv, slopes, batch, states)
        if not self.record_past:
            return _advance(states, qkv, slopes, batch)
        self._slopes = slopes
        return self._attend_recording(qkv, slopes, batch, states)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a number <= 0) and forget how to take back more.

        Raises:
            RuntimeError: past recording is off, the number is positive, or fewer tokens are recorded.
        """
        if not self.record_past:
            raise RuntimeError("this cache does not record past tokens; call activate_past_recording() before crop()")
        if tokens_to_remove > 0:
            raise RuntimeError(f"crop({tokens_to_remove}): expected the number of tokens to remove as a negative one")
        keep = self.tail_length + tokens_to_remove
        if keep < 0:
            raise RuntimeError(
                f"crop({tokens_to_remove}): only {self.tail_length} tokens are recorded since the last crop (at most "
                f"{self.MAX_TAIL} ever are)"
            )
        if tokens_to_remove and self._snapshot is not None and self._slopes is not None:
            states = self.recurrent_states[0]
            states.copy_(self._snapshot)
            for qkv, mask in self._tail:
                part = min(keep, qkv.shape[1])
                _replay(states, qkv[:, :part], None if mask is None else mask[:, :part], self._slopes)
                keep -= part
        self._forget_tail()

    def reset(self) -> None:
        """Zero the states, keep the memory."""
        super().reset()
        self._forget_tail()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]`` (beam search)."""
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device), ...])

    def _require_states(self, qkv: Tensor) -> Tensor:
        batch_size, _, num_heads, width = qkv.shape
        if not self.is_recurrent_states_initialized[0]:
            shape = (batch_size, num_heads, width // 3, width // 3)
            self.lazy_initialization(recurrent_states=torch.zeros(shape, dtype=torch.float32, device=qkv.device))
            self.dtype, self.device = torch.float32, qkv.device
        # The flag that transformers sets for models with a convolution; without it get_recurrent_state() hides states.
        self.has_previous_state[0] = True
        states = self.recurrent_states[0]
        if states.shape[0] != batch_size:
            raise ValueError(f"the cache holds {states.shape[0]} rows, but the batch has {batch_size}")
        return states

    def _attend_with_graph(self, qkv: Tensor, slopes: Tensor, batch: LightningBatch, states: Tensor) -> Tensor:
        if self.record_past:
            raise RuntimeError("past recording keeps no autograd graph; run the model under torch.no_grad()")
        StatePool(states)  # Only for its check of the dtype.
        if batch.plan is None:
            batch = LightningBatch.build(batch.batch_size, batch.length, batch.mask, qkv.device, cached=False)
        out, self.recurrent_states[0] = ops.lightning_attention_packed(
            batch.pack(qkv), slopes, initial_state=states, output_final_state=True, plan=batch.plan
        )
        return batch.unpack(out)

    def _attend_recording(self, qkv: Tensor, slopes: Tensor, batch: LightningBatch, states: Tensor) -> Tensor:
        cut = qkv.shape[1] - self.MAX_TAIL
        if cut > 0:
            head_mask, tail_mask = (None, None) if batch.mask is None else (batch.mask[:, :cut], batch.mask[:, cut:])
            head = _replay(states, qkv[:, :cut], head_mask, slopes)
            # Copied: a view would keep the projections of the whole prompt in memory.
            tail = qkv[:, cut:].clone()
            self._snapshot, self._tail = states.clone(), [(tail, tail_mask)]
            return torch.cat([head, _replay(states, tail, tail_mask, slopes)], dim=1)
        if self._snapshot is None:
            self._snapshot = states.clone()
        self._drop_oldest(self.tail_length + qkv.shape[1] - self.MAX_TAIL, self._snapshot, slopes)
        self._tail.append((qkv, batch.mask))
        return _advance(states, qkv, slopes, batch)

    def _drop_oldest(self, count: int, snapshot: Tensor, slopes: Tensor) -> None:
        """Move the snapshot past the ``count`` oldest recorded tokens."""
        while count > 0 and self._tail:
            qkv, mask = self._tail.pop(0)
            part = min(count, qkv.shape[1])
            _replay(snapshot, qkv[:, :part], None if mask is None else mask[:, :part], slopes)
            if part < qkv.shape[1]:
                self._tail.insert(0, (qkv[:, part:], None if mask is None else mask[:, part:]))
            count -= part

    def _forget_tail(self) -> None:
        self._snapshot, self._tail = None, []

    def _map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        if self.is_recurrent_states_initialized[0]:
            self.recurrent_states[0] = select(self.recurrent_states[0])
        if self._snapshot is not None:
            self._snapshot = select(self._snapshot)
        self._tail = [(select(qkv), None if mask is None else select(mask)) for qkv, mask in self._tail]


class CountingLightningCacheLayer(LightningCacheLayer, CacheLayerMixin):
    """For models without a softmax layer: counts the tokens, which caches otherwise ask a softmax layer for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = False
        self._num_tokens = 0

    def attend(self, qkv: Tensor, slopes: Tensor, batch: LightningBatch) -> Tensor:
        self._num_tokens += qkv.shape[1]
        return super().attend(qkv, slopes, batch)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._num_tokens += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self._num_tokens = 0

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding included."""
        return self._num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything seen."""
        return self._num_tokens + query_length, 0

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a lightning layer caches a state, no keys and values")


def adopt_cache(cache: Cache, layer_types: list[str]) -> None:
    """Put lightning layers into a cache, in place; a cache that has them already is left as it is.

    Args:
        cache: ``DynamicCache`` or ``StaticCache``, built with or without a config.
        layer_types: of the model.

    Raises:
        ValueError: the cache was built for another model.
    """
    all_linear = "full_attention" not in layer_types
    make_lightning: type[LightningCacheLayer] = CountingLightningCacheLayer if all_linear else LightningCacheLayer
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not None:
        # DynamicCache() without a config would grow a softmax layer at every index.
        cache.layers = [make_lightning() if kind == "linear_attention" else DynamicLayer() for kind in layer_types]
        cache.layer_class_to_replicate = None
        return
    if len(cache.layers) != len(layer_types):
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, but the model has {len(layer_types)}; build it with "
            "DynamicCache(config=model.config)"
        )
    for layer_idx, kind in enumerate(layer_types):
        layer = cache.layers[layer_idx]
        if isinstance(layer, LightningCacheLayer) == (kind == "linear_attention"):
            continue
        if kind != "linear_attention" or type(layer) is not LinearAttentionLayer:
            raise ValueError(
                f"past_key_values.layers[{layer_idx}] is a {type(layer).__name__}, but that layer of the model is "
                f"{kind}; build the cache with DynamicCache(config=model.config)"
            )
        adopted = make_lightning()
        adopted.record_past = layer.record_past
        cache.layers[layer_idx] = adopted


def _advance(states: Tensor, qkv: Tensor, slopes: Tensor, batch: LightningBatch) -> Tensor:
    """Run the tokens and update ``states`` in place; returns [B, T, H, D]."""
    pool = StatePool(states)
    packed = batch.pack(qkv)
    out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 3)
    slots = batch.slots(qkv.device)
    if batch.plan is None:
        pool.decode(packed, slopes, slots, out=out)
    else:
        pool.prefill(packed, slopes, slots, torch.ones_like(slots, dtype=torch.bool), batch.plan, out=out)
    return batch.unpack(out)


def _replay(states: Tensor, qkv: Tensor, mask: Tensor | None, slopes: Tensor) -> Tensor:
    if qkv.shape[1] == 0:
        return qkv[..., : qkv.shape[-1] // 3]
    return _advance(
        states, qkv, slopes, LightningBatch.build(qkv.shape[0], qkv.shape[1], mask, qkv.device, cached=True)
    )
