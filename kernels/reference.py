# SPDX-License-Identifier: Apache-2.0
"""Lightning attention in plain PyTorch: the float64 recurrence (oracle) and the fp32 chunk loop that serves CPUs.

Shapes: ``B`` batch, ``T`` tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``C`` tokens of one chunk.

One head with slope ``s`` and ``lam = exp(-s)`` keeps a state ``S`` of shape [D_k, D_v]::

    S_t = lam * S_{t-1} + k_t v_t^T          o_t = q_t S_t

(MiniMax-01 report, arXiv 2501.08313, equations 6 to 12; no ``1 / sqrt(D)`` scale). A chunk of C tokens that starts
from ``S`` is, with ``i, j`` counted from 0 inside the chunk::

    o_i = sum_{j <= i} lam^(i-j) (q_i k_j) v_j + lam^(i+1) q_i S        S <- lam^C S + sum_j lam^(C-1-j) k_j v_j^T

The gradients are the same recurrence with the roles permuted, two of the three running backwards in time::

    dq = scan(do, v, k, S_0^T)     dk = scan_reverse(v, do, q, dS_T^T)     dv = scan_reverse(k, q, do, dS_T)

``scan_reverse`` visits the tokens last to first and keeps a state that is already decayed to the next token it will
visit, so ``dS_T`` enters the last token with ``lam^0`` and the final state of the ``dv`` pass is the gradient of
``S_0``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

#: Tokens of one chunk. 64 balances the quadratic part against the state part at head_dim 128.
CHUNK = 64


def recurrence_fp64(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token in float64: the oracle that every other implementation is tested against.

    Differentiable. ``slopes`` are used as given (fp32 values widened to float64).

    Args:
        q, k, v: [T, H, D], any floating dtype.
        slopes: [H].
        initial_state: [H, D, D] or None for zeros.

    Returns:
        outputs [T, H, D] and final state [H, D, D], both float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    decay = torch.exp(-slopes.double())[:, None, None]
    num_heads, head_dim = q.shape[-2:]
    state = q.new_zeros(num_heads, head_dim, v.shape[-1]) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(q.shape[0]):
        state = decay * state + k[t][:, :, None] * v[t][:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    out = torch.stack(outputs) if outputs else q.new_zeros(0, num_heads, v.shape[-1])
    return out, state


class DecayTable:
    """Powers ``lam^n`` of one layer for ``n <= C`` and the causal decay matrix, built once per call, fp32."""

    def __init__(self, slopes: Tensor, chunk: int = CHUNK) -> None:
        exponent = torch.arange(chunk + 1, device=slopes.device, dtype=torch.float32)
        #: [H, C + 1, 1]: ``powers[h, n] = exp(-slope[h] * n)``.
        self.powers = torch.exp(-slopes[:, None] * exponent)[..., None]
        #: [H, C + 1, 1]: ``powers - 1`` to the last bit, by which a state is advanced: an error of ``lam^C`` would be
        #: multiplied up over the chunks of a long sequence.
        self.decrements = torch.expm1(-slopes[:, None] * exponent)[..., None]
        distance = exponent[:chunk, None] - exponent[None, :chunk]
        #: [H, C, C]: ``lam^(i - j)`` on and below the diagonal, 0 above. The exponent is never positive.
        self.causal = torch.exp(-slopes[:, None, None] * distance.clamp(min=0.0)) * (distance >= 0)


def chunk_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    out: Tensor,
    table: DecayTable,
    *,
    reverse: bool = False,
) -> None:
    """Scan one sequence in chunks of :data:`CHUNK` tokens; fp32 arithmetic whatever the dtype of the inputs.

    Args:
        q, k, v: [T, H, D], any strides; each chunk is widened to fp32 by itself.
        state: [H, D, D] fp32, updated in place. With ``reverse`` it is the pre-decayed state of the module docstring.
        out: [T, H, D], written in its own dtype.
        table: decay powers of the layer.
        reverse: visit the tokens last to first.
    """
    num_tokens = q.shape[0]
    starts = range(0, num_tokens, CHUNK)
    for start in reversed(starts) if reverse else starts:
        stop = min(start + CHUNK, num_tokens)
        length = stop - start
        q_c, k_c, v_c = (x[start:stop].float().transpose(0, 1).contiguous() for x in (q, k, v))
        if reverse:
            # Token i is visited as number r = length - 1 - i.
            causal = table.causal[:, :length, :length].transpose(1, 2)
            q_decay = table.powers[:, :length].flip(1)
            k_decay = table.powers[:, 1 : length + 1]
        else:
            causal = table.causal[:, :length, :length]
            q_decay = table.powers[:, 1 : length + 1]
            k_decay = table.powers[:, :length].flip(1)
        scores = torch.bmm(q_c, k_c.transpose(1, 2)).mul_(causal)
        # Out of place: with one token or one head the fp32 chunk is a view of the caller's tensor.
        result = torch.bmm(scores, v_c).baddbmm_(q_c * q_decay, state)
        state.addcmul_(state, table.decrements[:, length : length + 1]).baddbmm_((k_c * k_decay).transpose(1, 2), v_c)
        out[start:stop] = result.transpose(0, 1)


def accumulate_state(k: Tensor, v: Tensor, state: Tensor, table: DecayTable, *, reverse: bool = False) -> None:
    """The state update of :func:`chunk_scan` alone: ``k``, ``v`` [T, H, D] are added to ``state`` [H, D, D] fp32."""
    starts = range(0, k.shape[0], CHUNK)
    for start in reversed(starts) if reverse else starts:
        k_c, v_c = (x[start : start + CHUNK].float().transpose(0, 1) for x in (k, v))
        length = k_c.shape[1]
        decay = table.powers[:, 1 : length + 1] if reverse else table.powers[:, :length].flip(1)
        state.addcmul_(state, table.decrements[:, length : length + 1]).baddbmm_((k_c * decay).transpose(1, 2), v_c)


def prefill_loop(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Sequence[int],
    has_initial: Sequence[bool],
    segments: Sequence[Sequence[int]],
    out: Tensor,
    *,
    activation: str | None = "silu",
    checkpoint_slots: Sequence[int] | None = None,
    null_slot: int = -1,
) -> None:
    """Packed varlen prefill over slots: the CPU body of :func:`minimax_plugin.kernels.ops.lightning_prefill`.

    ``segments`` are rows ``(sequence, start, stop)`` in time order within each sequence. A sequence whose slot is not
    above ``null_slot`` is padding: its output rows become zero and no state is read or written.
    """
    table = DecayTable(slopes)
    seen: set[int] = set()
    for row, (sequence, start, stop) in enumerate(segments):
        slot = slot_ids[sequence]
        if slot <= null_slot:
            out[start:stop] = 0
            continue
        state = state_pool[slot]
        if sequence not in seen and not has_initial[sequence]:
            state.zero_()
        seen.add(sequence)
        for lo in range(start, stop, CHUNK):
            hi = min(lo + CHUNK, stop)
            q, k, v = split_packed(qkv[lo:hi], activation)
            chunk_scan(q, k, v, state, out[lo:hi], table)
        if checkpoint_slots is not None and checkpoint_slots[row] > null_slot:
            state_pool[checkpoint_slots[row]] = state


def decode_loop(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Sequence[int],
    out: Tensor,
    *,
    activation: str | None = "silu",
    null_slot: int = -1,
) -> None:
    """One token per sequence, state updated in place: the CPU body of ``lightning_decode``.

    Working on views of the pool beats gathering and scattering the states by a factor of four on a CPU.
    """
    q, k, v = (x.float() for x in split_packed(qkv, activation))
    decrement = torch.expm1(-slopes)[:, None, None]
    for row, slot in enumerate(slot_ids):
        if slot <= null_slot:
            out[row] = 0
            continue
        state = state_pool[slot]
        _state_step(state, decrement, k[row], v[row])
        out[row] = torch.bmm(q[row].unsqueeze(1), state).squeeze(1)


def verify_loop(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    read_slots: Sequence[int],
    write_slots: Sequence[Sequence[int]],
    cu_seqlens: Sequence[int],
    out: Tensor,
    *,
    activation: str | None = "silu",
    null_slot: int = -1,
) -> None:
    """A few tokens per sequence, the state after each one kept: the CPU body of ``lightning_verify``.

    Sequence n starts from ``read_slots[n]`` (zeros if that is not above ``null_slot``) and stores the state after its
    j-th token in ``write_slots[n][j]``. A sequence whose first write slot is not above ``null_slot`` is padding.
    """
    q, k, v = (x.float() for x in split_packed(qkv, activation))
    decrement = torch.expm1(-slopes)[:, None, None]
    for n, source in enumerate(read_slots):
        start, stop = cu_seqlens[n], cu_seqlens[n + 1]
        if start == stop:
            continue
        if write_slots[n][0] <= null_slot:
            out[start:stop] = 0
            continue
        state = torch.zeros_like(state_pool[0]) if source <= null_slot else state_pool[source].clone()
        for j, t in enumerate(range(start, stop)):
            _state_step(state, decrement, k[t], v[t])
            out[t] = torch.bmm(q[t].unsqueeze(1), state).squeeze(1)
            if write_slots[n][j] > null_slot:
                state_pool[write_slots[n][j]] = state


def replay_loop(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot_ids: Tensor,
    boundary: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    sumsq: Tensor | None,
    *,
    chunk: int,
    activation: str | None,
    null_slot: int,
) -> None:
    """Decode over boundary states and rings, one sequence after the other: the CPU body of ``lightning_decode_replay``.

    It also says in short what the kernel of :mod:`minimax_plugin.kernels.replay` computes.
    """
    decrement = torch.expm1(-slopes)[:, None, None]
    rows = k_ring.shape[1]
    bounds = cu_seqlens.tolist()
    out[bounds[-1] :] = 0
    for n, slot in enumerate(slot_ids.tolist()):
        start, stop = bounds[n], bounds[n + 1]
        if slot <= null_slot:
            out[start:stop] = 0
            continue
        state, base, now = state_pool[slot], int(boundary[n]), int(position[n])
        if now - base >= chunk:
            for t in range(base, base + chunk):
                _state_step(state, decrement, k_ring[slot, t % rows].float(), v_ring[slot, t % rows].float())
            base += chunk
        q, k, v = split_packed(qkv[start:stop], activation)
        new = [(now + i) % rows for i in range(stop - start)]
        k_ring[slot, new], v_ring[slot, new] = k, v
        seen = torch.tensor([t % rows for t in range(base, now + stop - start)], dtype=torch.long, device=qkv.device)
        keys, values = (ring[slot, seen].float().transpose(0, 1) for ring in (k_ring, v_ring))
        queries = q.float().transpose(0, 1)
        age = torch.arange(now - base, now - base + stop - start, device=qkv.device)[:, None] - torch.arange(
            len(seen), device=qkv.device
        )
        weight = torch.exp(-slopes[:, None, None] * age.clamp(min=0)) * (age >= 0)
        history = torch.bmm(queries, state) * torch.exp(-slopes[:, None, None] * (age[:, :1] + 1))
        out[start:stop] = (torch.bmm(torch.bmm(queries, keys.transpose(1, 2)) * weight, values) + history).transpose(
            0, 1
        )
    if sumsq is not None:
        sumsq.copy_(out.float().square().sum(-1))


def _state_step(state: Tensor, decrement: Tensor, k: Tensor, v: Tensor) -> None:
    """One token ``k``, ``v`` [H, D] into ``state`` [H, D, D] in place; ``decrement`` [H, 1, 1] is ``exp(-slope) - 1``.

    ``exp(-slope)`` itself in fp32 is off by up to 3e-8, always in the same direction, and the slowest heads multiply it
    up over 20,000 steps.
    """
    state.addcmul_(state, decrement).addcmul_(k.unsqueeze(2), v.unsqueeze(1))


def split_packed(qkv: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``[..., H, 3D]`` (each head laid out as q, k, v) after the activation, which rounds to the input dtype."""
    activated = silu(qkv) if activation == "silu" else qkv
    q, k, v = activated.chunk(3, dim=-1)
    return q, k, v


def gated_rmsnorm_torch(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, sumsq: Tensor | None = None, norm_size: int | None = None
) -> Tensor:
    """``weight * rmsnorm(o) * sigmoid(gate)`` with the roundings of the released module; differentiable."""
    dtype = o.dtype
    o = o.float()
    size = norm_size or o.shape[-1]
    if sumsq is None:
        sumsq = o.square().sum(-1)
    normed = o * torch.rsqrt(sumsq.reshape(*o.shape[:-1], 1) / size + eps)
    return torch.sigmoid(gate) * (weight * normed.to(dtype))
