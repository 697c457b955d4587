# SPDX-License-Identifier: Apache-2.0
"""Scores completions with the token-chunked head, and without padding where asked for.

TRL hands over batches of left-padded prompts and right-padded completions. Packed, the real tokens of all rows become
one row whose ``position_ids`` start anew in every sequence; models that know this convention (ours, and those of
transformers with softmax attention only) keep the sequences apart, which :func:`check_packing` verifies once.

Everything happens inside the model's own ``forward``, so that DDP, FSDP2, PEFT and gradient checkpointing see one call.

Shapes: ``B`` rows, ``S`` tokens of a padded row, ``P`` tokens of a packed row, ``N`` scored tokens.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from minimax_plugin.cispo.head import token_log_probs

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

#: Config fields by which models of transformers scale or cap their logits, which the chunked head does not do.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)

#: Tokens of each sequence of :func:`check_packing`.
_CHECK_LENGTH = 8


@dataclass(frozen=True)
class ScoringOptions:
    """How a model scores completions.

    Attributes:
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at once.
        compute_dtype: dtype of the operands of the logits, None for that of the hidden states.
        pack: take padding out.
        max_tokens: most tokens of a packed row; a longer sequence gets a row of its own. None for one row.
        with_entropy: also return entropies.
    """

    temperature: float = 1.0
    chunk_tokens: int = 256
    compute_dtype: torch.dtype | None = torch.float32
    pack: bool = False
    max_tokens: int | None = None
    with_entropy: bool = True


@dataclass(frozen=True)
class PackedRow:
    """One packed row of a padded batch.

    Attributes:
        token_index: [P] int64, places of its tokens in the flattened [B * S].
        position_ids: [1, P], from 0 in every sequence.
        batch_shape: (B, S) of the padded batch.
        last: no row of the same batch follows.
        idle: one token of which nothing is used, so that every process runs the model, and equally often.
    """

    token_index: Tensor
    position_ids: Tensor
    batch_shape: tuple[int, int]
    last: bool
    idle: bool = False


#: What :func:`check_packing` runs: no part of any batch.
_PROBE = PackedRow(torch.zeros(0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), (0, 0), False, idle=True)

_current_row: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)


def current_row() -> PackedRow | None:
    """The packed row that the backbone is running; None for a padded batch."""
    return _current_row.get()


def install_scoring(model: PreTrainedModel, options: ScoringOptions) -> None:
    """Make ``model(..., labels=labels, fused_lm_head=True)`` score by this module; other calls stay as they are.

    TRL's trainer calls its models in this way. To be called after TRL's ``add_fused_lm_head``, before PEFT's or a
    parallel wrapper's ``forward`` is first used.

    Args:
        model: a causal language model, without wrappers.
        options: how it scores.

    Raises:
        ValueError: the config scales or caps the logits, or ``options`` are out of range.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"pack_max_tokens is {options.max_tokens}, expected at least 1, or None for no bound")
    config = model.config.get_text_config()
    transforms = {name: getattr(config, name, None) for name in _LOGIT_TRANSFORMS}
    used = {name: value for name, value in transforms.items() if value not in (None, 1.0)}
    if used:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits ({used}), which the token-chunked head does not do; set "
            "head_chunk_tokens to None"
        )
    inner_forward = model.forward
    scorer = _Scorer(options)

    @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return scorer(self, *args, **kwargs) if fused_lm_head else inner_forward(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


class _Scorer:
    """The forward pass of :func:`install_scoring`."""

    def __init__(self, options: ScoringOptions) -> None:
        self.options = options
        self.packing_checked = False

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor,
        **kwargs: Any,
    ) -> FusedCausalLMOutput:
        """Log-probabilities and entropies [B, S - 1] fp32 of the labels of the next tokens, zero at ignored ones."""
        kwargs["use_cache"] = False
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        scored = labels[:, 1:] != IGNORED_LABEL
        if self.options.pack:
            hidden, router_logits = self._packed_hidden(model, input_ids, attention_mask, scored, kwargs)
        else:
            outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden = outputs.last_hidden_state[:, :-1][scored.to(outputs.last_hidden_state.device)]
            router_logits = getattr(outputs, "router_logits", None)
        log_probs, entropy = self._score(model, hidden, labels[:, 1:][scored])
        # masked_scatter keeps a batch without any label connected to the model, as DDP and FSDP need it.
        full = [
            None if values is None else values.new_zeros(scored.shape).masked_scatter(scored.to(values.device), values)
            for values in (log_probs, entropy)
        ]
        aux_loss = None
        if kwargs.get("output_router_logits"):
            mask = None if self.options.pack else attention_mask
            config = model.config.get_text_config()
            aux_loss = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask)
        return FusedCausalLMOutput(log_probs=full[0], entropy=full[1], label_mask=scored, aux_loss=aux_loss)

    def _score(self, model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        head = model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if hasattr(weight, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 shards lm_head.weight; set head_chunk_tokens to None for TRL's own head")
        return token_log_probs(
            hidden.to(weight.device),
            weight,
            labels.to(weight.device),
            bias=bias,
            temperature=self.options.temperature,
            chunk_tokens=self.options.chunk_tokens,
            compute_dtype=self.options.compute_dtype or _product_dtype(hidden),
            with_entropy=self.options.with_entropy,
        )

    def _packed_hidden(
        self,
        model: PreTrainedModel,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        scored: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states [N, hidden] that predict the scored tokens, in the order of the batch, and router logits."""
        if input_ids is None or attention_mask is None:
            raise ValueError("pack_sequences needs input_ids and attention_mask; set pack_sequences to False")
        unknown = sorted(set(kwargs) - {"use_cache", "output_router_logits"})
        if unknown:
            raise ValueError(f"pack_sequences packs text only, got the inputs {unknown}; set pack_sequences to False")
        if not self.packing_checked:
            check_packing(model.base_model)
            self.packing_checked = True
        with_aux = bool(kwargs.get("output_router_logits"))
        hidden: list[Tensor] = []
        places: list[Tensor] = []
        router_logits: list[tuple[Tensor, ...]] = []
        predicts = nn.functional.pad(scored, (0, 1)).flatten()
        for row in pack_batch(attention_mask, scored, self.options.max_tokens, keep_unscored=with_aux):
            with _running(row):
                ids = input_ids.flatten()[row.token_index][None]
                outputs = model.base_model(input_ids=ids, position_ids=row.position_ids, **kwargs)
            kept = (predicts[row.token_index] & (not row.idle)).nonzero().squeeze(1)
            # An idle row adds nothing but its place in the graph, so that its backward runs as well.
            hidden.append(outputs.last_hidden_state[0][kept.to(outputs.last_hidden_state.device)])
            places.append(row.token_index[kept])
            if with_aux and not row.idle:
                router_logits.append(outputs.router_logits)
        order = torch.cat(places).argsort().to(hidden[0].device)
        layers = tuple(torch.cat(layer) for layer in zip(*router_logits, strict=True)) if with_aux else None
        return torch.cat(hidden)[order], layers


def pack_batch(
    attention_mask: Tensor, scored: Tensor, max_tokens: int | None = None, *, keep_unscored: bool = False
) -> list[PackedRow]:
    """Cut a padded batch into packed rows.

    Sequences of which nothing is scored are left out. There is always a row: one of a single token where all are.

    Args:
        attention_mask: [B, S], nonzero for tokens.
        scored: [B, S - 1] bool, True where the token after is scored.
        max_tokens: see :class:`ScoringOptions`.
        keep_unscored: leave no sequence out.

    Raises:
        ValueError: a scored token has no token before it.
    """
    tokens = attention_mask != 0
    batch_size = tokens.shape[0]
    orphans = scored & ~tokens[:, :-1]
    counts, scores, lost = torch.stack([tokens.sum(1), scored.sum(1), orphans.sum(1)]).tolist()
    if any(lost):
        raise ValueError(
            f"row {next(row for row in range(batch_size) if lost[row])} of the batch has a completion token without a "
            "token before it, so nothing predicts it; give every prompt at least one token"
        )
    kept = [row for row in range(batch_size) if counts[row] and (scores[row] or keep_unscored)]
    positions = tokens.cumsum(1) - 1
    rows = []
    for group in _group([counts[row] for row in kept], max_tokens):
        chosen = torch.zeros(batch_size, 1, dtype=torch.bool)
        chosen[[kept[place] for place in group]] = True
        index = (tokens & chosen.to(tokens.device)).flatten().nonzero().squeeze(1)
        rows.append((index, positions.flatten()[index][None]))
    wanted = max(1, len(rows))
    if max_tokens is not None:
        wanted = _most_rows(wanted, tokens.device)
    idle = wanted - len(rows)
    first = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    rows += [(first, first[None])] * idle
    return [
        PackedRow(
            index, position_ids, (batch_size, tokens.shape[1]), last=number == wanted - 1, idle=number >= wanted - idle
        )
        for number, (index, position_ids) in enumerate(rows)
    ]


@torch.no_grad()
def check_packing(backbone: PreTrainedModel) -> None:
    """Refuse a model that lets packed sequences see each other.

    Runs two packed sequences in either order: the first never sees the second, so each must come out the same in both
    places. Shapes and, in a mixture of experts, loads are equal, so that even bf16 gives the same to the last bit.

    Args:
        backbone: takes ``input_ids`` and ``position_ids``, returns ``last_hidden_state``.

    Raises:
        ValueError: the hidden states differ.
    """
    embedding = backbone.get_input_embeddings().weight
    # No two tokens alike: attention over equal tokens gives the same however many of them it sees.
    ids = torch.arange(1, 2 * _CHECK_LENGTH + 1, device=embedding.device)[None] % embedding.shape[0]
    positions = torch.arange(_CHECK_LENGTH, device=embedding.device).repeat(2)[None]
    was_training = backbone.training
    backbone.eval()
    try:
        with _running(_PROBE):
            one, other = (
                backbone(input_ids=ids.roll(shift, 1), position_ids=positions, use_cache=False)
                .last_hidden_state.double()
                .roll(-shift, 1)
                for shift in (0, _CHECK_LENGTH)
            )
    finally:
        backbone.train(was_training)
    error = ((one - other).norm() / one.norm()).item()
    if not error <= (1e-4 if embedding.dtype in (torch.float32, torch.float64) else 1e-2):
        raise ValueError(
            f"{type(backbone).__name__} does not keep packed sequences apart by position_ids: hidden states of a "
            f"sequence change by {error:.1e} with the sequence before it; set pack_sequences to False"
        )


@contextmanager
def _running(row: PackedRow | None) -> Iterator[None]:
    token = _current_row.set(row)
    try:
        yield
    finally:
        _current_row.reset(token)


def _group(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Places of the lengths in groups of at most ``limit`` in sum; the longest first, each into the first that fits."""
    if limit is None:
        return [list(range(len(lengths)))] if lengths else []
    groups: list[list[int]] = []
    sums: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fits = next((number for number, total in enumerate(sums) if total + lengths[place] <= limit), None)
        if fits is None:
            groups.append([])
            sums.append(0)
            fits = len(groups) - 1
        groups[fits].append(place)
        sums[fits] += lengths[place]
    return groups


def _most_rows(count: int, device: torch.device) -> int:
    """The largest ``count`` of all processes: FSDP waits for ever where one runs the model less often than another."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    most = torch.tensor([count], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
