# SPDX-License-Identifier: Apache-2.0
"""Groups without variance and solved prompts: what is left out, what replaces it, and what does not move."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from minimax_plugin.cispo import sampling
from minimax_plugin.cispo.sampling import PromptPool, groups_that_fit, groups_to_draw, prompt_key, zero_variance_groups

MakeTrainer = Callable[..., Any]
NAN = math.nan


def parameters_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((weight - second[name]).abs().max()) for name, weight in first.items())


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def varied(numbers: Sequence[int], spread: Callable[[int], bool], value: float = 0.5) -> list[float]:
    """Rewards of completions in the order of the groups: they differ where ``spread(number of the prompt)``."""
    return [value + (0.1 * (i % 4) if spread(number) else 0.0) for i, number in enumerate(numbers)]


# Which groups


def test_groups_without_variance() -> None:
    one = torch.ones(1)
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [NAN, NAN, NAN], [NAN, 2.0, NAN], [NAN, 2.0, 1.0]])
    assert zero_variance_groups(rewards.view(-1, 1), one, 3).tolist() == [True, False, True, True, False]


def test_sums_that_round_differently_are_no_variance() -> None:
    parts = torch.tensor([[0.1, 0.6], [0.7, 0.0], [0.6, 0.1], [0.0, 0.7]])
    assert len(set(parts.sum(1).tolist())) > 1
    assert zero_variance_groups(parts, torch.ones(2), 4).tolist() == [True]
    assert zero_variance_groups(parts + torch.tensor([[1e-5], [0], [0], [0]]), torch.ones(2), 4).tolist() == [False]


def test_functions_on_their_own_or_summed() -> None:
    """Opposite rewards cancel in the sum, but not where each function is normalised first."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert zero_variance_groups(rewards, torch.ones(2), 2).tolist() == [True]
    assert zero_variance_groups(rewards, torch.ones(2), 2, each=True).tolist() == [False]
    assert zero_variance_groups(rewards, torch.tensor([1.0, 0.0]), 2).tolist() == [False]
    assert zero_variance_groups(rewards[:, [0, 0]] * 0, torch.tensor([1.0, 0.0]), 2, each=True).tolist() == [True]


def test_pass_rates() -> None:
    rewards = torch.tensor([[1.0, NAN], [0.7, 0.3], [0.9, NAN], [NAN, NAN]])
    assert sampling.pass_rates(rewards, torch.ones(2), 4, 1.0) == [0.5]
    assert sampling.pass_rates(rewards, torch.ones(2), 2, 0.8) == [1.0, 0.5]


# The pool


def rows_of(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(count)], "number": list(range(count))})


def test_the_stream_visits_every_prompt_once_per_turn() -> None:
    pool = PromptPool(rows_of(5), seed=3)
    numbers = [row["number"] for _ in range(3) for row in pool.draw(5)]
    assert [sorted(numbers[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert numbers[:5] != numbers[5:10]
    assert numbers == [row["number"] for row in PromptPool(rows_of(5), seed=3).draw(15)]


def test_the_stream_goes_on_where_it_was() -> None:
    pool = PromptPool(rows_of(7), seed=1)
    pool.draw(4)
    pool.retire([prompt_key({"prompt": "p2"})], [0.95], 0.9)
    state = pool.state_dict()
    expected = pool.draw(9)
    other = PromptPool(rows_of(7), seed=1)
    other.load_state_dict(state)
    assert other.draw(9) == expected
    assert all(row["number"] != 2 for row in expected)


def test_prompts_in_use_are_avoided_while_there_are_others() -> None:
    pool = PromptPool(rows_of(4), seed=0)
    avoid = [prompt_key({"prompt": f"p{i}"}) for i in (0, 1)]
    assert {row["number"] for row in pool.draw(2, avoid)} == {2, 3}
    assert len(pool.draw(3, [prompt_key({"prompt": f"p{i}"}) for i in range(4)])) == 3


def test_an_empty_pool_draws_nothing() -> None:
    pool = PromptPool(rows_of(3), seed=0)
    pool.retire([prompt_key({"prompt": f"p{i}"}) for i in range(3)], [1.0, 0.9, 0.9], 0.9)
    assert pool.draw(2) == []


def test_solved_prompts_are_replaced_alike_on_every_process() -> None:
    """Three groups of four over two processes of six rows: the second group lies on both."""
    rows = [{"prompt": f"p{i}", "number": i} for i in (0, 1, 2) for _ in range(4)]
    keys = [prompt_key(row) for row in rows]
    results = []
    for first in (0, 6):
        pool = PromptPool(rows_of(5), seed=0)
        pool.retire([prompt_key({"prompt": "p1"})], [1.0], 0.9)
        new, left = pool.replace_solved(rows[first : first + 6], keys, first, 4)
        assert left == 0
        results += [row["number"] for row in new]
    assert results[:4] == [0] * 4 and results[8:] == [2] * 4
    assert len(set(results[4:8])) == 1 and results[4] in (3, 4)


# Sharing rows out


def test_as_few_groups_as_can_be_shared_out() -> None:
    assert groups_to_draw(free_rows=12, num_generations=4, num_processes=1) == 3
    assert groups_to_draw(free_rows=12, num_generations=4, num_processes=2) == 3
    assert groups_to_draw(free_rows=12, num_generations=4, num_processes=8) == 4
    assert groups_to_draw(free_rows=5, num_generations=4, num_processes=3) == 3


def test_groups_take_free_rows_where_they_were_generated() -> None:
    assert groups_that_fit([True, False, True, True], [4], 2) == [True, False, True, False]
    # two groups on each of two processes; the second has room for one only
    assert groups_that_fit([True, True, True, True], [4, 2], 2) == [True, True, True, False]
    # three groups of two over two processes of three rows: the middle one needs a row on each
    assert groups_that_fit([False, True, True], [1, 2], 2) == [False, True, False]
    assert groups_that_fit([True, True, True], [2, 2], 2) == [True, False, True]


def test_rows_are_replaced_and_padded_on_their_side() -> None:
    def batch(prompt: int, completion: int, offset: int) -> dict[str, Any]:
        rows = torch.arange(3)[:, None] + offset
        return {
            "prompt_ids": rows.expand(3, prompt).clone(),
            "completion_ids": rows.expand(3, completion).clone(),
            "routes": rows.expand(3, prompt + completion)[..., None].expand(-1, -1, 2).clone(),
            "per_sequence": rows.float(),
            "advantages": rows[:, 0].float(),
            "num_items_in_batch": torch.tensor(5),
            "images": [offset, offset + 1, offset + 2],
        }

    merged = sampling.replace_rows(
        batch(2, 2, 1), torch.tensor([0, 2]), batch(1, 4, 11), torch.tensor([1, 0]), pad_token_id=99
    )
    assert merged["prompt_ids"].tolist() == [[99, 12], [2, 2], [99, 11]]
    assert merged["completion_ids"].tolist() == [[12] * 4, [2, 2, 99, 99], [11] * 4]
    assert merged["routes"][..., 0].tolist() == [[0] + [12] * 5, [2, 2, 2, 2, 0, 0], [0] + [11] * 5]
    assert merged["per_sequence"].tolist() == [[12.0], [2.0], [11.0]]
    assert merged["advantages"].tolist() == [12.0, 2.0, 11.0]
    assert merged["images"] == [12, 2, 11] and int(merged["num_items_in_batch"]) == 5


def test_what_cannot_be_merged_is_refused() -> None:
    ids = torch.zeros(2, 3)
    batch = {"prompt_ids": ids, "completion_ids": ids, "odd": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match="odd has 5 columns"):
        sampling.replace_rows(batch, torch.tensor([0]), dict(batch, odd=torch.zeros(2, 4)), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="differ in \\['odd'\\]"):
        sampling.replace_rows(
            batch, torch.tensor([0]), {"prompt_ids": ids, "completion_ids": ids}, torch.tensor([0]), 0
        )


# The trainer


def plain_gradient(model: Any, rollout: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Gradient of ``-Σ A log π / Σ tokens`` over some rows, from the model's logits: eq. 4 where every ratio is 1."""
    model.zero_grad()
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)[rows]
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)[rows]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, rollout["prompt_ids"].shape[1] - 1 : -1]
    completions, mask = rollout["completion_ids"][rows], rollout["completion_mask"][rows]
    log_probs = logits.float().log_softmax(-1).gather(2, completions[..., None])[..., 0]
    (-(rollout["advantages"][rows, None] * log_probs * mask).sum() / mask.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["drop", "keep"])
@pytest.mark.parametrize("model", ["ragged", "qwen3"])
def test_dropping_gives_the_gradient_of_the_rest(mode: str, model: str, make_trainer: MakeTrainer) -> None:
    """One step of plain gradient descent; two of four groups have no variance."""

    def reward(number: list[int], **kwargs: Any) -> list[float]:
        return varied(number, lambda n: n % 2 == 0)

    trainer = make_trainer(
        model,
        reward=reward,
        zero_variance=mode,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=16,
        max_steps=1,
        shuffle_dataset=False,
    )
    rollouts = []
    score = trainer._generate_and_score_completions

    def recorded(rows: Any) -> Any:
        rollouts.append(score(rows))
        return rollouts[-1]

    trainer._generate_and_score_completions = recorded
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    (rollout,) = rollouts
    assert int(rollout["kept"].sum()) == (8 if mode == "drop" else 16)
    trainer.model.load_state_dict(before)
    gradient = plain_gradient(trainer.model, rollout, rollout["kept"].nonzero().flatten())
    scale = max(float(g.abs().max()) for g in gradient.values())
    assert scale > 1e-3
    for name, expected in gradient.items():
        assert float((before[name] - after[name] - expected).abs().max()) <= 1e-5 * scale, name


def test_dropped_completions_are_not_computed(make_trainer: MakeTrainer) -> None:
    def reward(number: list[int], **kwargs: Any) -> list[float]:
        return varied(number, lambda n: n % 2 == 0)

    trainer = make_trainer(reward=reward, per_device_train_batch_size=16, max_steps=1, shuffle_dataset=False)
    rows = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    trainer.train()
    assert rows == [8]


@pytest.mark.parametrize("mode", ["drop", "refill", "keep"])
def test_a_batch_without_variance_moves_no_weight(
    mode: str, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """After two updates that gave AdamW momentum, and with weight decay: only "keep" moves on, as TRL does."""
    calls = 0

    def reward(number: list[int], trainer_state: Any, **kwargs: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return varied(number, lambda n: trainer_state.global_step < 2)

    trainer = make_trainer(
        reward=reward, zero_variance=mode, max_refill_rounds=3, weight_decay=0.1, router_aux_loss_coef=0.01, max_steps=4
    )
    snapshots = []

    class Snapshots(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            snapshots.append(parameters_of(trainer))

    trainer.add_callback(Snapshots())
    with caplog.at_level(logging.WARNING, logger="minimax_plugin.cispo"):
        trainer.train()
    assert distance(snapshots[0], snapshots[1]) > 1e-4
    if mode == "keep":
        assert distance(snapshots[1], snapshots[2]) > 1e-4
        return
    assert distance(snapshots[1], snapshots[3]) == 0.0
    assert logged(trainer, "cispo/skipped_updates") == [0.0, 0.0, 1.0, 1.0]
    assert logged(trainer, "sampling/zero_variance") == [0.0, 0.0, 1.0, 1.0]
    assert [record.message for record in caplog.records if "skipped" in record.message] == [
        f"Update {update} is skipped: no group has any variance in its rewards" for update in (3, 4)
    ]
    if mode == "refill":
        assert calls == 2 + 2 * (1 + 3), "each batch without variance is refilled three times, no more"
        assert logged(trainer, "sampling/refill_rounds") == [0.0, 0.0, 3.0, 3.0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_refilling_replaces_groups_without_variance(accumulation: int, make_trainer: MakeTrainer) -> None:
    """Half of the prompts never have variance. Every completion of the loss is of the others, none counts twice."""
    seen: list[int] = []

    def reward(number: list[int], **kwargs: Any) -> list[float]:
        seen.extend(number)
        return varied(number, lambda n: n >= 8)

    trainer = make_trainer(
        "ragged",
        reward=reward,
        zero_variance="refill",
        max_refill_rounds=10,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=2,
        max_steps=4 // accumulation,
    )
    texts = {trainer.train_dataset[i]["prompt"]: i for i in range(16)}
    batches = []
    compute = trainer._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        batches.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    assert any(number < 8 for number in seen), "nothing had to be replaced"
    for batch in batches:
        assert batch["kept"].all()
        prompts = trainer.processing_class.batch_decode(
            [ids[mask.bool()] for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        )
        assert all(texts[prompt] >= 8 for prompt in prompts)
        tokens = batch["completion_mask"].sum(-1)
        assert (tokens > 0).all() and (batch["advantages"] != 0).all()
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        total = sum((b["loss_weights"] * b["completion_mask"].sum(-1)).sum() for b in (first, second))
        assert float(total) == pytest.approx(1.0)


def test_solved_prompts_are_retired(make_trainer: MakeTrainer) -> None:
    """Prompts 0 to 3 are solved at once: seen in one rollout each, and replaced by others from then on."""
    generated: list[int] = []

    def reward(number: list[int], **kwargs: Any) -> list[float]:
        generated.extend(number)
        return [1.0 if n < 4 else 0.1 * (i % 4) for i, n in enumerate(number)]

    trainer = make_trainer(reward=reward, retire_solved_at=0.9, max_steps=16)
    trainer.train()
    assert all(generated.count(n) == 4 for n in range(4))
    assert len(generated) == 16 * 8
    assert trainer.prompt_pool.solved == {prompt_key(trainer.train_dataset[n]) for n in range(4)}
    assert logged(trainer, "sampling/solved_prompts")[-1] == 4.0


def test_training_ends_when_every_prompt_is_solved(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(
        reward=lambda completions, **kwargs: [1.0] * len(completions), retire_solved_at=1.0, max_steps=30
    )
    with caplog.at_level(logging.WARNING, logger="minimax_plugin.cispo"):
        trainer.train()
    assert 8 <= trainer.state.global_step <= 9
    assert "Every prompt of the dataset is solved" in caplog.text


def test_evaluation_keeps_every_completion(make_trainer: MakeTrainer, prompts: Dataset) -> None:
    trainer = make_trainer(
        reward=lambda completions, **kwargs: [1.0] * len(completions),
        per_device_eval_batch_size=8,
        init={"eval_dataset": prompts.select(range(4))},
    )
    logs = trainer.evaluate()
    assert logs["eval_sampling/zero_variance"] == 1.0 and logs["eval_cispo/ratio_mean"] == 1.0
