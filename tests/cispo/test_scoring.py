# SPDX-License-Identifier: Apache-2.0
"""Packing, the chunked head and router replay inside the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from minimax_plugin.cispo import CISPOConfig
from minimax_plugin.cispo.sampling import replace_rows
from minimax_plugin.cispo.scoring import ROUTES

MakeTrainer = Callable[..., Any]

#: Plain gradient descent, so that a difference of gradients is a difference of weights; four updates per rollout.
SEVERAL_UPDATES: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 4,
    "max_steps": 6,
}


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def weights_after(trainer: Any) -> dict[str, Tensor]:
    trainer.train()
    return weights(trainer)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((weight - second[name]).abs().max()) for name, weight in first.items())


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("model", ["ragged", "qwen3"])
def test_packed_updates_equal_padded_ones(model: str, make_trainer: MakeTrainer) -> None:
    """With TRL's head and padding, with the chunked head, packed, and packed into several rows."""
    stock = make_trainer(model, head_chunk_tokens=None, **SEVERAL_UPDATES)
    start = weights(stock)
    expected = weights_after(stock)
    assert distance(start, expected) > 1e-2
    for changes in (
        {"head_chunk_tokens": 5},
        {"pack_sequences": True},
        {"pack_sequences": True, "pack_max_tokens": 24},
    ):
        assert distance(weights_after(make_trainer(model, **changes, **SEVERAL_UPDATES)), expected) <= 1e-5


@pytest.mark.slow
def test_packed_with_truncated_completions_masked(make_trainer: MakeTrainer) -> None:
    """TRL then masks every token of a completion that did not end."""
    options = SEVERAL_UPDATES | {"mask_truncated_completions": True}
    expected = weights_after(make_trainer("ragged", **options))
    trainer = make_trainer("ragged", pack_sequences=True, **options)
    assert distance(weights_after(trainer), expected) <= 1e-5
    assert 0 < max(logged(trainer, "completions/clipped_ratio")) < 1


@pytest.mark.slow
def test_packed_reference_model_and_adapter(make_trainer: MakeTrainer) -> None:
    options = SEVERAL_UPDATES | {"beta": 0.1, "max_steps": 3}
    for adapter in (None, {"r": 4, "target_modules": ["q_proj", "out_proj"], "init_lora_weights": False}):
        results = []
        for pack in (False, True):
            torch.manual_seed(1)
            init = {"peft_config": LoraConfig(**adapter)} if adapter else {}
            trainer = make_trainer("ragged", pack_sequences=pack, init=init, **options)
            results.append((weights_after(trainer), logged(trainer, "kl")))
        assert distance(results[0][0], results[1][0]) <= 1e-5
        assert max(results[0][1]) > 1e-6 and results[1][1] == pytest.approx(results[0][1], abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"pack_sequences": True}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True, "pack_sequences": True, "pack_max_tokens": 24},
    ],
    ids=["padded", "packed", "checkpointed"],
)
def test_routes_of_the_old_policy_are_kept(
    changes: dict[str, Any], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """In every update on a rollout the experts are those of the pass before the first."""
    trainer = make_trainer("ragged", router_replay="train", **SEVERAL_UPDATES | changes)
    routed: list[Tensor] = []
    gate = trainer.model.model.layers[2].block_sparse_moe.gate
    score = trainer._score_batch

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        hook = gate.register_forward_hook(lambda module, args, output: routed.append(output[2]))
        result = score(model, inputs)
        hook.remove()
        tokens = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
        kept = inputs[ROUTES][:, :, 2][tokens] if trainer.args.pack_sequences else inputs[ROUTES][:, :, 2].flatten(0, 1)
        assert sorted(kept.tolist()) == sorted(torch.cat(routed).tolist())
        routed.clear()
        return result

    trainer._score_batch = watched
    with caplog.at_level(logging.INFO, "minimax_plugin.cispo.scoring"):
        replayed = weights_after(trainer)
    rerouted = logged(trainer, "router_replay/rerouted")
    assert rerouted[0] == 0.0 and max(rerouted) > 0.0
    assert logged(trainer, "router_replay/from_vllm") == [0.0] * 6
    assert caplog.text.count("tokens keep the experts of the old-policy pass") == 1
    free = weights_after(make_trainer("ragged", **SEVERAL_UPDATES | changes))
    assert distance(replayed, free) > 1e-5


@pytest.mark.slow
def test_replay_is_the_same_packed_and_padded(make_trainer: MakeTrainer) -> None:
    padded, packed = (
        weights_after(make_trainer("ragged", router_replay="train", pack_sequences=pack, **SEVERAL_UPDATES))
        for pack in (False, True)
    )
    assert distance(padded, packed) <= 1e-5


def test_nothing_is_replayed_with_one_update_per_rollout(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    options = SEVERAL_UPDATES | {"steps_per_generation": 1, "max_steps": 2}
    trainer = make_trainer("ragged", router_replay="train", **options)
    with caplog.at_level(logging.INFO, "minimax_plugin.cispo.scoring"):
        replayed = weights_after(trainer)
    assert "nothing to replay" in caplog.text and not logged(trainer, "router_replay/rerouted")
    assert distance(replayed, weights_after(make_trainer("ragged", **options))) == 0.0


@pytest.mark.slow
def test_routes_are_those_of_the_policy_not_of_the_reference(make_trainer: MakeTrainer) -> None:
    """With an adapter both are one model, which passes twice over a rollout."""
    init = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "out_proj"], init_lora_weights=False)}
    torch.manual_seed(1)
    trainer = make_trainer("ragged", router_replay="train", beta=0.1, init=init, **SEVERAL_UPDATES)
    trainer.train()
    assert logged(trainer, "router_replay/rerouted")[0] == 0.0
    assert max(logged(trainer, "kl")) > 1e-6


def test_refilled_rollouts_keep_their_routes(make_trainer: MakeTrainer) -> None:
    def reward(completion_ids: list[list[int]], number: list[int], **kwargs: Any) -> list[float]:
        return [len(set(ids)) if n % 2 else 0.0 for ids, n in zip(completion_ids, number, strict=True)]

    trainer = make_trainer(
        "ragged", router_replay="train", zero_variance="refill", reward=reward, pack_sequences=True, **SEVERAL_UPDATES
    )
    trainer.train()
    assert max(logged(trainer, "sampling/refill_rounds")) > 0
    rerouted = logged(trainer, "router_replay/rerouted")
    assert rerouted[0] == 0.0 and len(rerouted) >= 4


def test_routes_of_merged_rollouts_are_padded_with_none() -> None:
    def rollout(prompt: int, completion: int, value: int) -> dict[str, Any]:
        shape = (2, prompt + completion, 3, 2)
        ids = {"prompt_ids": torch.zeros(2, prompt).long(), "completion_ids": torch.zeros(2, completion).long()}
        return ids | {ROUTES: torch.full(shape, value, dtype=torch.int16)}

    merged = replace_rows(rollout(4, 2, 5), torch.tensor([1]), rollout(3, 5, 7), torch.tensor([0]), 0)[ROUTES]
    assert merged.shape == (2, 9, 3, 2)
    assert merged[0, :, 0, 0].tolist() == [5] * 6 + [-1] * 3
    assert merged[1, :, 0, 0].tolist() == [-1] + [7] * 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_chunk_tokens": 0}, "head_chunk_tokens is 0, expected at least 1, or None"),
        ({"pack_sequences": True, "pack_max_tokens": 0}, "pack_max_tokens is 0"),
        ({"pack_max_tokens": 100}, "pack_max_tokens is 100, but without pack_sequences"),
        ({"pack_sequences": True, "head_chunk_tokens": None}, "pack_sequences is True and head_chunk_tokens is None"),
        ({"router_replay": "sometimes"}, "router_replay is 'sometimes', expected one of 'off', 'train', 'rollout'"),
        ({"router_replay": "rollout"}, "router_replay is 'rollout', which takes routes from vLLM; set use_vllm=True"),
        ({"router_replay": "train", "importance_base": "sampler", "use_vllm": True}, "leaves that pass out"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CISPOConfig("out", use_cpu=True, bf16=False, **changes)


def test_a_model_without_routers(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="no module whose name ends in 'block_sparse_moe.gate'"):
        make_trainer("qwen3", router_replay="train")
