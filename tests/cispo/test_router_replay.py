# SPDX-License-Identifier: Apache-2.0
"""Recording and replaying routes: exact for own routes, effective for others, whatever the layout of the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring_batches import TEMPERATURE, Batch, Result, make_batch, make_model, packed, relative, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimax_plugin.cispo.packing import ScoringOptions
from minimax_plugin.cispo.router_replay import RouterReplay, rollout_routes

NUM_EXPERTS = 4

LAYOUTS = {
    "trl": None,
    "padded": ScoringOptions(TEMPERATURE, chunk_tokens=16),
    "packed": packed(),
    "packed in rows": packed(30),
}


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def score(model: PreTrainedModel, batch: Batch, session: AbstractContextManager[Any] | None = None) -> Result:
    with session or nullcontext():
        return run(model, batch)


def record(model: PreTrainedModel, replay: RouterReplay, batch: Batch) -> Tensor:
    with torch.no_grad(), replay.recording() as recorded:
        model(**batch.arguments(), fused_lm_head=True)
    return torch.cat(recorded)


def others(routes: Tensor) -> Tensor:
    """Every token sent to the next experts."""
    return torch.where(routes >= 0, (routes + 1) % NUM_EXPERTS, routes)


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_routes_change_nothing_and_others_do(
    layout: str, checkpointing: str | None, batch: Batch, model_dirs: dict[str, Path]
) -> None:
    model = make_model(model_dirs["m1"], LAYOUTS[layout])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    expected = run(model, batch)
    replay = RouterReplay(model)
    routes = record(model, replay, batch)
    assert routes.shape == (6, 35, 4, 2)
    own, other, live = (
        score(model, batch, session) for session in (replay.replaying(routes), replay.replaying(others(routes)), None)
    )
    for result in (own, live):
        assert torch.equal(result.loss, expected.loss) and torch.equal(result.gradient, expected.gradient)
    assert (other.loss - expected.loss).abs() > 0.1
    assert relative(other.gradient, expected.gradient) > 0.1


def test_checkpointing_replays_what_the_forward_pass_did(batch: Batch, model_dirs: dict[str, Path]) -> None:
    """With routes that are not the model's own, and with calls between a forward pass and its backward pass."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(model_dirs["m1"], packed(30))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        replay = RouterReplay(model)
        routes = others(record(model, replay, batch))
        with replay.replaying(routes):
            output = model(**batch.arguments(), fused_lm_head=True)
        with torch.no_grad(), replay.replaying(others(routes)):
            model(**batch.arguments(), fused_lm_head=True)
        with torch.no_grad():
            model(**batch.arguments(), fused_lm_head=True)
        output.log_probs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative(gradients[1], gradients[0]) <= 1e-6


def test_weights_come_from_live_logits(batch: Batch, model_dirs: dict[str, Path]) -> None:
    """The experts stay, the router's gradient and its influence too: eq. of a softmax at the given experts."""
    model = make_model(model_dirs["m1"])
    replay = RouterReplay(model)
    routes = others(record(model, replay, batch))
    gate = model.model.layers[1].block_sparse_moe.gate
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    gate.register_forward_hook(lambda module, args, output: seen.append(output))
    score(model, batch, replay.replaying(routes))
    assert gate.weight.grad is not None and gate.weight.grad.abs().max() > 1e-6
    logits, weights, indices = seen[0]
    assert torch.equal(indices, routes[:, :, 1].flatten(0, 1).long())
    probs = logits.double().exp()
    expected = torch.stack([probs[i, row] / probs[i, row].sum() for i, row in enumerate(indices)])
    assert (weights - expected).abs().max() <= 1e-6
    with torch.no_grad():
        gate.weight.mul_(3.0)
    score(model, batch, replay.replaying(routes))
    assert torch.equal(seen[1][2], indices) and (seen[1][1] - weights).abs().max() > 1e-2


def test_layouts_share_routes(batch: Batch, model_dirs: dict[str, Path]) -> None:
    """Routes recorded from a padded batch replay in a packed one and the other way round."""
    tokens = batch.attention_mask.bool()
    models = {name: make_model(model_dirs["m1"], options) for name, options in LAYOUTS.items()}
    replays = {name: RouterReplay(model) for name, model in models.items()}
    routes = {name: record(model, replays[name], batch) for name, model in models.items()}
    live = tokens.clone()
    live[2] = False  # nothing is scored there, so packed passes leave it out
    for name in ("packed", "packed in rows"):
        assert torch.equal(routes[name][live], routes["trl"][live])
        assert (routes[name][~live] == -1).all()
    mixed = {name: score(models[name], batch, replays[name].replaying(others(routes["packed"]))) for name in models}
    for result in mixed.values():
        assert (result.log_probs - mixed["trl"].log_probs).abs().max() <= 1e-4
        assert relative(result.gradient, mixed["trl"].gradient) <= 1e-4


def test_chunks_of_a_batch_take_rows_in_order(batch: Batch, model_dirs: dict[str, Path]) -> None:
    for options in (None, packed(30)):
        model = make_model(model_dirs["m1"], options)
        replay = RouterReplay(model)
        routes = record(model, replay, batch)
        chunks = [slice(0, 4), slice(4, 6)]

        def run_chunks(model: PreTrainedModel = model, chunks: list[slice] = chunks) -> Tensor:
            parts = [{name: tensor[rows] for name, tensor in batch.arguments().items()} for rows in chunks]
            with torch.no_grad():
                return torch.cat([model(**part, fused_lm_head=True).log_probs for part in parts])

        with replay.recording() as recorded:
            run_chunks()
        assert len(recorded) == 2 and torch.equal(torch.cat(recorded), routes)
        with torch.no_grad(), replay.replaying(others(routes)):
            whole = model(**batch.arguments(), fused_lm_head=True).log_probs
        with replay.replaying(others(routes)):
            assert (run_chunks() - whole).abs().max() <= 1e-4


def test_tokens_without_a_route_choose_their_own(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["m1"])
    expected = run(model, batch)
    replay = RouterReplay(model)
    nothing = torch.full((6, 35, 4, 2), -1)
    assert torch.equal(score(model, batch, replay.replaying(nothing)).gradient, expected.gradient)
    assert replay.pop_counts().tolist() == [0, 0]
    routes = record(model, replay, batch)
    score(model, batch, replay.replaying(torch.where(torch.arange(35)[:, None, None] < 7, routes, nothing)))
    assert replay.pop_counts().tolist() == [0, 6 * 7 * 4]


def test_counts_of_what_was_rerouted_are_of_tokens_and_layers(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["m1"])
    replay = RouterReplay(model)
    routes = record(model, replay, batch)
    changed = routes.flip(-1)  # the same experts in another order
    changed[0, 30, 0] = torch.tensor([e for e in range(NUM_EXPERTS) if e not in routes[0, 30, 0]])[:2]
    with torch.no_grad(), replay.replaying(changed):
        model(**batch.arguments(), fused_lm_head=True)
    differing, compared = replay.pop_counts().tolist()
    assert compared == 6 * 35 * 4
    assert 1 <= differing <= 5 * 4  # later tokens and layers of that row may follow
    assert replay.pop_counts().tolist() == [0, 0]


class TestOtherModels:
    @pytest.fixture(params=[True, False], ids=["renormalised", "as they are"])
    def model(self, request: pytest.FixtureRequest) -> PreTrainedModel:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            mlp_only_layers=[1],
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            norm_topk_prob=request.param,
            initializer_range=0.3,
        )
        return Qwen3MoeForCausalLM(config)

    def test_qwen3_moe(self, model: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        model = make_model(tmp_path, packed())
        expected = run(model, batch)
        replay = RouterReplay(model, "mlp.gate")
        assert replay.layers == [0, 2]
        routes = record(model, replay, batch)
        own, other = (score(model, batch, replay.replaying(r)) for r in (routes, others(routes)))
        assert torch.equal(own.gradient, expected.gradient)
        assert relative(other.gradient, expected.gradient) > 0.1


def test_hooks_come_off(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["m1"])
    replay = RouterReplay(model)
    routes = record(model, replay, batch)
    replay.remove()
    with pytest.raises(ValueError, match="routes are of 6 rows, but the model ran 0"), replay.replaying(others(routes)):
        run(model, batch)


class TestRefusals:
    @pytest.fixture
    def model(self, model_dirs: dict[str, Path]) -> PreTrainedModel:
        return make_model(model_dirs["m1"])

    @pytest.fixture
    def routes(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        replay = RouterReplay(model)
        routes = record(model, replay, batch)
        replay.remove()
        return routes

    def replaying(self, model: PreTrainedModel, batch: Batch, routes: Tensor) -> None:
        with RouterReplay(model).replaying(routes):
            run(model, batch)

    def test_no_router(self, model_dirs: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match="no module whose name ends in 'block_sparse_moe.gate'.*router_replay"):
            RouterReplay(make_model(model_dirs["qwen3"]))

    def test_shapes(self, model: PreTrainedModel, batch: Batch, routes: Tensor) -> None:
        with pytest.raises(ValueError, match=r"shape \(6, 35, 3, 2\), expected \[rows, tokens, 4 routers"):
            self.replaying(model, batch, routes[:, :, :3])
        with pytest.raises(
            ValueError, match=r"routes are of \(6, 34\) rows and tokens, but the model runs rows 0 to 6"
        ):
            self.replaying(model, batch, routes[:, :34])
        with pytest.raises(ValueError, match=r"routes are of \(5, 35\) rows and tokens"):
            self.replaying(model, batch, routes[:5])

    def test_indices(self, model: PreTrainedModel, batch: Batch, routes: Tensor) -> None:
        with pytest.raises(ValueError, match="name the expert 4, but the model has 4"):
            self.replaying(model, batch, torch.where(routes == 3, 4, routes))
        with pytest.raises(ValueError, match="name an expert twice for one token"):
            self.replaying(model, batch, torch.zeros_like(routes))

    def test_router_of_another_kind(self, model: PreTrainedModel, batch: Batch, routes: Tensor) -> None:
        gate = model.model.layers[2].block_sparse_moe.gate
        handle = gate.register_forward_hook(lambda module, args, output: (output[0], output[1] * 0.5, output[2]))
        with pytest.raises(ValueError, match="layers.2.block_sparse_moe.gate does not weigh experts by a softmax"):
            replay = RouterReplay(model)
            gate._forward_hooks.move_to_end(handle.id, last=False)  # as if the module itself did so
            with replay.replaying(routes):
                run(model, batch)

    def test_router_that_returns_logits_only(self) -> None:
        replay = object.__new__(RouterReplay)
        replay._names = ["gate"]
        with pytest.raises(ValueError, match="router gate returns Tensor, expected the tuple"):
            replay._outputs(0, torch.zeros(1))

    def test_checkpointing_that_loses_routes(
        self, model: PreTrainedModel, batch: Batch, routes: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Recomputation by a wrapper of its own would silently use live routes."""
        layer_class = type(model.model.layers[0])
        forward = layer_class.forward

        def wrapped(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return checkpoint(forward, self, hidden_states, use_reentrant=False, **kwargs)

        monkeypatch.setattr(layer_class, "forward", wrapped)
        with pytest.raises(RuntimeError, match="a layer is recomputed without its replayed routes"):
            self.replaying(model, batch, routes)


class TestRolloutRoutes:
    def engine(self, lengths: list[int], missing: int) -> list[np.ndarray]:
        """Routes [tokens, 5 layers, 2] that tell sequence, token and layer apart."""
        return [
            np.array(
                [[[100 * row + token, layer] for layer in range(5)] for token in range(length - missing)], dtype="int16"
            )
            for row, length in enumerate(lengths)
        ]

    @pytest.mark.parametrize("missing", [0, 1])
    def test_lands_on_the_tokens(self, missing: int) -> None:
        mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
        routes = rollout_routes(self.engine([3, 5], missing), mask, [1, 4])
        assert routes.shape == (2, 5, 2, 2)
        assert routes[0, 1:3, :, 0].tolist() == [[0, 0], [1, 1]] and routes[1, 2, :, 0].tolist() == [102, 102]
        assert routes[0, 1, :, 1].tolist() == [1, 4]
        assert (routes[0, 3] == (-1 if missing else routes[0, 3])).all() and (routes[0, [0, 4]] == -1).all()
        assert bool((routes[1, 4] == -1).all()) == bool(missing)

    def test_a_masked_completion_takes_those_of_its_prompt(self) -> None:
        routes = rollout_routes(self.engine([4], 1), torch.tensor([[1, 1, 0, 0]]), [0])
        assert routes[0, :, 0, 0].tolist() == [0, 1, -1, -1]

    def test_missing_ones_are_refused(self) -> None:
        mask = torch.ones(1, 5)
        with pytest.raises(ValueError, match="routes of 3 tokens for sequence 0 of 5 tokens"):
            rollout_routes(self.engine([4], 1), mask, [0])
        with pytest.raises(ValueError, match="routes of 2 sequences, expected 1"):
            rollout_routes(self.engine([5, 5], 1), mask, [0])
