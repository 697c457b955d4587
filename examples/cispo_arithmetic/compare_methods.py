# SPDX-License-Identifier: Apache-2.0
"""CISPO beside GRPO, DAPO and REINFORCE: updates until a tiny model adds with the right carry.

All methods start from the same model (``warm_start.py``), see the same prompts, make 16
updates per rollout of 1,024 completions with the same optimizer and head, and keep groups without variance. They differ
in the loss alone:

* cispo: weights capped at 5, no lower bound (arXiv 2506.13585, eq. 4 and 5);
* reinforce: the same without a cap (eq. 3);
* grpo: PPO's clipping at 0.2, mean over completions, by TRL;
* dapo: clipping at 0.2 and 0.28, mean over tokens, by TRL.

Every learning rate that is given is run for every method and every seed, and every run is in the raw results.

    python warm_start.py arithmetic-start
    python compare_methods.py arithmetic-start --out methods.jsonl --plot methods.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from minimax_plugin.cli.train import machine, versions

METHODS = ("cispo", "reinforce", "grpo", "dapo")
THRESHOLDS = (0.5, 0.7, 0.9)
UPDATES_PER_ROLLOUT = 16
COLOURS = {"cispo": "#0072B2", "reinforce": "#CC79A7", "grpo": "#E69F00", "dapo": "#009E73"}


def run(model: str, method: str, learning_rate: float, seed: int, updates: int, stop_at: float) -> dict[str, Any]:
    """One training run; the share of held-out problems solved after every rollout."""
    os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
    import torch
    from transformers import TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from minimax_plugin.cispo import CISPOConfig, CISPOTrainer
    from minimax_plugin.cispo.tasks import correctness_reward, make_dataset

    torch.set_num_threads(1)
    curve: list[tuple[int, float]] = []

    class Record(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            curve.append((state.global_step, metrics["eval_reward"]))
            control.should_training_stop |= metrics["eval_reward"] >= stop_at

    own = method in ("cispo", "reinforce")
    by_method: dict[str, dict[str, Any]] = {
        "cispo": {"epsilon_is_high": 4.0, "zero_variance": "keep", "repetition_stop_tokens": None},
        "reinforce": {"epsilon_is_high": float("inf"), "zero_variance": "keep", "repetition_stop_tokens": None},
        "grpo": {"loss_type": "grpo", "epsilon": 0.2},
        "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    }
    set_seed(seed)
    held_out = make_dataset("arithmetic", 512, seed=0, difficulty=2)
    train = make_dataset("arithmetic", 2000, seed=1, difficulty=2, exclude=held_out["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        config = (CISPOConfig if own else GRPOConfig)(
            folder,
            seed=seed,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=1e-15,
            cast_lm_head_to_fp32=True,
            router_aux_loss_coef=0.0,
            beta=0.0,
            per_device_train_batch_size=64,
            num_generations=8,
            steps_per_generation=UPDATES_PER_ROLLOUT,
            max_steps=updates,
            max_completion_length=5,
            eval_strategy="steps",
            eval_steps=UPDATES_PER_ROLLOUT,
            eval_on_start=True,
            per_device_eval_batch_size=256,
            num_generations_eval=1,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            **by_method[method],
        )
        trainer = (CISPOTrainer if own else GRPOTrainer)(
            model=model,
            reward_funcs=correctness_reward,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[Record()],
        )
        start = time.perf_counter()
        trainer.train()
    return {
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "updates": [step for step, _ in curve],
        "solved": [round(rate, 4) for _, rate in curve],
        "seconds": round(time.perf_counter() - start, 1),
    }


def steps_to(result: dict[str, Any], threshold: float) -> int | None:
    """First update after which at least ``threshold`` of the held-out problems is solved."""
    pairs = zip(result["updates"], result["solved"], strict=True)
    return next((step for step, rate in pairs if rate >= threshold), None)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each learning rate and method, median and range of the updates to each threshold."""
    lines = [
        "| learning rate | method | seeds | " + " | ".join(f"to {t:.0%}" for t in THRESHOLDS) + " | last |",
        "|---|---|---|" + "---|" * (len(THRESHOLDS) + 1),
    ]
    for rate in sorted({r["learning_rate"] for r in results}):
        for method in METHODS:
            rows = [r for r in results if (r["learning_rate"], r["method"]) == (rate, method)]
            if rows:
                cells = [_cell([steps_to(r, t) for r in rows]) for t in THRESHOLDS]
                last = sorted(r["solved"][-1] for r in rows)
                cells.append(f"{statistics.median(last):.2f} ({last[0]:.2f} to {last[-1]:.2f})")
                lines.append(f"| {rate:g} | {method} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: str) -> None:
    """Share solved over updates: thin lines are seeds, thick ones their median, a panel for each learning rate."""
    from matplotlib.figure import Figure

    rates = sorted({r["learning_rate"] for r in results})
    figure = Figure(figsize=(8 * len(rates), 7), dpi=150, layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False, sharey=True).flat, rates, strict=True):
        for method in METHODS:
            rows = [r for r in results if (r["learning_rate"], r["method"]) == (rate, method)]
            for row in rows:
                axes.plot(row["updates"], row["solved"], color=COLOURS[method], alpha=0.25, linewidth=1)
            steps = sorted({step for row in rows for step in row["updates"]})
            # A run that stopped because it was done keeps its last value.
            values = [statistics.median(_value_at(row, step) for row in rows) for step in steps]
            axes.plot(steps, values, color=COLOURS[method], linewidth=3, label=f"{method} ({len(rows)} seeds)")
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("updates (16 per rollout)")
        axes.set_ylabel("share of held-out problems solved")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def _cell(steps: Iterable[int | None]) -> str:
    steps = list(steps)
    reached = sorted(step for step in steps if step is not None)
    if not reached:
        return "–"
    span = f"{statistics.median_low(reached)} ({reached[0]} to {reached[-1]})"
    return span if len(reached) == len(steps) else f"{span}, {len(reached)} of {len(steps)}"


def _value_at(row: dict[str, Any], step: int) -> float:
    return [rate for at, rate in zip(row["updates"], row["solved"], strict=True) if at <= step][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory that warm_start.py wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--updates", type=int, default=640)
    parser.add_argument("--stop-at", type=float, default=0.95, help="end a run once this share is solved")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; runs that it has are not repeated")
    parser.add_argument("--plot", help="PNG to draw")
    args = parser.parse_args()
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    results = [json.loads(line) for line in lines]
    known = {(r["method"], r["learning_rate"], r["seed"]) for r in results if "method" in r}
    todo = [
        (method, rate, seed)
        for seed in args.seeds
        for rate in args.learning_rates
        for method in args.methods
        if (method, rate, seed) not in known
    ]
    with args.out.open("a", encoding="utf-8") as file:
        if not results:
            facts = {"machine": machine(), "versions": versions(), "jobs": args.jobs, "stop_at": args.stop_at}
            file.write(json.dumps(facts) + "\n")
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=None) as pool:
            futures = [pool.submit(run, args.model, *case, args.updates, args.stop_at) for case in todo]
            for number, future in enumerate(as_completed(futures), 1):
                result = future.result()
                results.append(result)
                file.write(json.dumps(result) + "\n")
                file.flush()
                steps = [steps_to(result, threshold) for threshold in THRESHOLDS]
                print(number, len(todo), result["method"], result["learning_rate"], result["seed"], steps, flush=True)
    runs = [result for result in results if "method" in result]
    print(table(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    sys.exit(main())
