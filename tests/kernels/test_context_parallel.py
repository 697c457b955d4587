# SPDX-License-Identifier: Apache-2.0
"""Lightning attention over 2 and 4 gloo processes equals one process, forward and backward."""

from __future__ import annotations

from typing import Any

import context_parallel_worker as worker
import pytest
import torch
from recurrence import recurrence
from torch import Tensor

from minimax_plugin.kernels import ops
from minimax_plugin.kernels.context_parallel import context_parallel_lightning_attention

HEADS, DIM = 2, 16
SLOPES = torch.tensor([0.917, 4.95e-5])

#: Name, lengths on 2 ranks, lengths on 4 ranks, batch (None: [T, H, D]), dtype, with an initial state, the ranks whose
#: loss uses the final state.
CASES = [
    ("even", (70, 70), (35, 35, 35, 35), 2, torch.float32, False, "all"),
    ("uneven-initial-state", (129, 11), (1, 64, 10, 65), 2, torch.float32, True, "last"),
    ("an-empty-rank", (0, 66), (30, 0, 36, 0), None, torch.float32, True, "first"),
    ("bf16", (70, 30), (20, 50, 10, 20), 1, torch.bfloat16, True, "all"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], list[dict[str, Tensor | None]]]]:
    """(case, what each of its ranks gave), first those on 2 ranks, a group of the world of 4, then those on 4."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    cases = [make_case(case, ranks) for ranks in (2, worker.WORLD_SIZE) for case in CASES]
    torch.multiprocessing.spawn(worker.run, (str(folder / "rendezvous"), cases, str(folder)), nprocs=worker.WORLD_SIZE)
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(worker.WORLD_SIZE)]
    return [(case, [saved[rank][number] for rank in range(len(case["lengths"]))]) for number, case in enumerate(cases)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, *_ in CASES])
@pytest.mark.parametrize("ranks", [2, worker.WORLD_SIZE])
def test_equals_one_process(results: list[Any], ranks: int, case: int) -> None:
    check_case(*results[case if ranks == 2 else len(CASES) + case])


def make_case(case: tuple[Any, ...], ranks: int) -> dict[str, Any]:
    _, two, four, batch, dtype, with_initial, using_state = case
    lengths = two if ranks == 2 else four
    leading = () if batch is None else (batch,)
    q, k, v, grad_out = (torch.randn(*leading, sum(lengths), HEADS, DIM).to(dtype) for _ in range(4))
    state_shape = (*leading, HEADS, DIM, DIM)
    users = {"all": range(ranks), "first": [0], "last": [ranks - 1]}[using_state]
    return {
        "lengths": lengths,
        "q": q,
        "k": k,
        "v": v,
        "slopes": SLOPES,
        "initial_state": torch.randn(state_shape) if with_initial else None,
        "grad_out": grad_out.float(),
        "grad_states": {rank: torch.randn(state_shape) for rank in users},
    }


def check_case(case: dict[str, Any], parts: list[dict[str, Tensor | None]]) -> None:
    expected = in_float64(case)
    time = case["q"].dim() - 3
    exact = case["q"].dtype == torch.float32
    for key in ("out", "grad_q", "grad_k", "grad_v"):
        actual = torch.cat([x for part in parts if (x := part[key]) is not None], dim=time)
        assert_close(key, actual, expected[key], 1e-6 if exact else 3e-3)
    for key in ("state", "grad_initial_state"):
        for part in parts:
            if expected[key] is None:
                assert part[key] is None
            else:
                assert_close(key, part[key], expected[key], 1e-6 if exact or key == "state" else 3e-3)


def in_float64(case: dict[str, Any]) -> dict[str, Tensor | None]:
    """The whole sequence in one process by the recurrence, gradients by autograd."""
    names = [name for name in worker.NAMES if case[name] is not None]
    leaves = {name: case[name].double().requires_grad_() for name in names}
    batched = case["q"].dim() == 4
    rows = range(case["q"].shape[0]) if batched else [...]
    results = [
        recurrence(
            leaves["q"][row],
            leaves["k"][row],
            leaves["v"][row],
            SLOPES,
            leaves["initial_state"][row] if "initial_state" in leaves else None,
        )
        for row in rows
    ]
    out, state = (torch.stack(list(x)) if batched else x[0] for x in zip(*results, strict=True))
    ((out * case["grad_out"]).sum() + (state * sum(case["grad_states"].values())).sum()).backward()
    grads = {f"grad_{name}": leaves[name].grad if name in leaves else None for name in worker.NAMES}
    return {"out": out.detach(), "state": state.detach(), **grads}


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None and expected is not None, name
    error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e}, expected at most {tolerance:.0e}"


def test_combining_states_needs_no_host_lengths() -> None:
    states = torch.randn(3, HEADS, DIM, DIM)
    on_host = ops.combine_states(states, [5, 0, 70], SLOPES)
    assert torch.equal(ops.combine_states(states, torch.tensor([5, 0, 70], dtype=torch.int32), SLOPES), on_host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_state": torch.zeros(3, HEADS, DIM, DIM)}, "initial_state holds 3 states, expected 2"),
        ({"initial_state": torch.zeros(2, HEADS, DIM, DIM).half()}, r"initial_state is torch\.float16"),
        ({"initial_state": torch.zeros(2, HEADS, DIM, 8)}, r"initial_state has shape \(2, 2, 16, 8\)"),
        ({"k": torch.zeros(2, 4, HEADS, DIM)}, r"k is torch\.float32 \(2, 4, 2, 16\)"),
        ({"slopes": SLOPES[:1]}, r"slopes are torch\.float32 \(1,\)"),
        ({"precision": "exact"}, "precision is 'exact'"),
    ],
    ids=["states-of-another-batch", "state-dtype", "state-shape", "lengths", "slopes", "precision"],
)
def test_bad_input_is_named_before_any_collective(change: dict[str, Any], message: str) -> None:
    """Refused on one rank only, a call would leave the others waiting: no process group is needed to get here."""
    valid = {name: torch.zeros(2, 5, HEADS, DIM) for name in ("q", "k", "v")} | {"slopes": SLOPES}
    with pytest.raises(ValueError, match=message):
        context_parallel_lightning_attention(**valid | change)
