# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU, and a fast float64 oracle, for ``benchmarks/kernels.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import cpu_lightning
from minimax_plugin.kernels import replay

Call = Callable[[], Tensor]

HEAD_DIM = 128

#: Bytes that no GPU's L2 cache holds.
BEYOND_L2 = 512 * 2**20


@dataclass(frozen=True)
class Timed:
    """Median time, memory allocated beyond what was there before, and kernels launched by one call."""

    us: float
    peak_mib: float
    launches: int


class Rotation:
    """Several calls that do the same on memory of their own; calling it runs them all once."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)

    def __call__(self) -> Tensor:
        return [call() for call in self.calls][-1]


def machine_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{cpu_lightning.machine_name()}, no GPU"
    import triton

    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a large copy; 1 without a GPU, where nothing is timed."""
    if device.type == "cpu":
        return 1.0
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = measure(lambda: target.copy_(source))
    return 2 * source.numel() / (1e-6 * timed.us)


def measure(call: Call, *, graph: bool = False) -> Timed:
    """Time one call; per call of a :class:`Rotation`. ``graph`` replays it from a CUDA graph, without launch costs."""
    import triton.testing

    count = len(call.calls) if isinstance(call, Rotation) else 1
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    launches = count_launches(call)
    timed = _captured(call) if graph else call
    milliseconds = triton.testing.do_bench(timed, warmup=50, rep=200, return_mode="median")
    return Timed(1e3 * milliseconds / count, peak, -(-launches // count))


def count_launches(call: Call) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def rotated_pools(slots: int, heads: int, head_dim: int, device: torch.device) -> list[Tensor]:
    """As many state pools as it takes to exceed every cache."""
    one = 4 * slots * heads * head_dim**2
    count = max(1, min(256, -(-BEYOND_L2 // one)))
    return [torch.randn(slots, heads, head_dim, head_dim, device=device) for _ in range(count)]


def replay_step(
    qkv: Tensor, slopes: Tensor, slots: Tensor, out: Tensor, chunk: int, bounds: Tensor | None = None
) -> Callable[[Tensor], Call]:
    """For a pool, a replay call on sequences spread evenly over the positions of a chunk, as in steady decoding.

    The sequence at the first position folds its chunk in every call: with every sequence at a place of its own, one
    call costs what the average step costs.
    """
    batch = slots.shape[0]
    if bounds is None:
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device)
    boundary = torch.zeros(batch, dtype=torch.int32, device=qkv.device)
    # Positions 1 to C: a tail of C rows is folded.
    position = 1 + torch.arange(batch, dtype=torch.int32, device=qkv.device) % chunk

    def make(pool: Tensor) -> Call:
        rows = replay.replay_ring_rows(chunk)
        k_ring = torch.randn(pool.shape[0], rows, *pool.shape[1:3], device=qkv.device).to(qkv.dtype)
        v_ring = k_ring.clone()

        def run() -> Tensor:
            replay.lightning_decode_replay(
                qkv,
                slopes,
                pool,
                k_ring,
                v_ring,
                slots,
                boundary,
                position,
                bounds,
                out=out,
                chunk=chunk,
                activation=None,
                max_query=replay.MAX_QUERY if qkv.shape[0] > batch else 1,
            )
            return out

        return run

    return make


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the 2-norm; infinite where anything is NaN."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def forward_backward(forward: Call, leaves: Sequence[Tensor], grad: Tensor) -> Call:
    """A call that runs both and leaves no gradients behind."""

    def run() -> Tensor:
        return torch.autograd.grad(forward(), leaves, grad)[0]

    return run


def chunked_fp64(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Tensor:
    """Outputs [T, H, D] in float64, chunk by chunk: the recurrence to 1e-13, in seconds at 64K tokens on a GPU."""
    chunk = 64
    position = torch.arange(chunk, dtype=torch.float64, device=q.device)
    slope = slopes.double()[:, None, None]
    distance = position[:, None] - position[None, :]
    causal = torch.exp(-slope * distance.clamp(min=0.0)) * (distance >= 0)
    after = torch.exp(-slope * (position[:, None] + 1))
    parts = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        state = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=torch.float64, device=q.device)
        for start in range(first, last, chunk):
            q_c, k_c, v_c = (x[start : min(start + chunk, last)].double().transpose(0, 1) for x in (q, k, v))
            length = q_c.shape[1]
            scores = q_c @ k_c.transpose(1, 2) * causal[:, :length, :length]
            parts.append((scores @ v_c + (q_c * after[:, :length]) @ state).transpose(0, 1))
            before = torch.exp(-slope * (length - 1 - position[:length, None]))
            state = torch.exp(-slope * length) * state + (k_c * before).transpose(1, 2) @ v_c
    return torch.cat(parts)


def _captured(call: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay_graph() -> Tensor:
        graph.replay()
        return result

    return replay_graph
