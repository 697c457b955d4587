# SPDX-License-Identifier: Apache-2.0
"""The token-chunked head against float64, against TRL's, and its memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimax_plugin.cispo import head
from minimax_plugin.cispo.head import token_log_probs

GIB = 1 << 30
RELEASED_VOCAB = 200_064
HEAD_BOUND = 0.8 * GIB


def in_float64(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by the textbook, all logits at once."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(1, labels[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(-1)


def backward(
    score: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor | None], labels: Tensor, **kwargs: Any
) -> list[Tensor]:
    """Log-probabilities, entropies and the gradients of a random mix of both."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    log_probs, entropy = score(leaves[0], leaves[1], labels, bias=leaves[2], **kwargs)
    assert entropy is not None
    mix = torch.randn(2, labels.shape[0], generator=torch.Generator().manual_seed(3)).to(log_probs.dtype)
    (mix[0] @ log_probs + mix[1] @ entropy).backward()
    return [log_probs.detach(), entropy.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


@pytest.mark.parametrize("chunk_tokens", [1, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(
    chunk_tokens: int, dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_PIECE_VALUES", 5000)  # so that a bf16 weight is widened in several pieces
    tokens, vocab, width = 150, 700, 32
    inputs: list[Tensor | None] = [torch.randn(tokens, width).to(dtype), (torch.randn(vocab, width) * 0.5).to(dtype)]
    inputs.append(torch.randn(vocab).to(dtype) if with_bias else None)
    labels = torch.randint(0, vocab, (tokens,))
    actual = backward(token_log_probs, inputs, labels, temperature=0.7, chunk_tokens=chunk_tokens, with_entropy=True)
    wide = [None if x is None else x.double() for x in inputs]
    expected = backward(in_float64, wide, labels, temperature=0.7)
    assert (actual[0] - expected[0]).abs().max() <= 1e-5  # log-probabilities down to about -40
    assert (actual[1] - expected[1]).abs().max() <= 1e-5
    rounding = 3e-6 if dtype == torch.float32 else 4e-3  # a bf16 gradient is rounded once
    for ours, theirs in zip(actual[2:], expected[2:], strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_equals_the_fp32_head_of_trl(with_entropy: bool) -> None:
    kernels = pytest.importorskip("trl.kernels", reason="TRL's chunked head is in trl.kernels from 1.15 on")
    outputs = ("log_probs", "entropy") if with_entropy else ("log_probs",)
    inputs, labels = [torch.randn(90, 48), torch.randn(500, 48).bfloat16()], torch.randint(0, 500, (90,))
    mix = torch.randn(90)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    options: dict[str, Any] = {"temperature": 1.3, "chunk_tokens": 32, "with_entropy": with_entropy}
    log_probs, entropy = token_log_probs(ours[0], ours[1], labels, **options)
    expected = kernels.ChunkedLogProbFunction.apply(*theirs, None, labels, 1.3, 128, None, 1.0, outputs)
    torch.testing.assert_close(log_probs, expected[0], atol=1e-5, rtol=1e-6)
    if with_entropy:
        torch.testing.assert_close(entropy, expected[1], atol=1e-5, rtol=1e-6)
    else:
        assert entropy is None
    (mix @ log_probs).backward()
    (mix @ expected[0]).backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, atol=1e-5, rtol=2**-7)  # rounded to bf16


def test_gradients_only_where_wanted() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    log_probs, entropy = token_log_probs(hidden, weight, torch.arange(6))
    assert entropy is None
    log_probs.sum().backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not token_log_probs(hidden, weight, torch.arange(6))[0].requires_grad


def test_no_tokens_at_all() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    log_probs, entropy = token_log_probs(hidden, weight, torch.zeros(0, dtype=torch.int64), with_entropy=True)
    assert log_probs.shape == (0,) and entropy is not None and entropy.shape == (0,)
    log_probs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_autocast_leaves_the_product_in_fp32() -> None:
    hidden, weight, labels = torch.randn(40, 64), torch.randn(300, 64), torch.randint(0, 300, (40,))
    plain = token_log_probs(hidden, weight, labels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_log_probs(hidden, weight, labels)[0], plain)
    low = token_log_probs(hidden, weight, labels, compute_dtype=torch.bfloat16)[0]
    assert (low - plain).abs().max() > 1e-3


def test_tf32_is_off_within() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with head._plain_arithmetic(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if dist.is_initialized():  # by another test, for all tests of this run
        assert dist.get_world_size() == 1
        yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_weight_is_gathered(one_process: None) -> None:
    hidden, weight, labels = torch.randn(9, 8), torch.randn(30, 8), torch.arange(9)
    expected = weight.clone().requires_grad_()
    token_log_probs(hidden, expected, labels)[0].sum().backward()
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
    token_log_probs(hidden, sharded, labels)[0].sum().backward()
    assert isinstance(sharded.grad, DTensor)
    assert expected.grad is not None and torch.equal(sharded.grad.full_tensor(), expected.grad)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"labels": torch.arange(3)}, r"labels \(3,\)"),
        ({"weight": torch.randn(20, 7)}, r"weight \(20, 7\)"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], named: str) -> None:
    arguments = {"hidden": torch.randn(4, 8), "weight": torch.randn(20, 8), "labels": torch.arange(4)} | changes
    with pytest.raises(ValueError, match=named):
        token_log_probs(**arguments)


class LargestAllocation(TorchDispatchMode):
    """Bytes of all tensors that live at once, at most, of those made within; ``inputs`` do not count."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.current -= size


def head_bytes(score: Callable[..., Any], tokens: int, dtype: torch.dtype, vocab: int = RELEASED_VOCAB) -> float:
    """Largest allocation of forward and backward beyond the inputs and their gradients."""
    width = 256
    with FakeTensorMode():
        hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, width, dtype=dtype, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64)
        with LargestAllocation(hidden, weight, labels) as allocation:
            values = score(hidden, weight, labels)
            sum(value.sum() for value in values).backward()
        gradients = (tokens + vocab) * width * hidden.element_size()
    return allocation.peak - gradients


def ours_with_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    log_probs, entropy = token_log_probs(hidden, weight, labels, with_entropy=True)
    assert entropy is not None
    return [log_probs, entropy]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [512, 2048])
def test_memory_does_not_grow_with_the_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert 0.1 * GIB < head_bytes(ours_with_entropy, tokens, dtype) <= HEAD_BOUND


def test_all_logits_at_once_would_break_the_bound() -> None:
    """The bound can fail: log_softmax over 2,048 tokens of that vocabulary takes gigabytes."""
    whole = head_bytes(
        lambda hidden, weight, labels: [torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None])],
        2048,
        torch.float32,
    )
    assert whole >= 3 * 2048 * RELEASED_VOCAB * 4 * 0.9


RESIDENT = """
import re, torch
from pathlib import Path
from minimax_plugin.cispo.head import token_log_probs
torch.set_num_threads(2)
def peak():  # of this program alone; what getrusage says includes the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
tokens = {tokens}
hidden, weight = torch.randn(tokens, 256, requires_grad=True), torch.randn({vocab}, 256, requires_grad=True)
labels = torch.randint(0, {vocab}, (tokens,))
small = torch.randn(64, 256, requires_grad=True)
token_log_probs(small, torch.randn(512, 256), labels[:64] % 512, with_entropy=True)[0].sum().backward()
before = peak()
log_probs, entropy = token_log_probs(hidden, weight, labels, with_entropy=True)
(log_probs.sum() + entropy.sum()).backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_resident_memory_agrees() -> None:
    """The same bound by what the system counts, in a process of its own."""
    tokens = 2048
    script = RESIDENT.format(tokens=tokens, vocab=RELEASED_VOCAB)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout) - (tokens + RELEASED_VOCAB) * 256 * 4
    assert 0.1 * GIB < beyond <= HEAD_BOUND
