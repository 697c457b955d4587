# SPDX-License-Identifier: Apache-2.0
"""Training: gradients of the whole model against the oracle, checkpointing, load balancing, adapters, the Trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import load_fp32, make_pair, random_ids, relative_error
from oracle import Oracle, tiny_config, write_checkpoint
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.layers import MiniMaxM1Experts, MiniMaxM1SparseMoeBlock

LINEARS = ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]


def named_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def oracle_gradients(oracle: Oracle, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss of the next-token prediction and its gradients by original names, float64."""
    oracle.weights = {name: weight.requires_grad_() for name, weight in oracle.weights.items()}
    logits = torch.stack([oracle(row.tolist()).logits for row in ids])
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: w.grad for name, w in oracle.weights.items() if w.grad is not None}


@pytest.mark.parametrize("shared", [0, 24], ids=["routed", "shared-expert"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_gradients_match_the_oracle(tmp_path: Path, experts: str, shared: int) -> None:
    model, oracle = make_pair(tmp_path, shared_intermediate_size=shared)
    model.set_experts_implementation(experts)
    ids = random_ids(2, 70)
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    loss, expected = oracle_gradients(oracle, ids)
    assert math.isclose(output.loss.item(), loss, rel_tol=1e-5)
    actual = named_gradients(model)
    compared = 0
    for name, gradient in actual.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            reference = torch.stack(
                [torch.cat([expected[f"{stem}{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(len(gradient))]
            )
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            reference = torch.stack([expected[f"{stem}{e}.w2.weight"] for e in range(len(gradient))])
        else:
            reference = expected[name]
        assert relative_error(gradient, reference) <= 2e-4, name
        compared += 1
    assert compared == len(list(model.parameters()))


def test_trains_after_inference_mode(tmp_path: Path) -> None:
    """Nothing made under inference mode may be kept for a later backward."""
    model = load_fp32(write_checkpoint(tmp_path, tiny_config()))
    ids = random_ids(1, 9)
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert len(named_gradients(model)) == len(list(model.parameters()))


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    model = load_fp32(write_checkpoint(tmp_path, tiny_config())).train()
    ids = random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    expected = {name: gradient.clone() for name, gradient in named_gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    for layer_idx, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, layer_idx=layer_idx: calls.append(layer_idx))
    model(ids, labels=ids).loss.backward()
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]  # Run again, last to first.
    for name, gradient in named_gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_load_balancing_loss_is_added(tmp_path: Path) -> None:
    model = load_fp32(write_checkpoint(tmp_path, tiny_config(router_aux_loss_coef=0.5))).train()
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    plain = model(ids, attention_mask=mask, labels=ids).loss
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == 4
    assert torch.allclose(output.loss, plain + 0.5 * output.aux_loss)
    output.loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in named_gradients(model).values())


def test_load_balancing_loss_counts_tokens_only(tmp_path: Path) -> None:
    """The number of experts times the share of tokens sent to each, times its mean probability, summed.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, with every one of the top experts counted, over the tokens
    of all layers together; the oracle runs each row without its padding.
    """
    model, oracle = make_pair(tmp_path)
    ids, mask = random_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :25], mask[1, 31:] = 0, 0
    ids[mask == 0] = 17
    routers = [oracle(row[kept.bool()].tolist()).router_logits for row, kept in zip(ids, mask, strict=True)]

    def expected(*logits: Tensor) -> float:
        probabilities = torch.cat([layers.flatten(0, 1) for layers in logits]).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
        return float(4 * (chosen.mean(0) * probabilities.mean(0)).sum())

    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_router_logits=True)
        assert output.aux_loss.item() == pytest.approx(expected(*routers), rel=1e-5)
        # Padding sent to the experts of token 17 would count for a third of the tokens.
        ignored = [torch.stack(output.router_logits)]
        assert abs(expected(*ignored) - output.aux_loss.item()) > 0.01
        # A mask covers the cached tokens too, the loss is that of the new ones.
        cache = model(ids[:, :28], attention_mask=mask[:, :28]).past_key_values
        output = model(ids[:, 28:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
        new = [logits[:, int(kept[:28].sum()) :] for logits, kept in zip(routers, mask, strict=True)]
        assert output.aux_loss.item() == pytest.approx(expected(*new), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_only_while_training(tmp_path: Path, attention: str) -> None:
    config = tiny_config(attention_dropout=0.3, attn_type_list=[0, 1], num_hidden_layers=2)
    model = load_fp32(write_checkpoint(tmp_path, config), attn_implementation=attention)
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids).logits, expected)
        output = model.train()(ids, output_attentions=attention == "eager")
        assert not torch.equal(output.logits, expected)
        if attention == "eager":
            visible = output.attentions[0][..., torch.ones(40, 40).tril().bool()]
            assert (visible == 0).double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_router_noise_only_while_training(tmp_path: Path) -> None:
    model = load_fp32(write_checkpoint(tmp_path, tiny_config(router_jitter_noise=0.1)))
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_router_noise_is_a_factor_around_one() -> None:
    """Of what router and experts see alike, drawn anew for every value, as in Switch Transformers' own code."""
    block = MiniMaxM1SparseMoeBlock(MiniMaxM1Config(**tiny_config(router_jitter_noise=0.1))).train()
    torch.nn.init.normal_(block.gate.weight)
    seen: list[Tensor] = []
    block.gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 200, 48)
    block(x)
    assert len(seen) == 2 and torch.equal(*seen)
    factor = seen[0] / x.flatten(0, 1)
    assert 0.9 - 1e-6 <= factor.min() <= 0.91 and 1.09 <= factor.max() <= 1.1 + 1e-6
    assert abs(factor.mean() - 1) <= 0.003


def test_experts_of_other_ranks_add_nothing() -> None:
    """Under expert parallelism the index behind the last local expert stands for all that are elsewhere."""
    config = MiniMaxM1Config(**tiny_config())
    config._experts_implementation = "eager"
    experts = MiniMaxM1Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, weights = torch.randn(3, 48), torch.rand(3, 2)
    indices = torch.tensor([[0, 4], [4, 4], [3, 1]])
    expected = torch.zeros(3, 48, dtype=torch.float64)
    for token, place in [(0, 0), (2, 0), (2, 1)]:
        expert = indices[token, place]
        gate, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
        output = experts.down_proj[expert].double() @ (gate * gate.sigmoid() * up)
        expected[token] += weights[token, place].double() * output
    with torch.no_grad():
        torch.testing.assert_close(experts(x, indices, weights).double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_bf16_training_step_is_finite(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, tiny_config()), dtype=torch.bfloat16)
    ids = random_ids(2, 40)
    loss = model.train()(ids, labels=ids, output_router_logits=True).loss
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in named_gradients(model).values())
    assert model.model.layers[0].block_sparse_moe.gate.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": LINEARS}, {"target_modules": [], "target_parameters": EXPERTS}],
    ids=["linears", "experts"],
)
def test_adapter_trains_reloads_and_merges(tmp_path: Path, targets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    path = write_checkpoint(tmp_path / "base", tiny_config())
    ids = random_ids(1, 30)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **targets)
    model = peft.get_peft_model(load_fp32(path), config).train()
    base = load_fp32(path)(ids).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert (expected - base).abs().max() > 0.1
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load_fp32(path), tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected)
        merged = model.merge_and_unload()
        assert (merged(ids).logits - expected).abs().max() <= 1e-3
        merged.save_pretrained(tmp_path / "merged")
        assert (load_fp32(tmp_path / "merged")(ids).logits - expected).abs().max() <= 1e-3


def test_trainer_overfits(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = load_fp32(write_checkpoint(tmp_path / "model", tiny_config()))
    ids = random_ids(4, 24)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(load_fp32(tmp_path / "saved")(ids).logits, model.eval()(ids).logits)
