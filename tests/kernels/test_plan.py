# SPDX-License-Identifier: Apache-2.0
"""How a step is cut into segments, and which backend serves it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_plugin.kernels import dispatch, lightning, ops

LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6)


@given(LENGTHS, st.sampled_from((16, 64, 128)))
def test_segments_tile_every_sequence_on_its_own_grid(sequences: list[tuple[int, int]], segment: int) -> None:
    bounds = [0]
    for length, _ in sequences:
        bounds.append(bounds[-1] + length)
    computed = [done for _, done in sequences]
    plan = ops.LightningPlan.build(bounds, computed, segment=segment)
    assert plan.cu_seqlens.tolist() == bounds
    assert plan.num_tokens == bounds[-1]
    rows, offsets = plan.segments.tolist(), plan.segment_offsets.tolist()
    covered = []
    for n, (length, done) in enumerate(sequences):
        own = rows[offsets[n] : offsets[n + 1]]
        assert all(row[0] == n and row[1] < row[2] for row in own)
        covered += [t for row in own for t in range(row[1], row[2])]
        borders = [row[2] - bounds[n] + done for row in own[:-1]]
        assert borders == [p for p in range(done + 1, done + length) if p % segment == 0]
    assert covered == list(range(bounds[-1]))
    assert plan.max_segments == max((b - a for a, b in zip(offsets, offsets[1:], strict=False)), default=0)


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (1, 1), (3, 64), (2, 130)])
def test_uniform_is_the_plan_of_equal_sequences(batch: int, length: int) -> None:
    plan = ops.LightningPlan.uniform(batch, length, segment=64)
    built = ops.LightningPlan.build([n * length for n in range(batch + 1)], segment=64)
    for name in ("cu_seqlens", "segments", "segment_offsets"):
        assert torch.equal(getattr(plan, name), getattr(built, name)), name
    assert (plan.max_segments, plan.num_tokens) == (built.max_segments, built.num_tokens)


@pytest.mark.parametrize("segment", [0, -64, 40])
def test_a_segment_is_a_multiple_of_16(segment: int) -> None:
    with pytest.raises(ValueError, match=f"segment is {segment}, expected a positive multiple of 16"):
        ops.LightningPlan.build([0, 5], segment=segment)


@pytest.mark.parametrize("computed", [[1], [1, -1], [1, 2, 3]])
def test_computed_tokens_fit_the_sequences(computed: list[int]) -> None:
    with pytest.raises(ValueError, match=r"num_computed is .*, expected 2 integers >= 0"):
        ops.LightningPlan.build([0, 5, 9], computed)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "segment"),
    [(1024, 8, 256), (65_536, 8, 2048), (65_536, 64, 4096), (8192, 64, 2048), (1, 1, 256), (33_792, 4, 1024)],
)
def test_suggested_segments_keep_a_large_gpu_busy(num_tokens: int, num_heads: int, segment: int) -> None:
    assert ops.suggest_segment(num_tokens, num_heads) == segment


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_the_default_backend_follows_the_device(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIMAX_LIGHTNING_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", value)
    assert ops.lightning_backend(torch.device("cpu")) == "torch"
    assert ops.lightning_backend(torch.device("cuda")) == ("triton" if lightning.HAS_TRITON else "torch")
    monkeypatch.setattr(lightning, "HAS_TRITON", False)
    assert ops.lightning_backend(torch.device("cuda")) == "torch"


def test_a_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lightning, "HAS_TRITON", False)
    monkeypatch.delenv("MINIMAX_LIGHTNING_BACKEND", raising=False)
    dispatch._warn_without_triton.cache_clear()
    for _ in range(2):
        ops.lightning_backend(torch.device("cuda"))
    assert [record.message for record in caplog.records if "install triton" in record.message] == [
        "Triton is not installed: lightning attention runs on the GPU in plain PyTorch, many times slower; "
        "install triton"
    ]


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "triton")
    monkeypatch.setattr(lightning, "interpreted", lambda: False)
    monkeypatch.setattr(lightning, "HAS_TRITON", True)
    with pytest.raises(RuntimeError, match="the tensors are on cpu, expected a CUDA or ROCm device"):
        ops.lightning_backend(torch.device("cpu"))
    monkeypatch.setattr(lightning, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton cannot be imported"):
        ops.lightning_backend(torch.device("cuda"))
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MINIMAX_LIGHTNING_BACKEND is 'cuda', expected 'auto', 'torch' or 'triton'"):
        ops.lightning_backend(torch.device("cpu"))
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "torch")
    assert ops.lightning_backend(torch.device("cuda")) == "torch"


def test_everything_imports_and_runs_without_triton() -> None:
    """Also a module of kernels only, whose decorators then do nothing."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from minimax_plugin.kernels import lightning, norm, ops, recurrent, replay, scan\n"
        "assert not lightning.HAS_TRITON\n"
        "q = torch.ones(3, 1, 16)\n"
        "o, _ = ops.lightning_attention(q, q, q, torch.tensor([0.5]))\n"
        "print(tuple(o.shape))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "(3, 1, 16)", run.stderr
