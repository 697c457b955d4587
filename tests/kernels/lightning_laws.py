# SPDX-License-Identifier: Apache-2.0
"""The laws that every implementation of lightning attention obeys, as plain functions of a :class:`Setting`.

``test_laws.py`` holds them against the PyTorch path, ``test_scan_interpreter.py`` against the Triton kernels in
Triton's interpreter, ``test_scan_gpu.py`` against the compiled kernels. The oracle is always the float64 recurrence of
``tests/recurrence.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from recurrence import recurrence, split_heads
from torch import Tensor

from minimax_plugin.kernels import ops

#: The fastest head of the first layer and the slowest head of the last lightning layer of the released model.
FASTEST, SLOWEST = 0.917, 4.95e-5

#: Values of one head below which rounding errors may line up instead of averaging out, and how much more they may be.
FEW = ((100, 3.0), (1000, 1.5))


@dataclass(frozen=True)
class Setting:
    """Where and how small: sizes and the error that the arithmetic of ``dtype`` and ``precision`` may have."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "default"
    exact_states: bool = True
    head_dim: int = 32
    segment: int = 64
    slopes: tuple[float, ...] = (FASTEST, SLOWEST)

    @property
    def num_heads(self) -> int:
        return len(self.slopes)

    @property
    def output_error(self) -> float:
        return 1e-6 if self.dtype == torch.float32 else 3e-3

    @property
    def state_error(self) -> float:
        return 1e-6 if self.exact_states else 3e-3

    @property
    def gradient_error(self) -> float:
        return 1e-5 if self.dtype == torch.float32 else 5e-3

    def slopes_tensor(self) -> Tensor:
        return torch.tensor(self.slopes, dtype=torch.float32, device=self.device)

    def qkv(self, num_tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_tokens, self.num_heads, 3 * self.head_dim)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def states(self, count: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, self.num_heads, self.head_dim, self.head_dim)
        return torch.randn(shape, generator=generator).to(self.device)

    def plan(self, *lengths: int, computed: list[int] | None = None) -> ops.LightningPlan:
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return ops.LightningPlan.build(bounds, computed, device=self.device, segment=self.segment)

    def lengths(self) -> tuple[int, ...]:
        """Empty, one token, around a chunk, around a segment, several ragged segments."""
        edges = (0, 1, 63, 64, 65, self.segment - 1, self.segment, self.segment + 1, 3 * self.segment + 7)
        return tuple(sorted(set(edges)))


@dataclass
class Run:
    """Result of one prefill."""

    out: Tensor
    pool: Tensor
    sumsq: Tensor


def prefill(
    setting: Setting,
    qkv: Tensor,
    pool: Tensor,
    lengths: tuple[int, ...],
    slots: list[int],
    *,
    has_initial: list[bool] | None = None,
    computed: list[int] | None = None,
    checkpoints: list[int] | None = None,
    null_slot: int = -1,
) -> Run:
    """Prefill on a copy of ``pool``; outputs start as NaN so that a row nobody wrote is seen."""
    device = setting.device
    num_tokens, num_heads, width = qkv.shape
    out = torch.full((num_tokens, num_heads, width // 3), float("nan"), dtype=qkv.dtype, device=device)
    sumsq = torch.full((num_tokens, num_heads), float("nan"), device=device)
    pool = pool.clone()
    flags = [True] * len(slots) if has_initial is None else has_initial
    ops.lightning_prefill(
        qkv,
        setting.slopes_tensor(),
        pool,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(flags, device=device, dtype=torch.bool),
        setting.plan(*lengths, computed=computed),
        out=out,
        sumsq=sumsq,
        checkpoint_slots=None if checkpoints is None else torch.tensor(checkpoints, dtype=torch.int32, device=device),
        precision=setting.precision,
        null_slot=null_slot,
    )
    return Run(out, pool, sumsq)


def decode(setting: Setting, qkv: Tensor, pool: Tensor, slots: list[int], null_slot: int = -1) -> Tensor:
    """One decode step in place on ``pool``."""
    out = torch.full((*qkv.shape[:2], setting.head_dim), float("nan"), dtype=qkv.dtype, device=setting.device)
    slot_ids = torch.tensor(slots, dtype=torch.int32, device=setting.device)
    ops.lightning_decode(qkv, setting.slopes_tensor(), pool, slot_ids, out=out, null_slot=null_slot)
    return out


def oracle(setting: Setting, qkv: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float64 recurrence on the activated inputs as the released module rounds them."""
    q, k, v = split_heads(qkv.cpu())
    return recurrence(q, k, v, setting.slopes_tensor().cpu(), None if initial is None else initial.cpu())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in the Euclidean norm."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(name: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Every head by itself: a wrong fast head must not hide behind the large values of a slow one."""
    axis = 0 if "state" in name else -2
    values = expected.numel() // max(expected.shape[axis], 1)
    bound *= next((factor for limit, factor in FEW if values < limit), 1.0)
    for head in range(expected.shape[axis]):
        error = relative_error(found.select(axis, head), expected.select(axis, head))
        assert error <= bound, f"{name}, head {head}: relative error {error:.2e}, expected at most {bound:.0e}"


def law_prefill_is_the_recurrence(setting: Setting) -> None:
    initial = setting.states(1)
    for length in setting.lengths():
        qkv = setting.qkv(length, seed=length)
        run = prefill(setting, qkv, initial, (length,), [0])
        expected, final = oracle(setting, qkv, initial[0])
        assert_close(f"output of {length} tokens", run.out, expected, setting.output_error)
        assert_close(f"state after {length} tokens", run.pool[0], final, setting.state_error)


def law_split_anywhere_is_the_whole(setting: Setting) -> None:
    length = 2 * setting.segment + 5
    qkv = setting.qkv(length)
    expected, final = oracle(setting, qkv)
    for cut in (1, 17, setting.segment, setting.segment + 3, length - 1):
        pool = setting.states(1)
        first = prefill(setting, qkv[:cut], pool, (cut,), [0], has_initial=[False])
        second = prefill(setting, qkv[cut:], first.pool, (length - cut,), [0], computed=[cut])
        out = torch.cat([first.out, second.out])
        assert_close(f"output cut at {cut}", out, expected, setting.output_error)
        assert_close(f"state cut at {cut}", second.pool[0], final, setting.state_error)


def law_varlen_is_separate_sequences(setting: Setting) -> None:
    lengths = (3, setting.segment + 9, 0, 1, 70)
    qkv = setting.qkv(sum(lengths))
    pool = setting.states(7)
    slots = [6, 0, 1, 4, 2]
    run = prefill(setting, qkv, pool, lengths, slots)
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        rows = slice(start, start + length)
        expected, final = oracle(setting, qkv[rows], pool[slot])
        assert_close(f"output of slot {slot}", run.out[rows], expected, setting.output_error)
        assert_close(f"state of slot {slot}", run.pool[slot], final, setting.state_error)
        start += length


def law_neighbours_do_not_change_a_bit(setting: Setting) -> None:
    lengths = (setting.segment + 9, 21, 2 * setting.segment)
    parts = [setting.qkv(length, seed=length) for length in lengths]
    pool = setting.states(3)
    alone = [prefill(setting, part, pool, (len(part),), [n]) for n, part in enumerate(parts)]
    for order in ((0, 1, 2), (2, 0, 1)):
        qkv = torch.cat([parts[n] for n in order])
        run = prefill(setting, qkv, pool, tuple(lengths[n] for n in order), list(order))
        outs = run.out.split([lengths[n] for n in order])
        for n, out in zip(order, outs, strict=True):
            assert torch.equal(out, alone[n].out), f"output of sequence {n} in order {order}"
            assert torch.equal(run.pool[n], alone[n].pool[n]), f"state of sequence {n} in order {order}"


def law_pieces_on_the_segment_grid_agree(setting: Setting) -> None:
    """To the bit before the first border; after it the state was added up in another order."""
    length, cut = 2 * setting.segment + 5, setting.segment
    qkv = setting.qkv(length)
    whole = prefill(setting, qkv, setting.states(1), (length,), [0])
    first = prefill(setting, qkv[:cut], setting.states(1), (cut,), [0])
    assert torch.equal(first.out, whole.out[:cut])
    second = prefill(setting, qkv[cut:], first.pool, (length - cut,), [0], computed=[cut])
    assert_close("output", second.out, whole.out[cut:].double(), setting.output_error)


def law_decode_chain_is_prefill(setting: Setting) -> None:
    steps = 20
    qkv = setting.qkv(steps)
    pool = setting.states(3)
    expected, final = oracle(setting, qkv, pool[2])
    chain = pool.clone()
    out = torch.cat([decode(setting, qkv[t : t + 1], chain, [2]) for t in range(steps)])
    assert_close("output", out, expected, setting.output_error)
    assert_close("state", chain[2], final, 1e-6)
    run = prefill(setting, qkv, pool, (steps,), [2])
    assert_close("output of prefill", run.out, out.double(), setting.output_error)


def law_verify_keeps_every_state(setting: Setting) -> None:
    lengths, width = (3, 1, 0, 2), 3
    qkv = setting.qkv(sum(lengths) + 2)
    pool = setting.states(10)
    read, write = [4, -1, 5, 6], [[0, 1, 2], [3, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    bounds = [0, 3, 4, 4, 6]
    out = torch.full((len(qkv), setting.num_heads, setting.head_dim), float("nan"), dtype=qkv.dtype).to(setting.device)
    found = pool.clone()
    ints = [torch.tensor(x, dtype=torch.int32, device=setting.device) for x in (read, write, bounds)]
    assert ints[1].shape == (4, width)
    ops.lightning_verify(qkv, setting.slopes_tensor(), found, *ints, out=out)
    for n, start in ((0, 0), (1, 3)):
        for j in range(lengths[n]):
            initial = pool[read[n]] if read[n] >= 0 else None
            expected, state = oracle(setting, qkv[start : start + j + 1], initial)
            assert_close("output", out[start + j : start + j + 1], expected[-1:], setting.output_error)
            assert_close("state", found[write[n][j]], state, 1e-6)
    assert not out[4:].any(), "padding sequence and rows past the last bound"
    assert torch.equal(found[4:], pool[4:])


def law_untouched_slots_stay(setting: Setting) -> None:
    pool = setting.states(5)
    qkv = setting.qkv(12)
    run = prefill(setting, qkv, pool, (5, 7), [3, 1])
    assert torch.equal(run.pool[[0, 2, 4]], pool[[0, 2, 4]])
    decoded = pool.clone()
    decode(setting, qkv[:2], decoded, [3, 1])
    assert torch.equal(decoded[[0, 2, 4]], pool[[0, 2, 4]])
    assert not torch.equal(decoded[[1, 3]], pool[[1, 3]])


def law_nan_elsewhere_never_leaks(setting: Setting) -> None:
    lengths = (11, setting.segment + 6, 70)
    clean = setting.qkv(sum(lengths))
    dirty = clean.clone()
    dirty[:11] = float("nan")
    dirty[-70:] = float("nan")
    pool = setting.states(6)
    pool[[0, 3, 5]] = float("nan")
    expected = prefill(setting, clean, setting.states(6), lengths, [1, 2, 4])
    for slots in ([0, 2, 5], [-1, 2, -1]):
        run = prefill(setting, dirty, pool, lengths, slots, has_initial=[False, True, True])
        assert torch.equal(run.out[11:-70], expected.out[11:-70])
        assert torch.equal(run.pool[2], expected.pool[2])
    steps = setting.qkv(3)
    expected_step = decode(setting, steps, setting.states(6), [1, 2, 4])
    steps[[0, 2]] = float("nan")
    assert torch.equal(decode(setting, steps, pool.clone(), [-1, 2, 5])[1], expected_step[1])


def law_padding_writes_zeros(setting: Setting) -> None:
    for null_slot in (-1, 0):
        pool = setting.states(3)
        qkv = setting.qkv(30)
        run = prefill(setting, qkv, pool, (10, 20), [null_slot, 2], null_slot=null_slot)
        assert not run.out[:10].any()
        assert not run.sumsq[:10].any()
        assert torch.equal(run.pool[:2], pool[:2])
        expected, _ = oracle(setting, qkv[10:], pool[2])
        assert_close("output", run.out[10:], expected, setting.output_error)
        decoded = pool.clone()
        out = decode(setting, qkv[:2], decoded, [1, null_slot], null_slot=null_slot)
        assert not out[1].any()
        assert out[0].any()
        assert torch.equal(decoded[[0, 2]], pool[[0, 2]])


def law_has_initial_false_ignores_garbage(setting: Setting) -> None:
    lengths = (9, setting.segment + 2)
    pool = setting.states(2)
    pool[:] = float("nan")
    qkv = setting.qkv(sum(lengths))
    run = prefill(setting, qkv, pool, lengths, [1, 0], has_initial=[False, False])
    for rows, slot in ((slice(0, 9), 1), (slice(9, None), 0)):
        expected, final = oracle(setting, qkv[rows])
        assert_close("output", run.out[rows], expected, setting.output_error)
        assert_close("state", run.pool[slot], final, setting.state_error)


def law_steep_slopes_do_not_overflow(setting: Setting) -> None:
    """``slope * chunk`` of 128 and 576, past the 88 where exp overflows fp32."""
    steep = replace(setting, slopes=(2.0, 9.0))
    length = steep.segment + 40
    qkv, pool = steep.qkv(length), steep.states(1)
    run = prefill(steep, qkv, pool, (length,), [0])
    expected, final = oracle(steep, qkv, pool[0])
    assert_close("output", run.out, expected, steep.output_error)
    assert_close("state", run.pool[0], final, steep.state_error)


def law_any_strides_give_the_same_bits(setting: Setting) -> None:
    length = setting.segment + 5
    qkv = setting.qkv(length)
    expected = prefill(setting, qkv, setting.states(1), (length,), [0])
    heads_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((length, setting.num_heads + 1, 3 * setting.head_dim + 8), float("nan")).to(qkv)
    wide[:, 1:, 8:] = qkv
    for strided in (heads_first, wide[:, 1:, 8:]):
        run = prefill(setting, strided, setting.states(1), (length,), [0])
        assert torch.equal(run.out, expected.out)
        assert torch.equal(run.pool, expected.pool)


def law_slots_may_be_far_apart(setting: Setting) -> None:
    length = 20
    qkv = setting.qkv(length)
    padded = torch.full((3, setting.num_heads * setting.head_dim**2 + 64), float("nan"), device=setting.device)
    pool = padded[:, :-64].view(3, setting.num_heads, setting.head_dim, setting.head_dim)
    pool.copy_(setting.states(3))
    out = torch.empty(length, setting.num_heads, setting.head_dim, dtype=qkv.dtype, device=setting.device)
    ops.lightning_prefill(
        qkv,
        setting.slopes_tensor(),
        pool,
        torch.tensor([2], device=setting.device),
        torch.tensor([True], device=setting.device),
        setting.plan(length),
        out=out,
        precision=setting.precision,
    )
    expected, final = oracle(setting, qkv, setting.states(3)[2])
    assert_close("output", out, expected, setting.output_error)
    assert_close("state", pool[2], final, setting.state_error)
    assert padded[:, -64:].isnan().all()


def law_checkpoints_hold_the_states_of_segment_ends(setting: Setting) -> None:
    lengths = (2 * setting.segment + 5, 7)
    qkv = setting.qkv(sum(lengths))
    pool = setting.states(8)
    run = prefill(setting, qkv, pool, lengths, [0, 1], checkpoints=[4, -1, 6, 7])
    ends = {4: setting.segment, 6: lengths[0], 0: lengths[0]}
    for slot, stop in ends.items():
        _, state = oracle(setting, qkv[:stop], pool[0])
        assert_close(f"state in slot {slot}", run.pool[slot], state, setting.state_error)
    assert torch.equal(run.pool[7], run.pool[1])
    assert torch.equal(run.pool[[2, 3, 5]], pool[[2, 3, 5]])


def law_sumsq_is_that_of_the_stored_output(setting: Setting) -> None:
    run = prefill(setting, setting.qkv(setting.segment + 3), setting.states(1), (setting.segment + 3,), [0])
    expected = run.out.double().square().sum(-1)
    torch.testing.assert_close(run.sumsq.double(), expected, rtol=1e-5, atol=1e-5)


def law_gradients(setting: Setting) -> None:
    lengths = (setting.segment + 13, 0, 70)
    bounds = [0, lengths[0], lengths[0], sum(lengths)]
    leaves = split_heads(setting.qkv(sum(lengths)), activate=False)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in leaves)
    initial = setting.states(3).requires_grad_()
    weight_o, weight_s = setting.qkv(sum(lengths), seed=5)[..., : setting.head_dim], setting.states(3, seed=6)
    o, state = ops.lightning_attention(
        q,
        k,
        v,
        setting.slopes_tensor(),
        initial_state=initial,
        output_final_state=True,
        plan=setting.plan(*lengths),
        precision=setting.precision,
    )
    assert state is not None
    found = torch.autograd.grad((o, state), (q, k, v, initial), (weight_o, weight_s))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v, initial)]
    results, grads = [], []
    for n in range(3):
        rows = slice(bounds[n], bounds[n + 1])
        out, final = recurrence(
            exact[0][rows], exact[1][rows], exact[2][rows], setting.slopes_tensor().cpu(), exact[3][n]
        )
        results.append(final)
        grads.append(weight_s.cpu().double()[n])
        if lengths[n]:
            results.append(out)
            grads.append(weight_o.cpu().double()[rows])
    expected = torch.autograd.grad(results, exact, grads)
    for name, a, b in zip(("d_q", "d_k", "d_v"), found, expected, strict=False):
        assert_close(name, a, b, setting.gradient_error)
    for n in range(3):
        assert_close(f"gradient of initial state {n}", found[3][n], expected[3][n], setting.gradient_error)


def law_gradients_without_states(setting: Setting) -> None:
    """No initial state, final state unused, output as a batch."""
    batch, length = 2, setting.segment + 5
    q, k, v = (
        x.reshape(batch, length, setting.num_heads, setting.head_dim).detach().requires_grad_()
        for x in split_heads(setting.qkv(batch * length), activate=False)
    )
    o, state = ops.lightning_attention(q, k, v, setting.slopes_tensor(), precision=setting.precision)
    assert state is None
    weight = torch.ones_like(o)
    found = torch.autograd.grad(o, (q, k, v), weight)
    for n in range(batch):
        exact = [x[n].detach().cpu().double().requires_grad_() for x in (q, k, v)]
        out, _ = recurrence(exact[0], exact[1], exact[2], setting.slopes_tensor().cpu())
        for name, a, b in zip(("d_q", "d_k", "d_v"), found, torch.autograd.grad(out.sum(), exact), strict=True):
            assert_close(name, a[n], b, setting.gradient_error)


def law_gradients_of_the_projection(setting: Setting) -> None:
    """Through the activation, which the operator applies itself and does not keep."""
    length = setting.segment + 5
    qkv = setting.qkv(length).requires_grad_()
    initial = setting.states(1).requires_grad_()
    weight = setting.qkv(length, seed=7)[..., : setting.head_dim]
    o, _ = ops.lightning_attention_packed(
        qkv, setting.slopes_tensor(), initial_state=initial, plan=setting.plan(length), precision=setting.precision
    )
    found = torch.autograd.grad(o, (qkv, initial), weight)
    exact = [x.detach().cpu().double().requires_grad_() for x in (qkv, initial)]
    q, k, v = split_heads(exact[0])
    out, _ = recurrence(q, k, v, setting.slopes_tensor().cpu(), exact[1][0])
    expected = torch.autograd.grad(out, exact, weight.cpu().double())
    assert_close("d_qkv", found[0], expected[0], setting.gradient_error)
    assert_close("gradient of the initial state", found[1][0], expected[1][0], setting.gradient_error)


def law_segment_states_add_up(setting: Setting) -> None:
    cuts = (0, 40, 40 + setting.segment + 3, 40 + 2 * setting.segment)
    q, k, v = split_heads(setting.qkv(cuts[-1]), activate=False)
    slopes = setting.slopes_tensor()
    states = [
        ops.segment_state(k[a:b], v[a:b], slopes, precision=setting.precision)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    lengths = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    initial = setting.states(1)[0]
    prefix = ops.combine_states(torch.stack(states), lengths, slopes, initial)
    for stop, state in zip(cuts, prefix, strict=True):
        _, expected = recurrence(q[:stop].cpu(), k[:stop].cpu(), v[:stop].cpu(), slopes.cpu(), initial.cpu())
        assert_close(f"state after {stop} tokens", state, expected, setting.state_error)


def law_reverse_segment_state_is_the_state_gradient(setting: Setting) -> None:
    length = setting.segment + 9
    q, k, v = split_heads(setting.qkv(length), activate=False)
    found = ops.segment_state(q, v, setting.slopes_tensor(), reverse=True, precision=setting.precision)
    initial = torch.zeros_like(found, dtype=torch.float64, device="cpu").requires_grad_()
    out, _ = recurrence(q.cpu(), k.cpu(), v.cpu(), setting.slopes_tensor().cpu(), initial)
    (expected,) = torch.autograd.grad(out, initial, v.cpu().double())
    assert_close("state gradient", found, expected, setting.state_error)


def law_token_256_of_the_fastest_head(setting: Setting) -> None:
    """A kernel that mixes two decay conventions is right up to its first block border and wrong by exp(slope) after."""
    fast = replace(setting, slopes=(FASTEST,), segment=128)
    qkv = fast.qkv(260)
    run = prefill(fast, qkv, fast.states(1), (260,), [0], has_initial=[False])
    expected, _ = oracle(fast, qkv)
    assert_close("output of token 256", run.out[256:257], expected[256:257], 2 * fast.output_error)


def law_low_precision_states_are_refused(setting: Setting) -> None:
    qkv = setting.qkv(4)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"state_pool is torch\.\w+, expected torch\.float32: after 8,192"):
            prefill(setting, qkv, setting.states(1).to(dtype), (4,), [0])
        with pytest.raises(ValueError, match=r"state_pool is torch\.\w+, expected torch\.float32"):
            decode(setting, qkv, setting.states(4).to(dtype), [0, 1, 2, 3])


LAWS: dict[str, Callable[[Setting], None]] = {
    name.removeprefix("law_"): value for name, value in list(globals().items()) if name.startswith("law_")
}


def parametrize_laws(*, skip: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """One test per law, its name as id."""
    chosen = {name: law for name, law in LAWS.items() if name not in skip}
    return pytest.mark.parametrize("law", chosen.values(), ids=chosen.keys())
