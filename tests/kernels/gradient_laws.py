# SPDX-License-Identifier: Apache-2.0
"""The laws of gradients and of the states of stretches; ``lightning_laws.py`` has the others and lists them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from law_tools import SLOWEST, Setting, assert_close
from recurrence import recurrence, split_heads

from minimax_plugin.kernels import ops


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


def law_gradients_of_the_state_alone(setting: Setting) -> None:
    """A loss that looks at the final state only: the output has no gradient, and q none but zero."""
    # A fast head would forget the initial state, and its gradient would be rounding only.
    setting, length = replace(setting, slopes=(0.01, SLOWEST)), 21
    qkv, initial = setting.qkv(length).requires_grad_(), setting.states(1).requires_grad_()
    weight = setting.states(1, seed=6)
    options: dict[str, Any] = {"initial_state": initial, "output_final_state": True, "precision": setting.precision}
    slopes, plan = setting.slopes_tensor(), setting.plan(length)
    for activate in (True, False):
        if activate:
            _, state = ops.lightning_attention_packed(qkv, slopes, plan=plan, **options)
        else:
            _, state = ops.lightning_attention(*split_heads(qkv, activate=False), slopes, plan=plan, **options)
        assert state is not None
        found = torch.autograd.grad(state, (qkv, initial), weight)
        exact = [x.detach().cpu().double().requires_grad_() for x in (qkv, initial)]
        _, final = recurrence(*split_heads(exact[0], activate=activate), slopes.cpu(), exact[1][0])
        expected = torch.autograd.grad(final, exact, weight[0].cpu().double())
        assert not found[0][..., : setting.head_dim].any()
        assert_close("d_qkv", found[0], expected[0], setting.gradient_error)
        assert_close("gradient of the initial state", found[1][0], expected[1][0], setting.gradient_error)


def law_gradients_of_the_projection(setting: Setting) -> None:
    """Through the activation, which the operator applies itself and does not keep."""
    slopes, initial = setting.slopes_tensor(), setting.states(1).requires_grad_()
    for activation, length in (("silu", setting.segment + 5), (None, 21)):
        qkv, weight = setting.qkv(length).requires_grad_(), setting.qkv(length, seed=7)[..., : setting.head_dim]
        options: dict[str, Any] = {
            "initial_state": initial,
            "plan": setting.plan(length),
            "precision": setting.precision,
        }
        o, _ = ops.lightning_attention_packed(qkv, slopes, activation=activation, **options)
        found = torch.autograd.grad(o, (qkv, initial), weight)
        exact = [x.detach().cpu().double().requires_grad_() for x in (qkv, initial)]
        out, _ = recurrence(*split_heads(exact[0], activate=activation is not None), slopes.cpu(), exact[1][0])
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
