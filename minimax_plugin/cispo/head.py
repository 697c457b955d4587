# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from hidden states, a few tokens at a time.

The logits of a training batch are its largest tensor by far: 2,048 tokens of the released vocabulary of 200,064 take
1.5 GiB, and as much again for every copy. Here at most ``chunk_tokens`` rows of logits exist at once; backward computes
them a second time. The product is fp32, as in MiniMax's own training (arXiv 2506.13585, section 3.2), without TF32.

Shapes: ``N`` scored tokens, ``V`` vocabulary, ``C`` tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: A weight in lower precision is widened in pieces of about so many values (32 MiB in fp32).
_PIECE_VALUES = 1 << 23


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
    compute_dtype: torch.dtype = torch.float32,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``log softmax(hidden @ weight.T / temperature)`` at the labels, and the entropy of each row.

    Differentiable in ``hidden``, ``weight`` and ``bias``; gradients are accumulated in fp32.

    Args:
        hidden: [N, hidden], any float dtype.
        weight: [V, hidden]; a DTensor is gathered.
        labels: [N] int64, each in [0, V).
        bias: [V] or None.
        temperature: divides the logits.
        chunk_tokens: C. Memory beyond inputs and gradients is about C * V * 4 bytes, twice that with an entropy.
        compute_dtype: dtype of the operands of the logits; everything after the product is fp32.
        with_entropy: also return entropies.

    Returns:
        Log-probabilities [N] fp32, and entropies [N] fp32 in nats or None.

    Raises:
        ValueError: shapes that do not fit together, ``chunk_tokens`` below 1 or ``temperature`` not above 0.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}, expected "
            "[N, hidden], [V, hidden] and [N]"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
    log_probs, entropy = _ChunkedLogProbs.apply(
        hidden, weight, bias, labels, temperature, chunk_tokens, compute_dtype, with_entropy
    )
    return log_probs, entropy if with_entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
        compute_dtype: torch.dtype,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # Entropies are mostly only logged.
        ctx.temperature, ctx.chunk_tokens, ctx.compute_dtype = temperature, chunk_tokens, compute_dtype
        target = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        normaliser, entropy = torch.empty_like(target), torch.empty_like(target if with_entropy else target[:0])
        with _plain_arithmetic(hidden.device):
            for rows in _chunks(hidden.shape[0], chunk_tokens):
                logits = _logits(hidden[rows], weight, bias, temperature, compute_dtype)
                target[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
                largest = logits.amax(dim=1)
                logits -= largest[:, None]
                exps = logits.exp() if with_entropy else logits.exp_()
                total = exps.sum(dim=1)
                normaliser[rows] = total.log() + largest
                if with_entropy:
                    entropy[rows] = total.log() - exps.mul_(logits).sum(dim=1) / total
                del logits, exps  # before the next chunk takes as much
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser, entropy)
        return target - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser, entropy = ctx.saved_tensors
        of_log_probs, of_entropy = grads
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        with _plain_arithmetic(hidden.device):
            for rows in _chunks(hidden.shape[0], ctx.chunk_tokens):
                log_probs = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.compute_dtype)
                log_probs -= normaliser[rows, None]
                grad = _logits_grad(
                    log_probs,
                    labels[rows],
                    None if of_log_probs is None else of_log_probs[rows],
                    None if of_entropy is None else of_entropy[rows],
                    entropy[rows] if of_entropy is not None else None,
                )
                grad /= ctx.temperature
                if grad_hidden is not None:
                    grad_hidden[rows] = _times(grad, weight).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, hidden[rows].float())
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                del log_probs, grad
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _logits_grad(
    log_probs: Tensor,
    labels: Tensor,
    of_log_probs: Tensor | None,
    of_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """Gradient [C, V] of the logits; may overwrite ``log_probs`` [C, V]."""
    if of_entropy is None:
        weights = log_probs.new_zeros(log_probs.shape[0]) if of_log_probs is None else of_log_probs
        grad = log_probs.exp_().mul_(-weights[:, None])
    else:
        assert entropy is not None
        probs = log_probs.exp()
        # dH/dz = -p (log p + H), d log p_label/dz = onehot - p
        factor = entropy * of_entropy if of_log_probs is None else entropy * of_entropy + of_log_probs
        grad = log_probs.mul_(of_entropy[:, None]).add_(factor[:, None]).mul_(probs).neg_()
    if of_log_probs is not None:
        grad.scatter_add_(1, labels[:, None], of_log_probs[:, None].to(grad.dtype))
    return grad


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, compute_dtype: torch.dtype
) -> Tensor:
    """``[C, hidden]`` -> [C, V] fp32, operands in ``compute_dtype``."""
    hidden = hidden.to(compute_dtype)
    if weight.dtype == compute_dtype:
        logits = (hidden @ weight.T).float()
    else:
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
        for piece in _pieces(weight):
            logits[:, piece] = (hidden @ weight[piece].to(compute_dtype).T).float()
    if bias is not None:
        logits += bias.float()
    if temperature != 1.0:
        logits /= temperature
    return logits


def _times(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` [C, V] fp32 times ``weight`` [V, hidden], in fp32."""
    if weight.dtype == torch.float32:
        return grad @ weight
    product = grad.new_zeros(grad.shape[0], weight.shape[1])
    for piece in _pieces(weight):
        product.addmm_(grad[:, piece], weight[piece].float())
    return product


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _pieces(weight: Tensor) -> Iterator[slice]:
    return _chunks(weight.shape[0], max(1, _PIECE_VALUES // weight.shape[1]))


def _gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 keeps as a DTensor; its gradient is scattered again."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 within."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    if device.type == "cuda":
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        if device.type == "cuda":
            matmul.fp32_precision = precision
