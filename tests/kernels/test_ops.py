# SPDX-License-Identifier: Apache-2.0
"""The public functions: what they refuse, and how they behave under autograd, torch.compile and AMP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minimax_plugin.kernels import custom_ops, ops, reference

HEADS, DIM = 2, 16
SLOPES = torch.tensor([0.917, 0.01])


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prefill_arguments(num_tokens: int = 6) -> dict[str, Any]:
    """A valid call; the tests spoil one argument each."""
    return {
        "qkv": tokens(num_tokens, HEADS, 3 * DIM),
        "slopes": SLOPES.clone(),
        "state_pool": torch.zeros(4, HEADS, DIM, DIM),
        "slot_ids": torch.tensor([2, 0]),
        "has_initial": torch.tensor([False, True]),
        "plan": ops.LightningPlan.build([0, 2, num_tokens]),
        "out": torch.empty(num_tokens, HEADS, DIM),
        "sumsq": torch.empty(num_tokens, HEADS),
        "checkpoint_slots": torch.tensor([-1, 3]),
    }


PREFILL_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "qkv-width": ({"qkv": tokens(6, HEADS, 3 * DIM + 1)}, r"qkv has shape \(6, 2, 49\), expected \[T, H, 3 \* D\]"),
    "qkv-dims": ({"qkv": tokens(6, 3 * DIM)}, r"qkv has shape \(6, 48\)"),
    "qkv-dtype": ({"qkv": tokens(6, HEADS, 3 * DIM, dtype=torch.float64)}, r"qkv is torch\.float64, expected one of"),
    "qkv-strides": ({"qkv": tokens(6, 3 * DIM, HEADS).transpose(1, 2)}, r"qkv has strides .*last dim contiguous"),
    "slopes-dtype": ({"slopes": SLOPES.bfloat16()}, r"slopes are torch\.bfloat16 \(2,\).*expected torch\.float32"),
    "slopes-shape": ({"slopes": torch.ones(3)}, r"slopes are torch\.float32 \(3,\).*\(2,\)"),
    "slopes-zero": ({"slopes": torch.tensor([0.5, 0.0])}, r"slopes are \[0\.5, 0\.0\], expected every one positive"),
    "slopes-nan": ({"slopes": torch.tensor([0.5, float("nan")])}, r"expected every one positive"),
    "slopes-strides": ({"slopes": torch.ones(4)[::2]}, r"slopes have stride 2, expected contiguous"),
    "slopes-device": ({"slopes": SLOPES.to("meta")}, r"slopes are .* on meta, expected .* on cpu"),
    "pool-shape": ({"state_pool": torch.zeros(4, HEADS, DIM, 8)}, r"state_pool has shape \(4, 2, 16, 8\), expected"),
    "pool-strides": (
        {"state_pool": torch.zeros(4, HEADS, DIM, DIM).transpose(2, 3)},
        r"state_pool has strides .*each slot \[H, D, D\] contiguous",
    ),
    "pool-dtype": ({"state_pool": torch.zeros(4, HEADS, DIM, DIM).half()}, r"state_pool is torch\.float16"),
    "pool-device": ({"state_pool": torch.zeros(4, HEADS, DIM, DIM, device="meta")}, r"state_pool is on meta"),
    "slot-dtype": ({"slot_ids": torch.tensor([2.0, 0.0])}, r"slot_ids is torch\.float32 \(2,\), expected int32"),
    "slot-count": ({"slot_ids": torch.tensor([2])}, r"slot_ids is torch\.int64 \(1,\).*\(2,\)"),
    "slot-range": ({"slot_ids": torch.tensor([4, 0])}, r"slot_ids holds \[4\], expected slots below 4"),
    "slot-twice": ({"slot_ids": torch.tensor([2, 2])}, r"slot_ids holds \[2\] more than once"),
    "checkpoint-range": ({"checkpoint_slots": torch.tensor([9, 3])}, r"checkpoint_slots holds \[9\]"),
    "checkpoint-of-a-sequence": (
        {"checkpoint_slots": torch.tensor([0, 3])},
        r"checkpoint_slots holds \[0\], slots of sequences of the same call, expected others",
    ),
    "checkpoint-count": ({"checkpoint_slots": torch.tensor([3])}, r"checkpoint_slots is torch\.int64 \(1,\)"),
    "has-initial-dtype": ({"has_initial": torch.tensor([0, 1])}, r"has_initial is torch\.int64 \(2,\), expected torch"),
    "out-shape": ({"out": torch.empty(6, HEADS, DIM + 1)}, r"out has shape \(6, 2, 17\), expected \(6, 2, 16\)"),
    "out-strides": ({"out": torch.empty(6, DIM, HEADS).transpose(1, 2)}, r"out has strides"),
    "sumsq-dtype": ({"sumsq": torch.empty(6, HEADS).double()}, r"sumsq is torch\.float64"),
    "plan-length": ({"plan": ops.LightningPlan.build([0, 2, 5])}, r"cu_seqlens ends with 5, expected .* tokens 6"),
    "activation": ({"activation": "gelu"}, r"activation is 'gelu', expected 'silu' or None"),
    "precision": ({"precision": "tf32"}, r"precision is 'tf32', expected 'default' or 'high'"),
}


@pytest.mark.parametrize(("fault", "message"), PREFILL_FAULTS.values(), ids=PREFILL_FAULTS.keys())
def test_prefill_names_what_is_wrong(fault: dict[str, Any], message: str) -> None:
    arguments = prefill_arguments() | fault
    with pytest.raises(ValueError, match=message):
        ops.lightning_prefill(**arguments)


def test_a_refused_prefill_leaves_the_pool_alone() -> None:
    arguments = prefill_arguments() | {"slot_ids": torch.tensor([1, 7])}
    arguments["state_pool"].fill_(3.0)
    with pytest.raises(ValueError, match="slot_ids holds"):
        ops.lightning_prefill(**arguments)
    assert bool((arguments["state_pool"] == 3.0).all())


ATTENTION_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "k-shape": ({"k": tokens(5, HEADS, DIM)}, r"k is torch\.float32 \(5, 2, 16\) on cpu, expected like q"),
    "v-dtype": ({"v": tokens(6, HEADS, DIM, dtype=torch.bfloat16)}, r"v is torch\.bfloat16"),
    "q-dims": ({"q": tokens(6, DIM)}, r"q has shape \(6, 16\), expected \[B, T, H, D\] or \[T, H, D\]"),
    "v-strides": ({"v": tokens(6, DIM, HEADS).transpose(1, 2)}, r"v has strides"),
    "cu-start": ({"cu_seqlens": [1, 6]}, r"cu_seqlens starts with \[1\], expected \[0\]"),
    "cu-empty": ({"cu_seqlens": []}, r"cu_seqlens starts with \[\]"),
    "cu-decreases": ({"cu_seqlens": [0, 4, 3, 6]}, r"cu_seqlens decreases somewhere: \[0, 4, 3, 6\]"),
    "cu-end": ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens ends with 5, expected the number of tokens 6"),
    "cu-device": ({"cu_seqlens": torch.zeros(2, device="meta")}, r"cu_seqlens on meta, expected host memory"),
    "cu-and-plan": (
        {"cu_seqlens": [0, 6], "plan": ops.LightningPlan.build([0, 2, 6])},
        r"got cu_seqlens and a plan, expected one of them",
    ),
    "state-count": ({"initial_state": torch.zeros(2, HEADS, DIM, DIM)}, r"initial_state holds 2 states, expected 1"),
    "state-dtype": ({"initial_state": torch.zeros(1, HEADS, DIM, DIM).bfloat16()}, r"initial_state is torch\.bfloat16"),
    "slopes-negative": ({"slopes": -SLOPES}, r"expected every one positive"),
}


@pytest.mark.parametrize(("fault", "message"), ATTENTION_FAULTS.values(), ids=ATTENTION_FAULTS.keys())
def test_attention_names_what_is_wrong(fault: dict[str, Any], message: str) -> None:
    arguments = {name: tokens(6, HEADS, DIM, seed=n) for n, name in enumerate("qkv")} | {"slopes": SLOPES} | fault
    with pytest.raises(ValueError, match=message):
        ops.lightning_attention(**arguments)


def test_bounds_are_only_for_packed_tokens() -> None:
    q = tokens(1, 6, HEADS, DIM)
    with pytest.raises(ValueError, match=r"cu_seqlens is only for packed tokens \[T, H, \.\.\.\]"):
        ops.lightning_attention(q, q, q, SLOPES, cu_seqlens=[0, 6])


def test_decode_and_verify_check_their_slots() -> None:
    qkv, pool, out = tokens(2, HEADS, 3 * DIM), torch.zeros(4, HEADS, DIM, DIM), torch.empty(2, HEADS, DIM)
    with pytest.raises(ValueError, match=r"slot_ids holds \[1\] more than once"):
        ops.lightning_decode(qkv, SLOPES, pool, torch.tensor([1, 1]), out=out)
    bounds = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"a sequence of 2 tokens, expected at most 1"):
        ops.lightning_verify(qkv, SLOPES, pool, torch.tensor([0]), torch.tensor([[1]]), bounds, out=out)
    with pytest.raises(ValueError, match=r"write_slots holds \[1\] more than once"):
        ops.lightning_verify(qkv, SLOPES, pool, torch.tensor([0]), torch.tensor([[1, 1]]), bounds, out=out)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 3\], expected to rise from 0 to at most 2"):
        ops.lightning_verify(
            qkv, SLOPES, pool, torch.tensor([0]), torch.tensor([[1, 2, 3]]), bounds + bounds // 2, out=out
        )


def test_verify_refuses_to_read_what_another_sequence_writes() -> None:
    """The sequences of a call run in any order."""
    qkv, pool, out = tokens(3, HEADS, 3 * DIM), torch.zeros(4, HEADS, DIM, DIM), torch.empty(3, HEADS, DIM)
    bounds, writes = torch.tensor([0, 2, 3]), torch.tensor([[1, 2], [3, -1]])
    for reads in ([1, 3], [0, 0], [-1, -1]):
        ops.lightning_verify(qkv, SLOPES, pool, torch.tensor(reads), writes, bounds, out=out)
    with pytest.raises(ValueError, match=r"read_slots holds \[2\], which another sequence writes"):
        ops.lightning_verify(qkv, SLOPES, pool, torch.tensor([0, 2]), writes, bounds, out=out)
    padding = torch.tensor([[1, 2], [-1, 1]])
    ops.lightning_verify(qkv, SLOPES, pool, torch.tensor([0, 2]), padding, bounds, out=out)


def test_combine_states_names_what_is_wrong() -> None:
    states = torch.zeros(2, HEADS, DIM, DIM)
    with pytest.raises(
        ValueError, match=r"and 3 lengths, expected torch\.float32 \[R, \.\.\., H, D, D\] and R lengths"
    ):
        ops.combine_states(states, [1, 2, 3], SLOPES)
    with pytest.raises(ValueError, match=r"initial_state is torch\.float32 \(2, 2, 16, 16\)"):
        ops.combine_states(states, [1, 2], SLOPES, states)


def forward_arguments(
    num_tokens: int = 70, *, grad: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    plan = ops.LightningPlan.build([0, 3, num_tokens], segment=32)
    q, k, v = (tokens(num_tokens, HEADS, DIM, seed=n, dtype=dtype).requires_grad_(grad) for n in range(3))
    state = tokens(2, HEADS, DIM, DIM, seed=3).requires_grad_(grad)
    cut = (plan.cu_seqlens, plan.segments, plan.segment_offsets, plan.max_segments)
    return (q, k, v, SLOPES, state, *cut, "default")


def test_forward_passes_opcheck() -> None:
    torch.library.opcheck(custom_ops.lightning_forward, forward_arguments())
    torch.library.opcheck(custom_ops.lightning_forward, (*forward_arguments()[:4], None, *forward_arguments()[5:]))


def test_backward_and_segment_state_pass_opcheck() -> None:
    q, k, v, slopes, state, *rest = forward_arguments(grad=False)
    torch.library.opcheck(custom_ops.lightning_backward, (q, state, q, k, v, slopes, state, *rest))
    torch.library.opcheck(custom_ops.lightning_segment_state, (k, v, slopes, *rest[:-1], True, "default"))


def test_packed_operators_pass_opcheck() -> None:
    *_, state, cu, segments, offsets, most, precision = forward_arguments()
    rest = (cu, segments, offsets, most, "silu", precision)
    qkv = tokens(70, HEADS, 3 * DIM).requires_grad_()
    torch.library.opcheck(custom_ops.lightning_packed_forward, (qkv, SLOPES, state, *rest))
    grad_o, state = tokens(70, HEADS, DIM), state.detach()
    torch.library.opcheck(custom_ops.lightning_packed_backward, (grad_o, state, qkv.detach(), SLOPES, None, *rest))


def test_operators_promise_the_dtypes_they_return() -> None:
    """States are fp32 whatever the tokens are; a graph that is traced with another dtype breaks when it runs."""
    q, k, v, slopes, state, *rest = forward_arguments(grad=False, dtype=torch.bfloat16)
    *cut, precision = rest
    packed = (torch.cat([q, k, v], dim=-1), slopes, None, *cut, "silu", precision)
    only: Any = {"test_utils": "test_faketensor"}
    torch.library.opcheck(custom_ops.lightning_forward, (q, k, v, slopes, None, *rest), **only)
    torch.library.opcheck(custom_ops.lightning_backward, (q, state, q, k, v, slopes, state, *rest), **only)
    torch.library.opcheck(custom_ops.lightning_packed_forward, packed, **only)
    torch.library.opcheck(custom_ops.lightning_packed_backward, (q, state, *packed), **only)
    torch.library.opcheck(custom_ops.lightning_segment_state, (k, v, slopes, *cut, False, precision), **only)


def test_in_place_operators_pass_opcheck() -> None:
    a = prefill_arguments()
    plan, shared = a["plan"], (a["qkv"], a["slopes"], a["state_pool"])
    cut = (plan.cu_seqlens, plan.segments, plan.segment_offsets, plan.max_segments)
    rest = (a["out"], a["sumsq"], a["checkpoint_slots"], "silu", "default", -1)
    torch.library.opcheck(custom_ops.lightning_prefill, (*shared, a["slot_ids"], a["has_initial"], *cut, *rest))
    slots = torch.arange(4)
    shared = (a["qkv"][:4], a["slopes"], a["state_pool"])
    torch.library.opcheck(custom_ops.lightning_decode, (*shared, slots, a["out"][:4], a["sumsq"][:4], "silu", -1))
    verify = (slots[:2], slots.reshape(2, 2).t(), torch.tensor([0, 2, 4]), a["out"][:4], None, "silu", -1)
    torch.library.opcheck(custom_ops.lightning_verify, (*shared, *verify))


def mixer(qkv: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    o, _ = ops.lightning_attention_packed(qkv, SLOPES)
    return ops.gated_rmsnorm(o.flatten(-2), gate, weight, 1e-6)


def mixer_arguments(length: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = tokens(2, length, HEADS, 3 * DIM).requires_grad_()
    return qkv, tokens(2, length, HEADS * DIM, seed=1).requires_grad_(), tokens(HEADS * DIM, seed=2).requires_grad_()


def test_compiles_as_one_graph_for_any_length() -> None:
    """Forward and backward, two lengths, no graph break; ``aot_eager`` traces both graphs without a code generator."""
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (70, 1100):
        arguments = mixer_arguments(length)
        expected = torch.autograd.grad(mixer(*arguments).square().sum(), arguments)
        found = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    arguments = mixer_arguments(70)
    found = torch.compile(mixer, fullgraph=True)(*arguments)
    torch.testing.assert_close(found, mixer(*arguments), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    arguments = mixer_arguments(70)
    expected = torch.autograd.grad(mixer(*arguments).square().sum(), arguments)
    again = checkpoint(mixer, *arguments, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), arguments), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_keeps_the_state_and_the_dtype_of_the_projection() -> None:
    hidden, weight = tokens(1, 70, 32), tokens(HEADS * 3 * DIM, 32, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        qkv = torch.nn.functional.linear(hidden, weight).unflatten(-1, (HEADS, 3 * DIM))
        o, state = ops.lightning_attention_packed(qkv, SLOPES, output_final_state=True)
    assert state is not None
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    o.float().square().sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


def saved_for_backward(run: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return [x for x in saved if x.is_floating_point()]


def test_backward_keeps_only_its_inputs() -> None:
    """No chunk states, no decay matrices: the memory of training is that of q, k and v."""
    q, k, v, slopes, _, *rest = forward_arguments(640)
    saved = saved_for_backward(lambda: torch.ops.minimax_plugin.lightning_forward(q, k, v, slopes, None, *rest))
    assert sum(x.numel() for x in saved) == 3 * q.numel() + slopes.numel()


def test_training_on_the_projection_keeps_only_the_projection() -> None:
    qkv = tokens(2, 640, HEADS, 3 * DIM).requires_grad_()
    saved = saved_for_backward(lambda: ops.lightning_attention_packed(qkv, SLOPES))
    assert sum(x.numel() for x in saved) == qkv.numel() + SLOPES.numel()


def test_combine_states_is_differentiable() -> None:
    states, initial = tokens(3, HEADS, 4, 4).requires_grad_(), tokens(HEADS, 4, 4, seed=1).requires_grad_()
    lengths = [3, 1, 50]
    last = ops.combine_states(states, lengths, SLOPES, initial)[-1]
    found = torch.autograd.grad(last.sum(), (states, initial))
    for grad, tokens_after in zip([*found[0], found[1]], [51, 50, 0, 54], strict=True):
        decay = torch.exp(-SLOPES.double() * tokens_after)[:, None, None]
        torch.testing.assert_close(grad.double(), decay.expand_as(grad), rtol=1e-5, atol=0)


def test_gated_rmsnorm_is_the_formula() -> None:
    o, gate, weight = tokens(5, 32), tokens(5, 32, seed=1), tokens(32, seed=2)
    exact = [x.double() for x in (o, gate, weight)]
    normed = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = exact[2] * normed * torch.sigmoid(exact[1])
    torch.testing.assert_close(ops.gated_rmsnorm(o, gate, weight, 1e-6).double(), expected, rtol=1e-6, atol=1e-6)
    # Two ranks of 16 channels each, with the sum of squares of both.
    sumsq = o.square().sum(-1)
    halves = [
        ops.gated_rmsnorm(o[:, c], gate[:, c], weight[c], 1e-6, sumsq=sumsq, norm_size=32)
        for c in (slice(0, 16), slice(16, 32))
    ]
    torch.testing.assert_close(torch.cat(halves, -1).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_rmsnorm_rounds_where_the_released_module_does(dtype: torch.dtype) -> None:
    """Its norm rounds the normed row and then the product with the weight; the layer rounds the gate and the product.

    Any other order changes the last bit of a fifth of the values and more.
    """
    o, gate, weight = (tokens(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(64, 256), (64, 256), (256,)]))
    wide = o.double()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(dtype)
    scaled = (weight.double() * normed.double()).to(dtype)
    opened = gate.double().sigmoid().to(dtype)
    expected = (opened.double() * scaled.double()).to(dtype)
    actual = ops.gated_rmsnorm(o, gate, weight, 1e-6)
    # The operator computes in fp32, the expectation in float64: now and then they fall on different sides of a tie.
    assert (actual != expected).double().mean() <= 1e-3
    sumsq = o.float().square().sum(-1)
    assert torch.equal(ops.gated_rmsnorm(o, gate, weight, 1e-6, sumsq=sumsq, norm_size=256), actual)


def test_the_chunk_loop_leaves_its_inputs_alone() -> None:
    q, k, v = (tokens(1, 1, DIM, seed=n) for n in range(3))
    copies = [x.clone() for x in (q, k, v)]
    out, state = torch.empty_like(v), torch.ones(1, DIM, DIM)
    reference.chunk_scan(q, k, v, state, out, reference.DecayTable(SLOPES[:1]))
    for x, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(x, copy)


NORM_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "gate-shape": ({"gate": tokens(5, 16)}, r"gate \(5, 16\).*expected o and gate alike"),
    "weight-device": ({"weight": tokens(32).to("meta")}, r"weight is on meta, expected cpu"),
    "sumsq-per-head": (
        {"sumsq": torch.ones(5, HEADS)},
        r"sumsq is torch\.float32 \(5, 2\), expected torch\.float32 \(5,\)",
    ),
    "sumsq-dtype": ({"sumsq": torch.ones(5).bfloat16()}, r"sumsq is torch\.bfloat16 \(5,\), expected torch\.float32"),
    "size-without-sumsq": ({"norm_size": 64}, r"norm_size is 64 without sumsq, expected 32, the channels of o"),
}


@pytest.mark.parametrize(("fault", "message"), NORM_FAULTS.values(), ids=NORM_FAULTS.keys())
def test_gated_rmsnorm_names_what_is_wrong(fault: dict[str, Any], message: str) -> None:
    """Sums per head, as the attention gives them, would be read as those of other rows by a kernel."""
    valid: dict[str, Any] = {"o": tokens(5, 32), "gate": tokens(5, 32, seed=1), "weight": tokens(32, seed=2)}
    with pytest.raises(ValueError, match=message):
        ops.gated_rmsnorm(**valid | {"eps": 1e-6} | fault)
