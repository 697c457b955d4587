# SPDX-License-Identifier: Apache-2.0
"""Lightning-attention kernels: first right, then fast, beside the peers found on this machine.

    python benchmarks/kernels.py --csv kernels.csv --plot kernels.png
    python benchmarks/kernels.py --fla FOLDER --vllm FILE --seg-la FILE --opennlplab FILE

Every variant of ours, and prefill and decode of the peers, are first held against the float64 recurrence, then timed
(median). Times are shown beside the least time the bytes of the task can take at the copy bandwidth measured in the
same run. Without a GPU the correctness of the CPU path is checked and every timed row is marked "needs a GPU"; a peer
that is not there has rows marked "absent".

Exit status: 1 if one of our own rows is wrong, else 0.

Shapes: ``T`` packed tokens, ``N`` sequences, ``H`` heads, ``D`` head_dim.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    # In its own folder this file would be importable as `kernels` and shadow the Hugging Face package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import kernel_timing as timing  # noqa: E402
from benchmarks.kernel_peers import Call, Peer, load_peers  # noqa: E402
from benchmarks.kernel_sections import OURS, SECTIONS, make_slopes, prefill_call  # noqa: E402
from minimax_plugin.kernels import ops, reference, replay  # noqa: E402

#: Largest relative error of our outputs and states, and of our gradients, against float64.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (3e-3, 5e-3)}


@dataclass(frozen=True)
class Row:
    """One line of the table; ``error`` is relative in the 2-norm, ``of_floor`` how much of the floor was reached,
    ``gb_per_s`` the bytes of the floor over the time."""

    machine: str
    section: str
    case: str
    implementation: str
    status: str
    us: float | None = None
    floor_us: float | None = None
    of_floor: float | None = None
    gb_per_s: float | None = None
    error: float | None = None
    peak_mib: float | None = None
    launches: int | None = None


class Bench:
    """Collects and prints rows."""

    def __init__(self, device: torch.device, peers: Sequence[Peer]) -> None:
        self.device, self.peers = device, peers
        self.machine = timing.machine_name(device)
        self.bandwidth = timing.copy_bandwidth(device)
        self.rows: list[Row] = []

    def add(self, section: str, case: str, implementation: str, status: str, **values: float | int | None) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        row = Row(self.machine, section, case, implementation, status, **rounded)  # type: ignore[arg-type]
        self.rows.append(row)
        print(format_row(row), flush=True)

    def check(self, case: str, implementation: str, error: float, bound: float) -> None:
        right = error <= bound
        self.add("correctness", case, implementation, "right" if right else f"WRONG, bound {bound:.0e}", error=error)

    def time(
        self,
        section: str,
        case: str,
        name: str,
        prepare: Callable[[], Call],
        floor: int,
        *,
        expected: Tensor | None = None,
        graph: bool = False,
    ) -> None:
        """Time what ``prepare`` returns and what must move ``floor`` bytes; a peer that fails in either says so."""
        try:
            call = prepare()
            error = None if expected is None else timing.relative_error(call(), expected)
            timed = timing.measure(call, graph=graph)
        # Peers raise what they like (out of memory, unsupported shapes); the table goes on.
        except Exception as failure:
            if name.startswith(OURS):
                raise
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            reason = (str(failure).strip().splitlines() or [""])[0]
            self.add(section, case, name, f"failed: {type(failure).__name__}: {reason[:80]}")
            return
        floor_us = 1e6 * floor / self.bandwidth
        self.add(
            section,
            case,
            name,
            "measured",
            us=timed.us,
            floor_us=floor_us,
            of_floor=floor_us / timed.us,
            gb_per_s=1e-3 * floor / timed.us,
            error=error,
            peak_mib=timed.peak_mib,
            launches=timed.launches,
        )

    def ready(self, section: str, case: str) -> bool:
        """Whether there is a GPU to time on; if not, and for peers that are not there, the rows say so."""
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            self.add(section, case, OURS, "needs a GPU")
        for peer in self.peers:
            if section in peer.sections and (peer.absent or not on_gpu):
                self.add(section, case, peer.name, f"absent: {peer.absent}" if peer.absent else "needs a GPU")
        return on_gpu

    def present(self, section: str) -> list[Peer]:
        return [peer for peer in self.peers if section in peer.sections and not peer.absent]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = {"fla": args.fla, "vllm": args.vllm, "seg_la": args.seg_la, "opennlplab": args.opennlplab}
    peers = load_peers(paths, on_gpu=device.type == "cuda")
    bench = Bench(device, peers)
    print(f"machine: {bench.machine}; backend {ops.lightning_backend(device)}")
    correctness(bench)
    for name in args.sections:
        SECTIONS[name](bench, args.quick)
    if args.csv:
        write_csv(args.csv, bench.rows)
    if args.plot:
        write_plot(args.plot, bench.rows)
    wrong = [row for row in bench.rows if row.implementation.startswith(OURS) and row.status.startswith("WRONG")]
    print(f"{len(bench.rows)} rows, {len(wrong)} of ours wrong")
    return 1 if wrong else 0


def correctness(bench: Bench) -> None:
    """Every variant against the recurrence: ragged lengths, an empty sequence, poisoned outputs, the first layer."""
    lengths = [1, 64, 0, 65, 257, 130] if bench.device.type == "cpu" else [1, 64, 0, 65, 1025, 3000]
    bounds = list(itertools.accumulate(lengths, initial=0))
    slopes = make_slopes(8, bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        label = "fp32" if dtype == torch.float32 else "bf16"
        qkv = torch.nn.functional.silu(torch.randn(bounds[-1], 8, 3 * timing.HEAD_DIM, device=bench.device)).to(dtype)
        q, k, v = qkv.chunk(3, dim=-1)
        states = torch.randn(len(lengths), 8, timing.HEAD_DIM, timing.HEAD_DIM, device=bench.device)
        parts = list(zip(bounds, bounds[1:], strict=False))
        results = [
            reference.recurrence_fp64(q[a:b], k[a:b], v[a:b], slopes, states[n]) for n, (a, b) in enumerate(parts)
        ]
        expected, final = torch.cat([o for o, _ in results]), torch.stack([s for _, s in results])
        bound, gradient_bound = BOUNDS[dtype]
        for precision in ("default", "high"):
            pool, out = states.clone(), torch.full_like(v, float("nan"), memory_format=torch.contiguous_format)
            prefill_call(qkv, slopes, pool, bounds, out, precision=precision, has_initial=True)()
            bench.check(f"prefill {label}", f"{OURS}, {precision}", timing.relative_error(out, expected), bound)
            exact = dtype == torch.float32 or precision == "high" or ops.lightning_backend(bench.device) == "torch"
            state_bound = 1e-5 if exact else bound
            bench.check(
                f"prefill {label} state", f"{OURS}, {precision}", timing.relative_error(pool, final), state_bound
            )
        check_decode(bench, label, qkv[: lengths[4] + 1], slopes, states[0], bound)
        check_gradients(bench, label, qkv[:200].unsqueeze(0), slopes, gradient_bound)
        if bench.device.type == "cuda" and dtype == torch.bfloat16:
            # From zero states, which is all that some peers know, and from the fifth sequence on, since none is empty.
            first = bounds[4]
            shifted = [bound - first for bound in bounds[4:]]
            exact_out = timing.chunked_fp64(q[first:], k[first:], v[first:], slopes, shifted)
            check_peers(bench, qkv[first:], slopes, shifted, exact_out, bound)


def check_peers(bench: Bench, qkv: Tensor, slopes: Tensor, bounds: list[int], expected: Tensor, bound: float) -> None:
    """Prefill of the sequences, and one decode step of four others."""
    q, k, v = qkv.chunk(3, dim=-1)
    for peer in bench.present("prefill"):
        assert peer.prefill is not None
        check_peer(
            bench, "prefill bf16", peer, functools.partial(peer.prefill, q, k, v, slopes, bounds), expected, bound
        )
    q, k, v = q[:4], k[:4], v[:4]
    states = torch.randn(4, qkv.shape[1], q.shape[2], q.shape[2], device=bench.device)
    slots = torch.arange(4, dtype=torch.int32, device=bench.device)
    rows = [slice(n, n + 1) for n in range(4)]
    expected = torch.cat([reference.recurrence_fp64(q[n], k[n], v[n], slopes, states[n][0])[0] for n in rows])
    for peer in bench.present("decode"):
        assert peer.decode is not None
        prepare = functools.partial(peer.decode, q, k, v, slopes, states.clone(), slots)
        check_peer(bench, "decode bf16", peer, prepare, expected, bound)


def check_peer(
    bench: Bench, case: str, peer: Peer, prepare: Callable[[], Call], expected: Tensor, bound: float
) -> None:
    try:
        error = timing.relative_error(prepare()(), expected)
    # Peers raise what they like; the table goes on.
    except Exception as failure:
        bench.add("correctness", case, peer.name, f"failed: {type(failure).__name__}")
    else:
        bench.check(case, peer.name, error, bound)


def check_decode(bench: Bench, label: str, qkv: Tensor, slopes: Tensor, state: Tensor, bound: float) -> None:
    """Decode, verify and replay of one sequence in slot 1, beside a padding row."""
    steps = min(qkv.shape[0], 70)
    q, k, v = qkv[:steps].chunk(3, dim=-1)
    expected, final = reference.recurrence_fp64(q, k, v, slopes, state)
    pool = torch.stack([torch.full_like(state, float("nan")), state])
    slots = torch.tensor([1, -1], dtype=torch.int32, device=bench.device)
    out = torch.empty(steps, 2, *state.shape[:2], dtype=qkv.dtype, device=bench.device)
    for t in range(steps):
        rows = torch.stack([qkv[t], torch.full_like(qkv[t], float("nan"))])
        ops.lightning_decode(rows, slopes, pool, slots, out=out[t], activation=None)
    padding = float(out[:, 1].abs().max())
    bench.check(f"decode {label}", OURS, timing.relative_error(out[:, 0], expected) + padding, bound)
    bench.check(f"decode {label} state", OURS, timing.relative_error(pool[1], final), 1e-5)
    check_verify(bench, label, qkv[:steps], slopes, state, expected, bound)
    for chunk in replay.CHUNKS:
        case = make_replay(qkv, slopes, state, chunk)
        results = []
        for start in range(0, steps, 4):
            stop = min(start + 4, steps)
            results.append(case.step(qkv[start:stop]))
        bench.check(f"replay {chunk} {label}", OURS, timing.relative_error(torch.cat(results), expected), bound)


def check_verify(
    bench: Bench, label: str, qkv: Tensor, slopes: Tensor, state: Tensor, expected: Tensor, bound: float
) -> None:
    """Four tokens a call, the last state of each call in the slot that the next one reads."""
    pool = torch.full((5, *state.shape), float("nan"), device=bench.device)
    pool[4] = state
    out = torch.full_like(expected, float("nan"), dtype=qkv.dtype)
    reads, writes = (torch.tensor(x, dtype=torch.int32, device=bench.device) for x in ([4], [[0, 1, 2, 4]]))
    for start in range(0, qkv.shape[0], 4):
        part = qkv[start : start + 4]
        bounds = torch.tensor([0, len(part)], dtype=torch.int32, device=bench.device)
        ops.lightning_verify(part, slopes, pool, reads, writes, bounds, out=out[start : start + 4], activation=None)
    bench.check(f"verify {label}", OURS, timing.relative_error(out, expected), bound)


@dataclass
class ReplayCase:
    """Replay decode of one sequence in the only slot, some tokens at a time, all of them accepted."""

    slopes: Tensor
    pool: Tensor
    k_ring: Tensor
    v_ring: Tensor
    chunk: int
    boundary: Tensor
    position: Tensor

    def step(self, qkv: Tensor) -> Tensor:
        out = torch.empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
        bounds = torch.tensor([0, qkv.shape[0]], dtype=torch.int32, device=qkv.device)
        slots = torch.zeros(1, dtype=torch.int32, device=qkv.device)
        replay.lightning_decode_replay(
            qkv,
            self.slopes,
            self.pool,
            self.k_ring,
            self.v_ring,
            slots,
            self.boundary,
            self.position,
            bounds,
            out=out,
            chunk=self.chunk,
            activation=None,
        )
        self.boundary = replay.next_boundary(self.boundary, self.position, self.chunk)
        self.position = self.position + qkv.shape[0]
        return out


def make_replay(qkv: Tensor, slopes: Tensor, state: Tensor, chunk: int) -> ReplayCase:
    ring = torch.zeros(1, replay.replay_ring_rows(chunk), *state.shape[:2], dtype=qkv.dtype, device=qkv.device)
    zero = torch.zeros(1, dtype=torch.int32, device=qkv.device)
    return ReplayCase(slopes, state[None].clone(), ring, ring.clone(), chunk, zero, zero.clone())


def check_gradients(bench: Bench, label: str, qkv: Tensor, slopes: Tensor, bound: float) -> None:
    q, k, v = (x.clone().requires_grad_() for x in qkv.chunk(3, dim=-1))
    q_exact, k_exact, v_exact = (x[0].detach().double().requires_grad_() for x in (q, k, v))
    grad = torch.randn_like(v)
    reference.recurrence_fp64(q_exact, k_exact, v_exact, slopes)[0].backward(grad[0].double())
    ops.lightning_attention(q, k, v, slopes)[0].backward(grad)
    for name, ours, exact in (("q", q, q_exact), ("k", k, k_exact), ("v", v, v_exact)):
        assert ours.grad is not None and exact.grad is not None
        bench.check(f"gradient of {name} {label}", OURS, timing.relative_error(ours.grad[0], exact.grad), bound)


def format_row(row: Row) -> str:
    line = f"{row.section:12s} {row.case:36s} {row.implementation:26s} {row.status:10s}"
    if row.us is not None and row.floor_us is not None and row.of_floor is not None:
        line += f" {row.us:10.1f} us  floor {row.floor_us:9.1f} us ({100 * row.of_floor:3.0f} %)"
        line += f"  peak {row.peak_mib or 0:8.1f} MiB  {row.launches or 0:3d} launches"
    return line + ("" if row.error is None else f"  error {row.error:.1e}")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """One panel per section: time over floor of each implementation, log scale; 1 is the memory bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.us is not None and row.floor_us]
    if not measured:
        print(f"{path}: not written, nothing was timed")
        return
    sections = list(dict.fromkeys(row.section for row in measured))
    figure, panels = pyplot.subplots(len(sections), figsize=(9, 3 * len(sections)), squeeze=False, layout="constrained")
    for axes, section in zip(panels[:, 0], sections, strict=True):
        part = [row for row in measured if row.section == section]
        cases = list(dict.fromkeys(row.case for row in part))
        for name in dict.fromkeys(row.implementation for row in part):
            points = {row.case: row.us / row.floor_us for row in part if row.implementation == name}  # type: ignore[operator]
            axes.plot(list(points), list(points.values()), "o-", label=name)
        axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=7)
        axes.set(yscale="log", ylabel="time / floor", title=f"{section}, {measured[0].machine}")
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="one small case of each section")
    parser.add_argument("--fla", type=Path, help="folder with the package fla, unless installed")
    parser.add_argument("--vllm", type=Path, help="vLLM's lightning_attn.py, unless vllm is installed")
    parser.add_argument("--seg-la", type=Path, help="SGLang's seg_la.py, unless sglang is installed")
    parser.add_argument("--opennlplab", type=Path, help="OpenNLPLab's lightning_attn2.py, unless lightning_attn is")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
