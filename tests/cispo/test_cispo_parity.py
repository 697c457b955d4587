# SPDX-License-Identifier: Apache-2.0
"""The trainer beside TRL's own: where both mean the same, both do the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from minimax_plugin.cispo import CISPOTrainer

#: What TRL's trainer has to be told so that it runs the report's objective with a cap of 5.
TRL_CISPO: dict[str, Any] = {
    "loss_type": "cispo",
    "epsilon_high": 5.0,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-15,
    "cast_lm_head_to_fp32": True,
    "router_aux_loss_coef": 0.0,
}

MakeTrainer = Callable[..., Any]


def weights_after(trainer: Any) -> dict[str, Tensor]:
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((weight - second[name]).abs().max()) for name, weight in first.items())


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "accumulation, steps_per_generation",
    [
        pair if pair in {(1, 1), (2, 4), (4, 16)} else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product([1, 2, 4], [1, 4, 16])
    ],
)
def test_cap_5_is_trls_cispo(accumulation: int, steps_per_generation: int, make_trainer: MakeTrainer) -> None:
    """Plain gradient descent, so that a difference of gradients is a difference of weights."""
    shared: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.3 * accumulation,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": steps_per_generation,
        "max_steps": max(3, steps_per_generation // accumulation + 1),
    }
    theirs = make_trainer("ragged", trainer_class=GRPOTrainer, **TRL_CISPO, **shared)
    start = {name: weight.detach().clone() for name, weight in theirs.model.named_parameters()}
    expected = weights_after(theirs)
    # With TRL's head, whose sums round in another order than the chunked one's: the ratios multiply that up.
    ours = make_trainer("ragged", zero_variance="keep", head_chunk_tokens=None, **shared)
    assert distance(weights_after(ours), expected) <= 1e-6
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-5)
    assert distance(start, expected) > 1e-2, "weights hardly moved: the comparison shows little"
    assert logged(ours, "completions/min_length") < logged(ours, "completions/max_length"), "all lengths are equal"
    if steps_per_generation > accumulation:
        assert max(logged(ours, "cispo/ratio_max")) > 5.0, "no ratio reached the cap"
        assert max(logged(ours, "cispo/clamped_pos") + logged(ours, "cispo/clamped_neg")) > 0.0


@pytest.mark.parametrize("model", ["ragged", "qwen3"])
def test_one_update_per_rollout_is_dapo(model: str, make_trainer: MakeTrainer) -> None:
    """All ratios are 1, so clipping of any kind does nothing; 8 updates with AdamW."""
    shared = {"max_steps": 8, "learning_rate": 1e-3}
    expected = weights_after(
        make_trainer(
            model, trainer_class=GRPOTrainer, **TRL_CISPO | {"loss_type": "dapo", "epsilon_high": 0.28}, **shared
        )
    )
    ours = make_trainer(model, zero_variance="keep", **shared)
    assert distance(weights_after(ours), expected) <= 1e-5
    assert set(logged(ours, "cispo/ratio_max")) == {1.0}


def test_ppo_mask_without_cap_is_dapo_off_policy_too(make_trainer: MakeTrainer) -> None:
    shared: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 8,
        "max_steps": 9,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
    }
    dapo = make_trainer("ragged", trainer_class=GRPOTrainer, **TRL_CISPO | {"loss_type": "dapo"} | shared)
    expected = weights_after(dapo)
    ours = make_trainer(
        "ragged", zero_variance="keep", head_chunk_tokens=None, token_mask="ppo", epsilon_is_high=float("inf"), **shared
    )
    assert distance(weights_after(ours), expected) <= 1e-6
    assert max(logged(ours, "cispo/masked")) > 0.05, "the mask had nothing to do"
    assert logged(ours, "cispo/masked") == pytest.approx(logged(dapo, "clip_ratio/region_mean"), abs=1e-6)


def stub_inputs(trainer: Any, rows: int = 8, tokens: int = 6) -> dict[str, Tensor]:
    """One step's rollout with every entry that TRL's loss reads, drawn at random."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    lengths = torch.tensor([6, 1, 4, 5, 2, 6, 3, 6])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    tool_mask = (uniform(rows, tokens) > 0.2).long()
    ids = torch.randint(3, 300, (rows, 4 + tokens), generator=generator)
    sampling = -6 * uniform(rows, tokens)
    sampling[0, 1] = float("nan")  # a token that vLLM gave no probability
    used = int((mask * tool_mask).sum())
    return {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(rows, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": 2 * uniform(rows) - 1,
        "old_per_token_logps": -6 * uniform(rows, tokens),
        "sampling_per_token_logps": sampling,
        "ref_per_token_logps": -6 * uniform(rows, tokens),
        "importance_sampling_ratio": 2 * uniform(rows, tokens),
        "num_items_in_batch": torch.tensor(used),
        "kept": torch.ones(rows, dtype=torch.bool),
        "loss_weights": torch.full((rows,), 1 / used),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": True},
        {"top_entropy_quantile": 0.3},
        {"off_policy_mask_threshold": 0.5},
        {"entropy_coef": 0.2},
        {"entropy_coef": 0.2, "top_entropy_quantile": 0.3, "beta": 0.1},
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 5.0, "entropy_coef_delta": 0.05},
        {"router_aux_loss_coef": 0.5},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("use_vllm", [False, True], ids=["", "vllm"])
def test_trls_additions_to_the_loss(options: dict[str, Any], use_vllm: bool, make_trainer: MakeTrainer) -> None:
    """TRL's method and ours, one after the other on the same trainer, model and rollout; twice for what adapts."""
    trainer = make_trainer(zero_variance="keep", steps_per_generation=4, **options)
    trainer.use_vllm = use_vllm  # its only part in the loss: importance_sampling_ratio is multiplied in
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = stub_inputs(trainer)
    if not use_vllm:
        del inputs["importance_sampling_ratio"], inputs["sampling_per_token_logps"]
    results = []
    for method in (GRPOTrainer._compute_loss, CISPOTrainer._compute_loss):
        trainer.epsilon_high = 5.0  # the cap in TRL's notation; without a mask ours has no use for it
        trainer.entropy_coef = options.get("entropy_coef", 0.0)
        trainer._last_world_entropy = float("inf")
        for _ in range(2):
            trainer.model.zero_grad()
            loss = method(trainer, trainer.model, inputs)
            loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        logged = {name: values[-2:] for name, values in trainer._metrics["train"].items()}
        state = (trainer.entropy_coef, trainer._last_world_entropy)
        results.append(
            (loss.item(), gradients, {name: logged.get(name) for name in ("kl", "entropy", "aux_loss")}, state)
        )
        trainer._metrics["train"].clear()
    (loss, gradients, metrics, state), (our_loss, our_gradients, our_metrics, our_state) = results
    assert our_loss == pytest.approx(loss, abs=1e-6)
    assert len(gradients) == len(our_gradients)
    scale = max(float(g.abs().max()) for g in gradients)
    assert max(float((a - b).abs().max()) for a, b in zip(gradients, our_gradients, strict=True)) <= 1e-6 * scale
    assert our_state == pytest.approx(state)
    for name, values in metrics.items():
        assert our_metrics[name] == (None if values is None else pytest.approx(values, rel=1e-5)), name
