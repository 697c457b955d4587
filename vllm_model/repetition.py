# SPDX-License-Identifier: Apache-2.0
"""Repetition stop for vLLM: opt-in logits processors for Model Runner V1 and V2, of any model.

Start the engine with ``logits_processors=["minimax_plugin.vllm_model.repetition:RepetitionStop"]`` (or
``--logits-processors``) and ask for it in each request:
``SamplingParams(extra_args={"repetition_stop_tokens": 3000, "repetition_stop_prob": 0.99})``, over HTTP ``vllm_xargs``.
Requests that do not ask are untouched.

Never an entry point of the group ``vllm.logits_processors``: engines load every class they find there, and Model Runner
V2 refuses to start where one of them has the interface of V1.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimax_plugin.repetition import DEFAULT_PROBABILITY, RunLengths, check_repetition_values, force_token
from minimax_plugin.vllm_model.compat import MoveDirectionality, logits_processor_base

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

#: Keys of ``SamplingParams.extra_args``: N, p (0.99 if absent), the token to force (the request's end token if absent),
#: and a name, unique to the request, under which :func:`take_stopped` reports it.
TOKENS_KEY = "repetition_stop_tokens"
PROBABILITY_KEY = "repetition_stop_prob"
TOKEN_ID_KEY = "repetition_stop_token_id"
NAME_KEY = "repetition_stop_name"

_V1: Any = logits_processor_base(v2=False)
_V2: Any = logits_processor_base(v2=True)
_NO_LIMIT = torch.iinfo(torch.int64).max
_DUMMY = 0  # the slot of rows that are not counted


@dataclass(frozen=True)
class _Rule:
    """What one request asked for."""

    tokens: int
    log_probability: float
    token_id: int
    name: str | None


def _rule_of(params: SamplingParams) -> _Rule | None:
    extra = params.extra_args or {}
    if extra.get(TOKENS_KEY) is None:
        return None
    token_id = extra.get(TOKEN_ID_KEY, params.eos_token_id)
    if token_id is None:
        token_id = min(params.all_stop_token_ids, default=None)
    if token_id is None:
        logger.warning("a request with %s has no end token to force; set %s", TOKENS_KEY, TOKEN_ID_KEY)
        return None
    probability = extra.get(PROBABILITY_KEY, DEFAULT_PROBABILITY)
    return _Rule(extra[TOKENS_KEY], math.log(probability), token_id, extra.get(NAME_KEY))


class _Requests:
    """Slots with the counts of all requests, on the device, and what each asked for.

    A request keeps its slot when it leaves the batch: it may only have been preempted. Those that are out the longest
    make room.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._max_parked = 4 * max_num_seqs
        size = 1 + max_num_seqs
        self._runs = RunLengths(size, device)
        self._limit = torch.full((size,), _NO_LIMIT, dtype=torch.int64, device=device)
        self._log_probability = torch.zeros(size, dtype=torch.float32, device=device)
        self._token_id = torch.zeros(size, dtype=torch.int64, device=device)
        self._forced = torch.zeros(size, dtype=torch.bool, device=device)
        self._free = list(range(size - 1, _DUMMY, -1))
        self._rules: dict[int, _Rule] = {}
        #: Identity of a request outside the batch -> slot, and its parameters, which must outlive their id.
        self._parked: OrderedDict[Hashable, tuple[int, SamplingParams]] = OrderedDict()
        self._reports: list[tuple[str, Tensor]] = []
        self._rows: list[int] = []
        self._row_slots = torch.empty(0, dtype=torch.int64, device=device)

    def admit(self, params: SamplingParams, *, resumed: bool) -> int:
        """Slot for a request that enters the batch; the dummy slot if it asks for nothing."""
        rule = _rule_of(params)
        if rule is None:
            return _DUMMY
        parked = self._parked.pop(_identity(params), None)
        if parked is not None:
            slot, _ = parked
            if resumed:
                return slot
            self._release(slot)
        if not self._free:
            self._make_room()
        slot = self._free.pop()
        self._rules[slot] = rule
        self._runs.forget(slot)
        self._limit[slot] = rule.tokens
        self._log_probability[slot] = rule.log_probability
        self._token_id[slot] = rule.token_id
        self._forced[slot] = False
        return slot

    def park(self, slot: int, params: SamplingParams) -> None:
        """The request has left the batch."""
        if slot != _DUMMY:
            self._parked[_identity(params)] = (slot, params)

    def limit(self, slot: int) -> int | None:
        """N of the request, None if it is not counted."""
        rule = self._rules.get(slot)
        return None if rule is None else rule.tokens

    def apply(self, slots: list[int], positions: Tensor, previous: Tensor, logits: Tensor, *, may_stop: bool) -> None:
        """Count one step and force end tokens.

        Args:
            slots: [R], one per row of ``logits``.
            positions: [R] tokens generated so far.
            previous: [R] last token.
            logits: [R, V] fp32, changed in place.
            may_stop: whether any request has generated enough tokens to be stopped.
        """
        if slots != self._rows:
            self._rows, self._row_slots = list(slots), to_device(slots, self._device)
        rows = self._row_slots
        run = self._runs.advance(rows, positions, previous, logits, self._log_probability[rows])
        if may_stop:
            forced = force_token(logits, run >= self._limit[rows], self._token_id[rows])
            self._forced[rows] = self._forced[rows] | forced

    @torch.inference_mode()  # like the steps of an engine, whose tensors cannot be changed outside of it
    def take_stopped(self) -> set[str]:
        """Names of the requests that were stopped since the last call."""
        for slot, rule in self._rules.items():
            self._report(slot, rule)
        reports, self._reports = self._reports, []
        self._forced.zero_()
        flags = torch.stack([flag for _, flag in reports]).tolist() if reports else []
        return {name for (name, _), flag in zip(reports, flags, strict=True) if flag}

    def _report(self, slot: int, rule: _Rule) -> None:
        if rule.name is not None:
            self._reports.append((rule.name, self._forced[slot].clone()))

    def _release(self, slot: int) -> None:
        self._report(slot, self._rules.pop(slot))
        self._limit[slot] = _NO_LIMIT
        self._free.append(slot)

    def _make_room(self) -> None:
        if len(self._parked) >= self._max_parked:
            _, (slot, _) = self._parked.popitem(last=False)
            self._release(slot)
            return
        old = self._runs.size
        self._runs.grow(2 * old)
        for name in ("_limit", "_log_probability", "_token_id", "_forced"):
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, torch.zeros_like(tensor)]))
        self._limit[old:] = _NO_LIMIT
        self._free.extend(range(2 * old - 1, old - 1, -1))


def _identity(params: SamplingParams) -> Hashable:
    # A runner hands over the same object again, or, after a copy between processes, one with the same name.
    return (params.extra_args or {}).get(NAME_KEY, id(params))


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """[R] int64 without waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _validate(params: SamplingParams) -> None:
    extra = params.extra_args or {}
    tokens = extra.get(TOKENS_KEY)
    if tokens is None:
        return
    names = (f"extra_args[{TOKENS_KEY!r}]", f"extra_args[{PROBABILITY_KEY!r}]")
    check_repetition_values(tokens, extra.get(PROBABILITY_KEY, DEFAULT_PROBABILITY), names=names)
    if params.ignore_eos and TOKEN_ID_KEY not in extra:
        raise ValueError(
            f"{names[0]} is {tokens}, but ignore_eos=True makes the end token end nothing; leave one of them out"
        )


_ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def take_stopped() -> set[str]:
    """Names (see :data:`NAME_KEY`) of requests of this process that were stopped since the last call.

    Call it between calls of ``LLM.generate``. Waits for the device.
    """
    return set().union(*(processor.requests.take_stopped() for processor in list(_ALIVE)))


class RepetitionStopV1(_V1):
    """For Model Runner V1, which does not combine logits processors with speculative decoding.

    Runs after bad words and allowed tokens, before penalties and temperature.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = torch.device(device)
        self.requests = _Requests(vllm_config.scheduler_config.max_num_seqs, self._device)
        #: Row of the batch -> slot, parameters and the list to which the runner appends what it samples.
        self._batch: dict[int, tuple[int, SamplingParams, list[int]]] = {}
        _ALIVE.add(self)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for values out of range."""
        _validate(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: greedy requests are stopped too."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """Follow requests that enter, leave and move."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._leave(row)
        for row, params, _, output in batch_update.added:
            self._leave(row)
            self._batch[row] = (self.requests.admit(params, resumed=bool(output)), params, output)
        for source, target, direction in batch_update.moved:
            moving, staying = self._batch.pop(source, None), self._batch.pop(target, None)
            if moving is not None:
                self._batch[target] = moving
            if direction == MoveDirectionality.SWAP:
                if staying is not None:
                    self._batch[source] = staying
            elif staying is not None:
                self.requests.park(*staying[:2])

    def apply(self, logits: Tensor) -> Tensor:
        """[R, V], one row per request of the batch."""
        slots, positions, previous, may_stop = [], [], [], False
        for row in range(logits.shape[0]):
            slot, _, output = self._batch.get(row, (_DUMMY, None, []))
            slots.append(slot)
            positions.append(len(output))
            previous.append(output[-1] if output else -1)
            limit = self.requests.limit(slot)
            may_stop |= limit is not None and len(output) >= limit
        if any(slots):
            where, token = to_device([*positions, *previous], self._device).view(2, -1)
            self.requests.apply(slots, where, token, logits, may_stop=may_stop)
        return logits

    def _leave(self, row: int) -> None:
        left = self._batch.pop(row, None)
        if left is not None:
            self.requests.park(*left[:2])


class RepetitionStopV2(_V2):
    """For Model Runner V2.

    Runs after penalties and bad words, before temperature.

    Raises:
        ValueError: the engine decodes speculatively; tokens that are drafted are not counted.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("RepetitionStop does not work with speculative decoding; leave one of them out")
        self._states = req_states
        self.requests = _Requests(req_states.max_num_reqs, req_states.device)
        #: Slot of the runner -> slot of ours and parameters.
        self._slots: dict[int, tuple[int, SamplingParams]] = {}
        _ALIVE.add(self)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for values out of range."""
        _validate(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether the request asks to be stopped."""
        left = self._slots.pop(req_idx, None)
        if left is not None:
            self.requests.park(*left)
        self._park_earlier_self(sampling_params)
        resumed = bool(self._states.prefill_len.np[req_idx] > self._states.prompt_len.np[req_idx])
        slot = self.requests.admit(sampling_params, resumed=resumed)
        if slot == _DUMMY:
            return False
        self._slots[req_idx] = (slot, sampling_params)
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """[R, V] fp32, one row per request of the batch."""
        indices = ctx.idx_mapping_np.tolist()
        slots = [self._slots.get(index, (_DUMMY, None))[0] for index in indices]
        if not any(slots):
            return logits
        prompt_lengths = self._states.prompt_len.np[ctx.idx_mapping_np]
        generated = (ctx.seq_lens_upper_bound_np - prompt_lengths).tolist()
        limits = [self.requests.limit(slot) for slot in slots]
        may_stop = any(limit is not None and count >= limit for limit, count in zip(limits, generated, strict=True))
        positions = ctx.pos + 1 - to_device(prompt_lengths.tolist(), logits.device)
        self.requests.apply(slots, positions, ctx.input_ids.long(), logits, may_stop=may_stop)
        return logits

    def _park_earlier_self(self, params: SamplingParams) -> None:
        # The runner does not say when a request leaves; one that was preempted comes back in another slot.
        for index, (slot, earlier) in list(self._slots.items()):
            if _identity(earlier) == _identity(params):
                del self._slots[index]
                self.requests.park(slot, earlier)


class RepetitionStop(_V1, _V2):
    """The class to name to an engine: makes the processor that its model runner takes."""

    def __new__(cls, vllm_config: VllmConfig, *rest: Any) -> Any:
        """``(vllm_config, device, is_pin_memory)`` from V1, ``(vllm_config, req_states)`` from V2."""
        return (RepetitionStopV1 if len(rest) == 2 else RepetitionStopV2)(vllm_config, *rest)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for values out of range."""
        _validate(sampling_params)
