# SPDX-License-Identifier: Apache-2.0
"""Weights as a rollout engine gets them: adapters merged, shards gathered, the trained model untouched."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minimax_plugin.cispo.merged_weights import full_parameters, full_tensor

ATTENTION = ["q_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

#: Adapters of kinds that merge in different ways.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ATTENTION},
    "rank-stabilised": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "saved modules": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "new tokens": {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "embedding": {"target_modules": [*ATTENTION, "embed_tokens"]},
}


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def with_adapter(model: Any, **options: Any) -> Any:
    """A PEFT model whose adapter does something."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_merged_experts(model_dirs: dict[str, Path]) -> None:
    """By hand: ``W + alpha / r * B_e A_e`` for every expert ``e``, whose factors PEFT keeps side by side."""
    base = load(model_dirs["m1"])
    plain = snapshot(base)
    model = with_adapter(base, target_modules=["qkv_proj"], target_parameters=EXPERTS)
    merged = dict(full_parameters(model))
    assert merged.keys() == {name for name, _ in load(model_dirs["m1"]).named_parameters()}
    factors = dict(model.named_parameters())
    prefix = "base_model.model.model.layers.0."

    attention = {part: factors[f"{prefix}self_attn.qkv_proj.lora_{part}.default.weight"] for part in "AB"}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert torch.allclose(merged[name], plain[name] + 3.0 * attention["B"] @ attention["A"], atol=1e-6)

    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.block_sparse_moe.experts.{part}"
        count, rows, columns = plain[name].shape
        wrapper = next(m for m in model.modules() if getattr(m, "parameter_name", None) == part)
        a = wrapper.lora_A["default"].weight.view(count, 4, columns)
        b = wrapper.lora_B["default"].weight.view(rows, 4, count)
        for expert in range(count):
            expected = plain[name][expert] + 3.0 * b[:, :, expert] @ a[expert]
            assert torch.allclose(merged[name][expert], expected, atol=1e-6)
            assert not torch.allclose(merged[name][expert], plain[name][expert], atol=1e-3)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter(kind: str, model_dirs: dict[str, Path]) -> None:
    """Equal to PEFT's own merge of a copy, in the names of the model before."""
    model = with_adapter(load(model_dirs["qwen3"]), **ADAPTERS[kind])
    before = snapshot(model)
    merged = dict(full_parameters(model))
    assert_same_bits(model, before)
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    changed = [n for n, p in load(model_dirs["qwen3"]).named_parameters() if not torch.equal(p, merged[n])]
    assert len(changed) >= 6, "the adapter does nothing"


def test_a_hundred_merges_leave_every_bit(model_dirs: dict[str, Path]) -> None:
    model = with_adapter(load(model_dirs["m1"]), target_modules=["qkv_proj"], target_parameters=EXPERTS)
    before = snapshot(model)
    first = {name: tensor.clone() for name, tensor in full_parameters(model)}
    for _ in range(100):
        last = dict(full_parameters(model))
    assert_same_bits(model, before)
    assert all(torch.equal(first[name], last[name]) for name in first)

    model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(AssertionError):
        assert_same_bits(model, before)  # what PEFT's own way leaves behind after one merge


def test_an_interrupted_iteration_leaves_the_model(model_dirs: dict[str, Path]) -> None:
    model = with_adapter(load(model_dirs["m1"]), target_modules=["qkv_proj"], target_parameters=EXPERTS)
    before = snapshot(model)
    weights: Any = full_parameters(model)
    for _ in range(8):
        next(weights)
    weights.close()
    assert_same_bits(model, before)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    broken = snapshot(model)
    with pytest.raises(ValueError, match="NaN"):
        dict(full_parameters(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), broken[name].nan_to_num())
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())


def test_only_the_active_adapter(model_dirs: dict[str, Path]) -> None:
    """TRL keeps a reference adapter beside the trained one."""
    model = with_adapter(load(model_dirs["qwen3"]), target_modules=ATTENTION)
    alone = dict(full_parameters(model))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=ATTENTION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.add_(1.0)
    both = dict(full_parameters(model))
    assert alone.keys() == both.keys()
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_an_adapter_that_is_merged_already(model_dirs: dict[str, Path]) -> None:
    model = with_adapter(load(model_dirs["qwen3"]), target_modules=ATTENTION)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into Linear already; call unmerge_adapter first"):
        dict(full_parameters(model))
    assert all(m.merged_adapters == ["default"] for m in model.modules() if hasattr(m, "merged_adapters"))


def test_names_without_wrappers(model_dirs: dict[str, Path]) -> None:
    model = load(model_dirs["qwen3"])
    expected = [name for name, _ in model.named_parameters()]
    compiled: Any = torch.compile(model)
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert [name for name, _ in full_parameters(compiled)] == expected


def test_quantised_weights_are_refused() -> None:
    class Params4bit(nn.Parameter):
        pass

    with pytest.raises(ValueError, match=r"a weight is a Params4bit of bitsandbytes.*load the model without"):
        full_tensor(Params4bit(torch.zeros(2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_sharded_over_two_processes(kind: str, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """FSDP2: every process gathers every tensor, one by one, also to merge an adapter into it."""
    script = Path(__file__).with_name("sharded_weights_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(model_dirs["m1"]), str(tmp_path), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = load(model_dirs["m1"])
    if kind == "lora":
        model = with_adapter(model, target_modules=["qkv_proj"], target_parameters=EXPERTS)
    expected = dict(full_parameters(model))
    for rank in range(2):
        gathered = torch.load(tmp_path / f"rank{rank}.pt")
        assert gathered["world_size"] == 2
        assert gathered["sharded"] == len(list(model.parameters())), "not every parameter was sharded"
        assert gathered["weights"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(gathered["weights"][name], tensor, atol=1e-6), name
        assert gathered["unchanged"]
