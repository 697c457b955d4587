# SPDX-License-Identifier: Apache-2.0
"""The laws that every implementation of lightning attention obeys, as plain functions of a :class:`Setting`.

``test_laws.py`` holds them against the PyTorch path, ``test_scan_interpreter.py`` against the Triton kernels in
Triton's interpreter, ``test_scan_gpu.py`` against the compiled kernels. The oracle is always the float64 recurrence of
``tests/recurrence.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradient_laws
import pytest
import torch
from law_tools import FASTEST, Setting, assert_close, decode, oracle, prefill
from recurrence import recurrence, split_heads
from torch import Tensor

from minimax_plugin.kernels import ops


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
    """But for those whose slot is padding; none is written into a slot that marks padding either."""
    lengths = (3, 1, 0, 2)
    qkv = setting.qkv(sum(lengths) + 2)
    pool = setting.states(10)
    bounds = [0, 3, 4, 4, 6]
    for null in (-1, 0):
        read, write = [5, null, 6, 7], [[1, null, 3], [4, null, null], [null] * 3, [null] * 3]
        out = torch.full((len(qkv), setting.num_heads, setting.head_dim), float("nan"), dtype=qkv.dtype)
        sumsq, out = torch.full(out.shape[:2], float("nan"), device=setting.device), out.to(setting.device)
        found = pool.clone()
        ints = [torch.tensor(x, dtype=torch.int32, device=setting.device) for x in (read, write, bounds)]
        ops.lightning_verify(qkv, setting.slopes_tensor(), found, *ints, out=out, sumsq=sumsq, null_slot=null)
        for n, start in ((0, 0), (1, 3)):
            for j in range(lengths[n]):
                initial = pool[read[n]] if read[n] > null else None
                expected, state = oracle(setting, qkv[start : start + j + 1], initial)
                assert_close("output", out[start + j : start + j + 1], expected[-1:], setting.output_error)
                if write[n][j] > null:
                    assert_close("state", found[write[n][j]], state, 1e-6)
        assert not out[4:].any(), "padding sequence and rows past the last bound"
        torch.testing.assert_close(sumsq.double(), out.double().square().sum(-1), rtol=1e-5, atol=1e-5)
        untouched = [0, 2, *range(5, 10)]
        assert torch.equal(found[untouched], pool[untouched])


def law_no_activation_on_request(setting: Setting) -> None:
    qkv, steps, pool = setting.qkv(3 * 6), 6, setting.states(4)
    parts = qkv.split(steps)
    slopes = setting.slopes_tensor()
    out, found = torch.empty_like(qkv[..., : setting.head_dim]), pool.clone()
    outs = out.split(steps)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=setting.device)

    flag = torch.ones(1, dtype=torch.bool, device=setting.device)
    options: dict[str, Any] = {"activation": None, "precision": setting.precision}
    ops.lightning_prefill(parts[0], slopes, found, ints(0), flag, setting.plan(steps), out=outs[0], **options)
    for t in range(steps):
        row = slice(t, t + 1)
        ops.lightning_decode(parts[1][row], slopes, found, ints(1), out=outs[1][row], activation=None)
    writes = ints(3, -1, -1, -1, -1, 2)[None]
    ops.lightning_verify(parts[2], slopes, found, ints(2), writes, ints(0, steps), out=outs[2], activation=None)
    for slot in range(3):
        q, k, v = split_heads(parts[slot].cpu(), activate=False)
        expected, final = recurrence(q, k, v, slopes.cpu(), pool[slot].cpu())
        assert_close(f"output of slot {slot}", outs[slot], expected, setting.output_error)
        assert_close(f"state of slot {slot}", found[slot], final, setting.state_error)


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
    lengths = (setting.segment + 5, 7)
    qkv = setting.qkv(sum(lengths))
    pool = setting.states(9)
    for null, checkpoints in ((-1, [4, 6, -1]), (0, [4, 0, 7])):
        run = prefill(setting, qkv, pool, lengths, [2, 1], checkpoints=checkpoints, null_slot=null)
        for slot, stop in ((4, setting.segment), (2, lengths[0])):
            _, state = oracle(setting, qkv[:stop], pool[2])
            assert_close(f"state in slot {slot}", run.pool[slot], state, setting.state_error)
        copies = [(copy, slot) for copy, slot in zip(checkpoints[1:], (2, 1), strict=True) if copy > null]
        assert len(copies) == 1 and all(torch.equal(run.pool[copy], run.pool[slot]) for copy, slot in copies)
        untouched = [slot for slot in range(9) if slot not in (1, 2, *checkpoints) or slot <= null]
        assert torch.equal(run.pool[untouched], pool[untouched])


def law_sumsq_is_that_of_the_stored_output(setting: Setting) -> None:
    run = prefill(setting, setting.qkv(setting.segment + 3), setting.states(1), (setting.segment + 3,), [0])
    expected = run.out.double().square().sum(-1)
    torch.testing.assert_close(run.sumsq.double(), expected, rtol=1e-5, atol=1e-5)
    pool, slots = setting.states(3), torch.tensor([2, -1], dtype=torch.int32, device=setting.device)
    out, sumsq = torch.empty_like(run.out[:2]), torch.full_like(run.sumsq[:2], float("nan"))
    ops.lightning_decode(setting.qkv(2), setting.slopes_tensor(), pool, slots, out=out, sumsq=sumsq)
    assert sumsq[0].all()
    torch.testing.assert_close(sumsq.double(), out.double().square().sum(-1), rtol=1e-5, atol=1e-5)


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
    name.removeprefix("law_"): value
    for name, value in (globals() | vars(gradient_laws)).items()
    if name.startswith("law_")
}


def parametrize_laws(*, skip: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """One test per law, its name as id."""
    chosen = {name: law for name, law in LAWS.items() if name not in skip}
    return pytest.mark.parametrize("law", chosen.values(), ids=chosen.keys())
