# SPDX-License-Identifier: Apache-2.0
"""Packed scoring against TRL's padded scoring, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_batches import LENGTHS, TEMPERATURE, Batch, Result, make_batch, make_model, packed, relative, run
from transformers import AutoConfig, AutoModelForCausalLM

from minimax_plugin.cispo.packing import PackedRow, ScoringOptions, check_packing, install_scoring, pack_batch

MODELS = ["m1", "qwen3"]
LOG_PROB_BOUND = 1e-4
GRADIENT_BOUND = 1e-4


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def assert_same(actual: Result, expected: Result) -> None:
    assert (actual.log_probs - expected.log_probs).abs().max() <= LOG_PROB_BOUND
    assert (actual.entropy - expected.entropy).abs().max() <= LOG_PROB_BOUND
    assert relative(actual.gradient, expected.gradient) <= GRADIENT_BOUND


@pytest.mark.parametrize("options", [packed(), packed(30), packed(1), ScoringOptions(TEMPERATURE, chunk_tokens=7)])
@pytest.mark.parametrize("model", MODELS)
def test_equals_padded_scoring_of_trl(
    model: str, options: ScoringOptions, batch: Batch, model_dirs: dict[str, Path]
) -> None:
    expected = run(make_model(model_dirs[model]), batch)
    assert expected.log_probs.abs().max() > 1
    assert_same(run(make_model(model_dirs[model], options), batch), expected)


@pytest.mark.parametrize("model", MODELS)
def test_equals_each_sequence_alone(model: str, batch: Batch, model_dirs: dict[str, Path]) -> None:
    """By the model's own logits, without padding, labels or any head but its own."""
    scored = run(make_model(model_dirs[model], packed()), batch).log_probs
    alone = AutoModelForCausalLM.from_pretrained(model_dirs[model], dtype=torch.float32).eval()
    for row, (_, length) in enumerate(LENGTHS):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        with torch.no_grad():
            logits = alone(input_ids=ids[None]).logits[0].double() / TEMPERATURE
        log_probs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).squeeze(1)
        assert torch.allclose(scored[row, :length].double(), log_probs[len(ids) - 1 - length :], atol=LOG_PROB_BOUND)
        assert not scored[row, length:].any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_keep_sequences_apart(
    attention: str, batch: Batch, model_dirs: dict[str, Path]
) -> None:
    results = [
        run(make_model(model_dirs["qwen3"], options, attn_implementation=attention), batch)
        for options in (None, packed())
    ]
    assert_same(results[1], results[0])


def test_a_masked_row_scores_zero(batch: Batch, model_dirs: dict[str, Path]) -> None:
    """A completion, a whole row, and then every row of which nothing is left."""
    result = run(make_model(model_dirs["m1"], packed()), batch)
    assert not result.log_probs[2].any() and result.gradient.isfinite().all()
    batch.attention_mask[4] = 0
    batch.labels[4] = -100
    result = run(make_model(model_dirs["m1"], packed()), batch)
    assert not result.log_probs[4].any() and result.gradient.isfinite().all() and result.log_probs[0].all()
    for mask in (batch.attention_mask.clone(), torch.zeros_like(batch.attention_mask)):
        mask[:, -batch.completion :] = 0
        empty = Batch(batch.input_ids, mask, torch.full_like(batch.labels, -100), batch.completion)
        for bound in (None, 8):
            result = run(make_model(model_dirs["m1"], packed(bound)), empty)
            assert not result.log_probs.any() and not result.gradient.any()


def test_no_padding_reaches_the_backbone(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["qwen3"], packed())
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run(model, batch)
    scored_rows = [row for row, (_, length) in enumerate(LENGTHS) if length]
    kept = batch.input_ids[scored_rows][batch.attention_mask[scored_rows].bool()]
    (call,) = (kwargs for kwargs in seen if kwargs["input_ids"].shape[1] != 16)  # without those of check_packing
    assert torch.equal(call["input_ids"], kept[None])
    assert call.get("attention_mask") is None


def test_gradient_checkpointing(batch: Batch, model_dirs: dict[str, Path]) -> None:
    plain, checkpointed = (make_model(model_dirs["m1"], packed(30)) for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, actual = run(plain, batch), run(checkpointed, batch)
    assert torch.equal(actual.log_probs, expected.log_probs)
    assert relative(actual.gradient, expected.gradient) <= 1e-6


@pytest.mark.parametrize("options", [packed(), packed(30), ScoringOptions(TEMPERATURE)])
def test_load_balancing_loss_sees_the_same_tokens(
    options: ScoringOptions, batch: Batch, model_dirs: dict[str, Path]
) -> None:
    expected, actual = (
        run(make_model(model_dirs["m1"], choice), batch, output_router_logits=True) for choice in (None, options)
    )
    assert expected.aux_loss is not None and actual.aux_loss is not None
    assert (actual.aux_loss - expected.aux_loss).abs() <= 1e-5  # about 2, the experts per token
    assert relative(actual.gradient, expected.gradient) <= GRADIENT_BOUND


def test_other_calls_are_the_models_own(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["qwen3"], packed()).eval()
    plain = AutoModelForCausalLM.from_pretrained(model_dirs["qwen3"], dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        prompt = {name: tensor[:, : -batch.completion] for name, tensor in inputs.items()}
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))


class TestPackBatch:
    def pack(self, batch: Batch, *args: Any, **kwargs: Any) -> list[PackedRow]:
        return pack_batch(batch.attention_mask, batch.labels[:, 1:] != -100, *args, **kwargs)

    def test_every_token_once(self, batch: Batch) -> None:
        for bound in (None, 1, 24, 35, 60, 1000):
            for keep in (False, True):
                rows = self.pack(batch, bound, keep_unscored=keep)
                places = torch.cat([row.token_index for row in rows]).sort().values
                wanted = batch.attention_mask.bool().clone()
                wanted[2] &= keep
                assert torch.equal(places, wanted.flatten().nonzero().squeeze(1))
                assert [row.last for row in rows] == [False] * (len(rows) - 1) + [True]
                assert not any(row.idle for row in rows)

    def test_rows_stay_within_the_bound(self, batch: Batch) -> None:
        sizes = [row.token_index.numel() for row in self.pack(batch, 36)]
        assert max(sizes) <= 36 and sum(sizes) == 35 + 4 + 22 + 19 + 3
        assert len(sizes) == 3  # 83 tokens: 35, 22 + 4 + 3 and 19 do not fit into two
        assert sorted(row.token_index.numel() for row in self.pack(batch, 5)) == [3, 4, 19, 22, 35]

    def test_positions_start_anew(self, batch: Batch) -> None:
        (row,) = self.pack(batch)
        expected = [position for length in (35, 4, 22, 19, 3) for position in range(length)]
        assert row.position_ids.tolist() == [expected]

    def test_a_token_that_nothing_predicts(self) -> None:
        batch = make_batch(((3, 2), (0, 2)))
        with pytest.raises(ValueError, match="row 1 of the batch has a completion token without a token before it"):
            self.pack(batch)


class TestCheckPacking:
    def small(self, family: str, **changes: Any) -> Any:
        sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **changes))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("model", MODELS)
    def test_accepts(self, model: str, dtype: torch.dtype, model_dirs: dict[str, Path]) -> None:
        check_packing(AutoModelForCausalLM.from_pretrained(model_dirs[model], dtype=dtype).model)

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("minimax", {"num_local_experts": 2, "block_size": 8}),  # transformers' own, whose states run through
            ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),  # likewise
            ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),  # takes positions from the mask
        ],
    )
    def test_refuses_models_that_mix_sequences(self, family: str, changes: dict[str, Any]) -> None:
        model = self.small(family, **changes).train()
        with pytest.raises(ValueError, match="does not keep packed sequences apart.*set pack_sequences to False"):
            check_packing(model.base_model)
        assert model.base_model.training

    def test_scoring_runs_it(self, batch: Batch) -> None:
        model = self.small("minimax", num_local_experts=2, block_size=8)
        install_scoring(model, packed())
        batch = batch._replace(input_ids=batch.input_ids % 100, labels=batch.labels.clamp(max=99))
        with pytest.raises(ValueError, match="does not keep packed sequences apart"):
            run(model, batch)


def test_refusals(batch: Batch, model_dirs: dict[str, Path]) -> None:
    model = make_model(model_dirs["qwen3"], packed())
    with pytest.raises(ValueError, match=r"packs text only, got the inputs \['pixel_values'\]"):
        run(model, batch, pixel_values=torch.zeros(1))
    with pytest.raises(ValueError, match="pack_max_tokens is 0"):
        install_scoring(model, packed(0))
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="scales or caps its logits.*logit_scale.*set head_chunk_tokens to None"):
        install_scoring(model, packed())
    model = make_model(model_dirs["qwen3"], packed())
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        run(model, batch)
