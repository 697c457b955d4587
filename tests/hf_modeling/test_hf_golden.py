# SPDX-License-Identifier: Apache-2.0
"""The model against the results of the original implementation."""

from pathlib import Path

import pytest
import torch
from goldens import TEXT01, golden_cases, load_golden, stored
from hf_helpers import load_fp32, relative_error, states_of
from transformers import AutoModelForCausalLM


@golden_cases()
def test_fp32_reproduces_golden(case: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for batch in load_golden(case):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        tokens = batch["attention_mask"].bool()
        with torch.no_grad():
            output = model.eval()(**inputs, output_hidden_states=True, output_router_logits=True)
        # Stored whole, or for the last eight positions; a row may begin with padding.
        logits, hidden = stored(batch, "logits"), stored(batch, "hidden_states")
        last = logits.shape[1]
        assert (output.logits[:, -last:] - logits)[tokens[:, -last:]].abs().max() <= 1e-3
        last = hidden.shape[2]
        difference = torch.stack(output.hidden_states)[:, :, -last:] - hidden
        assert difference[:, tokens[:, -last:]].abs().max() <= 1e-3
        states = {f"state.{layer}": state for layer, state in states_of(output.past_key_values).items()}
        assert states.keys() == {key for key in batch if key.startswith("state.")} != set()
        for key, state in states.items():
            assert relative_error(state, batch[key]) <= 1e-5
        if "router_logits" in batch:
            assert (torch.stack(output.router_logits) - batch["router_logits"]).abs().max() <= 1e-4
        for kind in ("key", "value"):
            for name in (key for key in batch if key.startswith(f"{kind}.")):
                cached = getattr(output.past_key_values.layers[int(name.split(".")[1])], f"{kind}s")
                assert (cached.transpose(1, 2) - batch[name]).abs().max() <= 1e-3


@golden_cases()
def test_greedy_reproduces_golden(case: Path) -> None:
    model = load_fp32(case)
    for batch in load_golden(case):
        ids, mask, expected = (batch[key] for key in ("input_ids", "attention_mask", "greedy_ids"))
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=expected.shape[1], do_sample=False, pad_token_id=0
        )
        assert generated[:, ids.shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_implementation_reproduces_golden(attention: str, experts: str) -> None:
    if attention == "flex_attention" and experts != "grouped_mm":
        pytest.skip("one combination with flex_attention is enough")
    model = load_fp32(TEXT01, attn_implementation=attention, experts_implementation=experts)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)
    [golden] = load_golden(TEXT01)
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert (logits - golden["logits"]).abs().max() <= 1e-3


def test_attention_weights_on_request() -> None:
    """The original fails on ``output_attentions``; here softmax layers return theirs, lightning layers have none."""
    model = load_fp32(TEXT01, attn_implementation="eager")
    [golden] = load_golden(TEXT01)
    with torch.no_grad():
        output = model(golden["input_ids"], output_attentions=True)
    [weights] = output.attentions
    assert weights.shape == (1, 4, 60, 60)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 60), atol=1e-5)
    assert not weights.triu(1).any()
    assert (output.logits - golden["logits"]).abs().max() <= 1e-3


def test_grouped_experts_are_the_default() -> None:
    assert load_fp32(TEXT01).config._experts_implementation == "grouped_mm"
