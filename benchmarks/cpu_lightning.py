# SPDX-License-Identifier: Apache-2.0
"""CPU chunk loop beside the original block loop and transformers' in-tree loop, all in one run.

    python benchmarks/cpu_lightning.py --csv cpu_lightning.csv --plot cpu_lightning.png

The loops take turns (A B C A B C ...), so that a change of the machine's load falls on all of them alike; minimum and
median over the repeats are printed. Errors are those of the whole output against the float64 recurrence on the same
inputs. The inputs are ``silu(N(0, 1))``, the slopes those of the first layer of an 80-layer model with the heads
measured.

A CPU with bf16 dot instructions runs the two other loops far faster in bf16 than one without. Where torch uses such
instructions, bf16 is therefore measured twice: as the machine is ("native") and with them turned off ("no bf16 dots"),
which is what a CPU without them does.

Shapes: ``T`` tokens, ``H`` heads, ``D`` head_dim; batch 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    # This folder holds a `kernels` module, which transformers would take for the Hugging Face package of that name.
    del sys.path[0]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from minimax_plugin.architecture import lightning_slopes  # noqa: E402
from minimax_plugin.kernels import reference  # noqa: E402

#: Tokens of one block in the released module.
ORIGINAL_BLOCK = 256

NATIVE, NO_DOTS = BF16_MODES = ("native", "no bf16 dots")

OURS, ORIGINAL, IN_TREE = "chunk loop (ours)", "original block loop", "transformers in-tree"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Returns the outputs [T, H, D] and the final state [H, D, D].
Loop = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, errors relative in the 2-norm."""

    machine: str
    torch: str
    threads: int
    dtype: str
    bf16: str
    tokens: int
    heads: int
    head_dim: int
    implementation: str
    min_ms: float
    median_ms: float
    median_over_ours: float
    output_error: float
    state_error: float


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what the arguments ask for; returns the rows."""
    args = _parse_args(argv)
    machine = machine_name()
    print(f"machine: {machine}; torch {torch.__version__}; {args.heads} heads x {args.head_dim}")
    rows: list[Row] = []
    for tokens in args.tokens:
        for dtype in args.dtypes:
            q, k, v, slopes = make_inputs(tokens, args.heads, args.head_dim, DTYPES[dtype])
            expected = reference.recurrence_fp64(q, k, v, slopes)
            candidates = loops(q, k, v, slopes)
            errors = {name: _relative_errors(run(), expected) for name, run in candidates.items()}
            modes = BF16_MODES if dtype == "bf16" and has_bf16_dots() else BF16_MODES[:1]
            for mode, threads in itertools.product(modes, args.threads):
                torch.set_num_threads(threads)
                with without_bf16_dots() if mode == NO_DOTS else contextlib.nullcontext():
                    times = measure_in_turns(candidates, args.seconds, args.repeats)
                ours = statistics.median(times[OURS])
                for name, samples in times.items():
                    median = statistics.median(samples)
                    rows.append(
                        Row(
                            machine=machine,
                            torch=torch.__version__,
                            threads=threads,
                            dtype=dtype,
                            bf16=mode if dtype == "bf16" else "",
                            tokens=tokens,
                            heads=args.heads,
                            head_dim=args.head_dim,
                            implementation=name,
                            min_ms=round(min(samples), 2),
                            median_ms=round(median, 2),
                            median_over_ours=round(median / ours, 2),
                            output_error=errors[name][0],
                            state_error=errors[name][1],
                        )
                    )
                    print(format_row(rows[-1]), flush=True)
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        write_plot(args.plot, rows)
    return rows


def machine_name() -> str:
    """CPU model, logical CPUs and widest vector extension, for instance ``AMD EPYC (26/2), 2 CPUs, avx512_bf16``."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        entries = {key.strip(): value.strip() for key, value in lines}
        family = f"{entries.get('cpu family', '?')}/{entries.get('model', '?')}"
        model, flags = f"{entries.get('model name', model)} ({family})", set(entries.get("flags", "").split())
    vector = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "unknown vectors")
    return f"{model}, {len(_cpus())} CPUs, {vector}"


def has_bf16_dots() -> bool:
    """Whether torch multiplies bf16 matrices with bf16 instructions here, found by timing one product both ways."""
    a = torch.randn(512, 512).bfloat16()

    def best() -> float:
        samples = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, a)
            samples.append(time.perf_counter() - start)
        return min(samples)

    native = best()
    with without_bf16_dots():
        return best() > 2 * native


@contextlib.contextmanager
def without_bf16_dots() -> Iterator[None]:
    """Turn oneDNN off, through which alone torch reaches the bf16 dot instructions of a CPU."""
    with warnings.catch_warnings():
        # The flags include a TF32 one that only Intel GPUs know, and restoring it warns every time.
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [T, H, D] as strided views of one activated projection, and slopes [H] fp32."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.nn.functional.silu(torch.randn(tokens, heads, 3 * head_dim, generator=generator)).to(dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    return q, k, v, torch.tensor(lightning_slopes(heads, 0, 80), dtype=torch.float32)


def loops(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> dict[str, Loop]:
    """The implementations found here, what they precompute beforehand is not timed."""
    candidates: dict[str, Loop] = {
        OURS: lambda: chunk_loop(q, k, v, slopes),
        ORIGINAL: lambda: original_block_loop(q, k, v, slopes),
    }
    in_tree = _in_tree_loop(q, k, v)
    if in_tree is None:
        print(f"{IN_TREE}: absent, transformers.models.minimax cannot be imported")
    else:
        candidates[IN_TREE] = in_tree
    return candidates


def chunk_loop(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The loop that serves CPUs, from a zero state and with its decay table made anew."""
    state = torch.zeros(q.shape[1], q.shape[2], v.shape[2])
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    reference.chunk_scan(q, k, v, state, out, reference.DecayTable(slopes))
    return out, state


def original_block_loop(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The algorithm of the released module: blocks of 256 tokens, decays in fp32, state in fp32.

    Its roundings for a lower dtype are kept: scores are taken in the input dtype and widened, and the update of the
    state is one product in the input dtype, of keys rounded back after their decay.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    slope = slopes.view(-1, 1, 1)
    position = torch.arange(1, ORIGINAL_BLOCK + 1).to(q)
    query_decay = torch.exp(-slope * position[:, None])
    key_decay = torch.exp(-slope * (ORIGINAL_BLOCK - position[:, None]))
    distance = position[:, None] - position[None, :]
    causal = torch.exp(torch.where(distance >= 0, -slope * distance, float("-inf")))
    state = torch.zeros(1, q.shape[1], q.shape[3], v.shape[3], device=q.device)
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[2], ORIGINAL_BLOCK):
        q_b, k_b, v_b = (x[:, :, start : start + ORIGINAL_BLOCK].contiguous() for x in (q, k, v))
        length = q_b.shape[2]
        history = torch.matmul(q_b * query_decay[:, :length], state).float()
        scores = torch.matmul(q_b, k_b.transpose(-1, -2)).float() * causal[:, :length, :length]
        out[:, :, start : start + length] = history + torch.matmul(scores, v_b.float())
        decayed = (k_b * key_decay[:, -length:]).transpose(-1, -2).to(v_b.dtype)
        state = torch.exp(-slope * length) * state + torch.matmul(decayed, v_b)
    return out.squeeze(0).transpose(0, 1), state.squeeze(0)


def measure_in_turns(candidates: dict[str, Loop], seconds: float, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the candidates taking turns.

    One warm-up each, then ``repeats`` rounds, cut short (never below three) when ``seconds`` are over.
    """
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def format_row(row: Row) -> str:
    return (
        f"{row.dtype} {row.bf16:12s} {row.tokens:6d} tokens {row.threads} thread{'s' if row.threads > 1 else ' '} "
        f"{row.implementation:22s} min {row.min_ms:9.2f} ms  median {row.median_ms:9.2f} ms  "
        f"{row.median_over_ours:6.2f} x ours  error {row.output_error:.1e}, state {row.state_error:.1e}"
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Bars of tokens per second at the largest number of threads, one group per dtype and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]

    def group_of(row: Row) -> str:
        return "\n".join(filter(None, (row.dtype, row.bf16, str(row.tokens))))

    groups = list(dict.fromkeys(group_of(row) for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = pyplot.subplots(figsize=(8.5, 3.2), layout="constrained")
    for number, name in enumerate(names):
        speeds = {group_of(row): row.tokens / row.median_ms for row in rows if row.implementation == name}
        positions = [index + 0.8 * number / len(names) for index in range(len(groups))]
        axes.bar(positions, [speeds.get(group, 0.0) for group in groups], width=0.8 / len(names), label=name)
    centre = 0.4 * (len(names) - 1) / len(names)
    axes.set_xticks([index + centre for index in range(len(groups))], groups)
    axes.set_ylabel("thousand tokens / s")
    axes.set_title(f"{rows[0].heads} heads x {rows[0].head_dim}, {threads} thread(s), {rows[0].machine}", fontsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _in_tree_loop(q: Tensor, k: Tensor, v: Tensor) -> Loop | None:
    """transformers' MiniMax layer with its projections, activation and norm taken out, or None if it is absent.

    What is left besides the loop is one multiplication by the sigmoid of the gate, under 2 % of the time.
    """
    try:
        from transformers.models.minimax.configuration_minimax import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError:
        return None
    tokens, heads, head_dim = q.shape
    config = MiniMaxConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        head_dim=head_dim,
        num_hidden_layers=80,
        layer_types=["linear_attention"] * 80,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=0).to(q.dtype).eval()
    hidden = torch.cat([q, k, v], dim=-1).reshape(1, tokens, -1)
    gate = torch.zeros(1, tokens, heads * head_dim, dtype=q.dtype)
    layer.qkv_proj = layer.act_fn = layer.norm = layer.out_proj = torch.nn.Identity()
    layer.output_gate = _Constant(gate)

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            output, state = layer(hidden, position_embeddings=None, attention_mask=None)
        # The gate of zeros halves the output; doubling it again is exact.
        return (output * 2).reshape(tokens, heads, head_dim), state.squeeze(0)

    return run


class _Constant(torch.nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _relative_errors(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[float]:
    pairs = zip(actual, expected, strict=True)
    return [float(f"{float((x.double() - exact).norm() / exact.norm()):.2e}") for x, exact in pairs]


def _cpus() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15, help="most rounds of one row")
    parser.add_argument("--seconds", type=float, default=12.0, help="time after which a row ends early")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
