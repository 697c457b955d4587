# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run to their end on any machine, and their GPU sections call every implementation rightly."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrence import recurrence

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: str) -> str:
    # The package warns where transformers cannot be imported, as when a file beside the script shadows a module of it.
    command = [sys.executable, "-W", "error::RuntimeWarning", str(ROOT / "benchmarks" / name), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_cpu_loops_agree_and_are_tabulated(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, plot = tmp_path / "table.csv", tmp_path / "plot.png"
    run_script(
        "cpu_lightning.py",
        *("--tokens", "300", "--threads", "1", "--heads", "2", "--head-dim", "32", "--repeats", "3"),
        *("--csv", str(table), "--plot", str(plot)),
    )
    rows = read_csv(table)
    names = {row["implementation"] for row in rows}
    assert names == {"chunk loop (ours)", "original block loop", "transformers in-tree"}
    for row in rows:
        for error in ("output_error", "state_error"):
            assert float(row[error]) < (1e-6 if row["dtype"] == "fp32" else 8e-3), row
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
    assert plot.stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the rows are measured")
def test_kernel_rows_without_a_gpu_say_so(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    output = run_script("kernels.py", "--quick", "--csv", str(table))
    rows = read_csv(table)
    assert "0 of ours wrong" in output
    assert {"prefill", "decode", "verify", "replay", "gradient"} <= {row["case"].split()[0] for row in rows}
    assert {row["section"] for row in rows} == {"correctness", "prefill", "decode", "verify", "train", "mixer"}
    for row in rows:
        if row["section"] == "correctness":
            assert row["status"] == "right", row
        else:
            assert row["status"] == "needs a GPU" or row["status"].startswith("absent: "), row


def test_accuracy_is_tabulated() -> None:
    output = run_script("kernel_accuracy.py", "--tokens", "100", "--head-dim", "32")
    errors = {tuple(line.split()[:3]): [float(x) for x in line.split()[3:]] for line in output.splitlines()[1:]}
    assert len(errors) == 12
    assert max(errors["fp32", "default", "outputs"] + errors["bf16", "default", "state"]) < 1e-6
    assert 1e-4 < max(errors["bf16", "default", "outputs"]) < 3e-3


def test_gpu_sections_run_with_the_clock_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the GPU sections call, on this device and in small, with only the timing replaced."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks import kernel_peers, kernel_sections, kernel_timing, kernels

    outputs = []

    def measure(call: Any, *, graph: bool = False) -> Any:
        outputs.append(call())
        return kernel_timing.Timed(us=1.0, peak_mib=0.0, launches=1)

    monkeypatch.setattr(kernel_timing, "measure", measure)
    monkeypatch.setattr(kernel_timing, "BEYOND_L2", 1)
    monkeypatch.setattr(kernel_sections, "HEAD_DIM", 32)
    monkeypatch.setattr(kernels.Bench, "ready", lambda *_: True)

    def unusable(*_: Any) -> Any:
        raise TypeError("unexpected argument")

    peers = [peer for peer in kernel_peers.load_peers({}, on_gpu=False) if peer.name == kernel_peers.ORIGINAL]
    sections = ("prefill", "decode", "train")
    broken = kernel_peers.Peer("broken", sections, prefill=unusable, decode=unusable, train=unusable)
    bench = kernels.Bench(torch.device("cpu"), [*peers, broken])
    kernel_sections.time_prefill(bench, "ragged", 2, [5, 70, 130])
    kernel_sections.time_decode(bench, "batch 3", 2, 3)
    kernel_sections.time_verify(bench, "batch 3", 2, 3)
    kernel_sections.time_train(bench, "100 tokens", 2, 100)
    kernel_sections.time_mixer(bench, "prefill", [20])
    kernel_sections.time_mixer(bench, "decode", [1] * 3)
    failed = [row for row in bench.rows if row.implementation == "broken"]
    assert [row.status for row in failed] == ["failed: TypeError: unexpected argument"] * 4
    assert len(outputs) == len(bench.rows) - len(failed) == 4 + 3 + 2 + 4 + 2
    assert all(torch.isfinite(out).all() for out in outputs)
    assert {row.status for row in bench.rows if row not in failed} == {"measured"}
    assert all(row.gb_per_s for row in bench.rows if row not in failed)
    prefill = [row for row in bench.rows if row.error is not None]
    assert len(prefill) == 4 and all(row.error < 5e-3 for row in prefill if row.error is not None)


def test_peers_are_held_against_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that are right, wrong in decode, and unusable."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks import kernel_peers, kernels

    def decode(q: Any, k: Any, v: Any, slopes: Any, states: Any, slots: Any) -> Any:
        decayed = torch.exp(-slopes)[:, None, None] * states[slots.long()]
        return lambda: torch.einsum(
            "nhk,nhkv->nhv", q.float(), decayed + k[..., None].float() * v[..., None, :].float()
        )

    def unusable(*_: Any) -> Any:
        raise TypeError

    original = next(peer for peer in kernel_peers.load_peers({}, on_gpu=False) if peer.name == kernel_peers.ORIGINAL)
    peers = [
        kernel_peers.Peer("right", ("prefill", "decode"), prefill=original.prefill, decode=decode),
        kernel_peers.Peer("wrong", ("decode",), decode=lambda q, k, v, s, *rest: decode(q, k, v, 2 * s, *rest)),
        kernel_peers.Peer("unusable", ("prefill",), prefill=unusable),
    ]
    bench = kernels.Bench(torch.device("cpu"), peers)
    qkv, slopes = torch.randn(40, 2, 48).bfloat16(), torch.tensor([0.9, 0.1])
    q, k, v = qkv.chunk(3, dim=-1)
    expected = kernels.timing.chunked_fp64(q, k, v, slopes, [0, 15, 40])
    kernels.check_peers(bench, qkv, slopes, [0, 15, 40], expected, 3e-3)
    status = {(row.implementation, row.case): row.status for row in bench.rows}
    assert status == {
        ("right", "prefill bf16"): "right",
        ("right", "decode bf16"): "right",
        ("wrong", "decode bf16"): "WRONG, bound 3e-03",
        ("unusable", "prefill bf16"): "failed: TypeError",
    }


def test_fast_oracle_is_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks import kernel_timing

    q, k, v = torch.randn(3, 150, 2, 16).unbind(0)
    slopes = torch.tensor([0.917, 4.95e-5])
    expected = [recurrence(q[:20], k[:20], v[:20], slopes)[0]]
    expected.append(recurrence(q[20:], k[20:], v[20:], slopes)[0])
    actual = kernel_timing.chunked_fp64(q, k, v, slopes, [0, 20, 20, 150])
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-12, atol=1e-12)
