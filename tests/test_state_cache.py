# SPDX-License-Identifier: Apache-2.0
"""The state-cache adapter, in the memory layouts of its two owners, against the recurrence token by token.

Shapes: ``T`` tokens, ``H`` heads, ``D`` head_dim, ``S`` slots.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from minimax_plugin.architecture import lightning_slopes
from minimax_plugin.kernels.plan import LightningPlan
from minimax_plugin.state_cache import StatePool

NUM_HEADS, HEAD_DIM = 3, 16
SLOPES = torch.tensor(lightning_slopes(NUM_HEADS, 1, 4))
GARBAGE = 1e30


def hugging_face_pool() -> StatePool:
    """One slot per batch row, every slot usable, contiguous."""
    pool = StatePool.allocate(6, NUM_HEADS, HEAD_DIM)
    pool.states.fill_(GARBAGE)
    return pool


def vllm_pool() -> StatePool:
    """A view of a block pool: pages wider than the state, slot 0 a null block, stale bytes everywhere."""
    size = NUM_HEADS * HEAD_DIM * HEAD_DIM
    memory = torch.full((6, size + 40), GARBAGE)
    strides = (size + 40, HEAD_DIM * HEAD_DIM, HEAD_DIM, 1)
    return StatePool(memory.as_strided((6, NUM_HEADS, HEAD_DIM, HEAD_DIM), strides), null_slot=0)


POOLS = pytest.mark.parametrize("pool", [hugging_face_pool(), vllm_pool()], ids=["Hugging Face", "vLLM"])


def random_qkv(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_HEADS, 3 * HEAD_DIM)


def recurrence(qkv: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs ``[T, H, D]`` and final state ``[H, D, D]`` in float64: ``S = exp(-slope) S + k^T v``, ``o = q S``."""
    q, k, v = silu(qkv.double()).split(HEAD_DIM, dim=-1)
    state = torch.zeros(NUM_HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64) if state is None else state.double()
    decay = torch.exp(-SLOPES.double())[:, None, None]
    outputs = []
    for token in range(qkv.shape[0]):
        state = decay * state + k[token, :, :, None] * v[token, :, None, :]
        outputs.append(torch.einsum("hd,hde->he", q[token], state))
    return torch.stack(outputs), state


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@POOLS
def test_prompts_then_tokens_then_drafts(pool: StatePool) -> None:
    pool.states.fill_(GARBAGE)
    slots = torch.tensor([4, 2])
    prompts = [random_qkv(7), random_qkv(1)]
    out = torch.empty(8, NUM_HEADS, HEAD_DIM)
    plan = LightningPlan.build([0, 7, 8])
    pool.prefill(torch.cat(prompts), SLOPES, slots, torch.zeros(2, dtype=torch.bool), plan, out=out)
    expected = [recurrence(prompt) for prompt in prompts]
    assert close(out, torch.cat([o for o, _ in expected]))

    token, step = random_qkv(2), torch.empty(2, NUM_HEADS, HEAD_DIM)
    pool.decode(token, SLOPES, slots, out=step)
    expected = [recurrence(token[i : i + 1], state) for i, (_, state) in enumerate(expected)]
    assert close(step, torch.cat([o for o, _ in expected]))
    assert all(close(pool.states[slot], state) for slot, (_, state) in zip(slots, expected, strict=True))

    drafts = random_qkv(3)
    out = torch.empty(3, NUM_HEADS, HEAD_DIM)
    write_slots = torch.tensor([[3, 5]] + [[2, 1]])
    pool.verify(drafts, SLOPES, slots, write_slots, torch.tensor([0, 2, 3], dtype=torch.int32), out=out)
    first, both = recurrence(drafts[:1], expected[0][1]), recurrence(drafts[:2], expected[0][1])
    alone = recurrence(drafts[2:], expected[1][1])
    assert close(out, torch.cat([both[0], alone[0]]))
    assert close(pool.states[3], first[1]) and close(pool.states[5], both[1]) and close(pool.states[2], alone[1])


@POOLS
def test_chunk_continues_where_the_last_one_stopped(pool: StatePool) -> None:
    prompt, out = random_qkv(11), torch.empty(11, NUM_HEADS, HEAD_DIM)
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        plan = LightningPlan.build([0, stop - start])
        pool.prefill(
            prompt[start:stop], SLOPES, torch.tensor([3]), torch.tensor([start > 0]), plan, out=out[start:stop]
        )
    expected, state = recurrence(prompt)
    assert close(out, expected)
    assert close(pool.states[3], state)


@POOLS
def test_padding_rows_are_zero_and_touch_nothing(pool: StatePool) -> None:
    pool.states.fill_(GARBAGE)
    out = torch.full((2, NUM_HEADS, HEAD_DIM), GARBAGE)
    pool.states[5].zero_()
    pool.decode(random_qkv(2), SLOPES, torch.tensor([pool.null_slot, 5]), out=out)
    assert not out[0].any()
    assert out[1].abs().max() < 100
    assert (pool.states[:5] == GARBAGE).all()


@POOLS
def test_prompts_and_drafts_beside_padding(pool: StatePool) -> None:
    """What a pool hands on to the kernels: its null slot, the sums of squares, the places of checkpoints."""
    pool.states.fill_(GARBAGE)
    null = pool.null_slot
    qkv, out = random_qkv(9), torch.full((9, NUM_HEADS, HEAD_DIM), GARBAGE)
    sumsq, fresh = torch.full((9, NUM_HEADS), GARBAGE), torch.zeros(2, dtype=torch.bool)
    plan, checkpoints = LightningPlan.build([0, 4, 9]), torch.tensor([null, 5])
    pool.prefill(qkv, SLOPES, torch.tensor([null, 3]), fresh, plan, out=out, sumsq=sumsq, checkpoint_slots=checkpoints)
    expected, state = recurrence(qkv[4:])
    assert not out[:4].any() and close(out[4:], expected)
    assert close(sumsq, out.double().square().sum(-1))
    assert close(pool.states[3], state) and torch.equal(pool.states[5], pool.states[3])
    assert (pool.states[[0, 1, 2, 4]] == GARBAGE).all()

    reads, writes = torch.tensor([null, 3]), torch.tensor([[null, null], [1, null]])
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    pool.verify(qkv[:4], SLOPES, reads, writes, bounds, out=out[:4], sumsq=sumsq[:4])
    expected, _ = recurrence(qkv[2:4], state)
    assert not out[:2].any() and close(out[2:4], expected)
    assert close(sumsq[:4], out[:4].double().square().sum(-1))
    assert close(pool.states[1], recurrence(qkv[2:3], state)[1])
    assert (pool.states[[0, 2, 4]] == GARBAGE).all()

    pool.decode(qkv[:2], SLOPES, torch.tensor([3, null]), out=out[:2], sumsq=sumsq[:2])
    assert close(sumsq[:2], out[:2].double().square().sum(-1))


def test_first_slot_is_a_state_without_a_null_block() -> None:
    pool = StatePool.allocate(1, NUM_HEADS, HEAD_DIM)
    qkv, out = random_qkv(1), torch.empty(1, NUM_HEADS, HEAD_DIM)
    pool.decode(qkv, SLOPES, torch.tensor([0]), out=out)
    assert close(out, recurrence(qkv)[0])
    assert pool.num_slots == 1


def test_memory_is_never_copied() -> None:
    memory = torch.zeros(4, NUM_HEADS, HEAD_DIM, HEAD_DIM)
    assert StatePool(memory).states.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(
    ("states", "message"),
    [
        pytest.param(torch.zeros(1, 2, 4, 4).bfloat16(), "torch.bfloat16, expected torch.float32: .* 0.42", id="bf16"),
        pytest.param(torch.zeros(1, 2, 4, 4).half(), "torch.float16, expected torch.float32: .* 1.9e-2", id="fp16"),
        pytest.param(torch.zeros(1, 2, 4, 4).double(), "torch.float64, expected torch.float32", id="fp64"),
        pytest.param(torch.zeros(1, 2, 4, 8), r"shape \(1, 2, 4, 8\), expected \[slots, H, D, D\]", id="not square"),
        pytest.param(torch.zeros(2, 4, 4), r"shape \(2, 4, 4\), expected", id="three dimensions"),
        pytest.param(torch.zeros(1, 2, 4, 4).transpose(2, 3), "expected every slot contiguous", id="transposed"),
        pytest.param(torch.zeros(1, 4, 4, 4)[:, ::2], "expected every slot contiguous", id="every other head"),
    ],
)
def test_wrong_memory_is_refused(states: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StatePool(states)
