# SPDX-License-Identifier: Apache-2.0
"""The trainer as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from report_equations import DUAL, HIGH, LOW, Batch, report_loss
from torch import Tensor


@pytest.mark.parametrize("model", ["m1", "qwen3"])
def test_updates_move_weights(model: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(model)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], after[name]) for name in before)


class Scores:
    """Stands in for the model: gives log-probabilities that are leaves, by the first id of each completion."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.rows: list[int] = []

    def __call__(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        rows = input_ids[:, 0]
        self.rows += rows.tolist()
        return self.batch.log_probs[rows], torch.zeros_like(self.batch.log_probs[rows]), None


@pytest.mark.parametrize("kind", ["none", "ppo", "dual"])
@pytest.mark.parametrize("aggregation, mix", [("token", 0.0), ("sample", 0.0), ("prompt", 0.0), ("prompt", 0.4)])
def test_steps_add_up_to_the_reports_objective(
    kind: str, aggregation: str, mix: float, make_trainer: Callable[..., Any]
) -> None:
    """One rollout cut into eight steps of four updates: their mean is eq. 4 to 7 over all of it, gradient included."""
    batch = Batch.random(5, rows=24)
    trainer = make_trainer(
        "qwen3",
        per_device_train_batch_size=3,
        num_generations=2,
        steps_per_generation=8,
        gradient_accumulation_steps=2,
        epsilon_is_high=0.5,
        epsilon_is_low=0.4,
        token_mask=kind,
        dual_clip_ratio=DUAL if kind == "dual" else None,
        loss_aggregation=aggregation,
        sample_loss_weight=mix,
        **({} if kind == "none" else {"epsilon": LOW, "epsilon_high": HIGH}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    rows = torch.arange(24)
    rollout = trainer._weighted(
        {
            "prompt_ids": rows[:, None],
            "prompt_mask": torch.ones(24, 1, dtype=torch.long),
            "completion_ids": torch.zeros(24, 7, dtype=torch.long),
            "completion_mask": batch.mask.long(),
            "advantages": batch.advantages,
            "old_per_token_logps": batch.old,
            "kept": torch.tensor(batch.kept),
            "group": torch.tensor(batch.groups),
        }
    )
    rollout["loss_weights"] = rollout["loss_weights"].double()  # fp32 in training
    scores = trainer._get_per_token_logps_and_entropies = Scores(batch)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for step in order.split(3):
        loss = trainer._compute_loss(trainer.model, {name: entry[step] for name, entry in rollout.items()}) / 4
        loss.backward()
        total += loss.item()
    gradient, batch.log_probs.grad = batch.log_probs.grad, None
    expected = report_loss(batch, kind, 0.5, 0.4, aggregation, mix)
    assert total == pytest.approx(expected, abs=1e-6)
    assert gradient is not None and batch.log_probs.grad is not None
    assert float((gradient - batch.log_probs.grad).abs().max()) <= 1e-6
    assert set(scores.rows) >= {row for row in range(24) if batch.kept[row]}


def sampled(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout function: four random completions per prompt, and the log-probabilities of a uniform choice."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = torch.randint(2, 8, (len(prompts),), generator=generator).tolist()
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-math.log(247)] * length for length in lengths],
    }


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("base", ["sampler", "train"])
def test_the_samplers_probabilities_as_base(
    base: str, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sampler``: ratios are against the rollout's own log-probabilities, and nobody scores the old policy."""
    from trl import GRPOTrainer

    trainer = make_trainer(
        "qwen3", importance_base=base, steps_per_generation=2, max_steps=4, init={"rollout_func": sampled}
    )
    grads: list[bool] = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        grads.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    seen: list[tuple[dict[str, Any], float]] = []
    compute = trainer._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, inputs)
        seen.append((inputs, loss.item()))
        return loss

    trainer._compute_loss = recorded
    trainer.args.max_steps = 1
    start = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert grads.count(False) == (0 if base == "sampler" else 1), "passes over the old policy"
    inputs, loss = seen[0]
    trainer.model.load_state_dict(start)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits
    new = logits[:, inputs["prompt_ids"].shape[1] - 1 : -1].float().log_softmax(-1)
    new = new.gather(2, inputs["completion_ids"][..., None])[..., 0]
    old = torch.full_like(new, -math.log(247)) if base == "sampler" else new
    weights = (new - old).exp().clamp(max=5.0) * inputs["advantages"][:, None] * inputs["loss_weights"][:, None]
    expected = -(weights * new * inputs["completion_mask"]).sum() * 2  # two steps per generation
    assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    logs = trainer.state.log_history[0]
    assert (logs["cispo/ratio_max"] > 2) == (base == "sampler")
    assert "rollout/prob_pearson" in logs or math.isnan(trainer.rollout_statistics["prob_pearson"])
    assert logs["rollout/logp_diff_max"] > 0.5


def test_without_log_probabilities_the_sampler_is_no_base(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="importance_base is 'sampler'.*use_vllm=True"):
        make_trainer(importance_base="sampler")


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_mismatch_is_logged_and_plotted(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Rollouts at updates 0, 2, 4 and 6; a plot at the first one at or after each multiple of 3."""
    trainer = make_trainer(
        "qwen3", steps_per_generation=2, max_steps=8, mismatch_plot_steps=3, init={"rollout_func": sampled}
    )
    trainer.train()
    steps = [int(file.stem.removeprefix("step-")) for file in sorted((tmp_path / "out" / "mismatch").iterdir())]
    assert steps == [0, 4, 6]
    assert len([entry for entry in trainer.state.log_history if "rollout/logp_diff_p99" in entry]) == 4
    assert trainer.rollout_statistics["perplexity"] > 1.0


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_every_rollout_has_perplexity_and_length(steps_per_generation: int, make_trainer: Callable[..., Any]) -> None:
    """With an old-policy pass and without one, where the loss itself is the first to score the completions."""
    trainer = make_trainer("ragged", steps_per_generation=steps_per_generation, max_steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "length/p99" in entry]
    assert len(logs) == 4 // steps_per_generation
    for entry in logs:
        assert 1.0 < entry["rollout/perplexity"] < 320 and 1 <= entry["length/p99"] <= 8
