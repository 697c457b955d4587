# SPDX-License-Identifier: Apache-2.0
"""A bf16 model part by part against the float64 oracle, and that the comparison sees the faults it is there for.

By default the parts that carry fp32, made without an engine; the whole model in an engine is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bf16_faults import FAULTS, RECURRENCE_FAULTS, Fault
from bf16_layers import CONFIG, check_layers, check_recurrence
from oracle import Oracle, random_tensors, slopes, tiny_config, write_checkpoint
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from safetensors.torch import load_file  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm_engine_process import EngineProcess  # noqa: E402

from minimax_plugin.architecture import Architecture  # noqa: E402
from minimax_plugin.kernels.ops import LightningPlan  # noqa: E402
from minimax_plugin.vllm_model.experts import SparseExperts  # noqa: E402
from minimax_plugin.vllm_model.lightning import LightningAttention  # noqa: E402
from minimax_plugin.vllm_model.metadata import LightningMetadata  # noqa: E402
from minimax_plugin.vllm_model.settings import ModelSettings  # noqa: E402


def metadata_of(length: int, computed: int) -> LightningMetadata:
    """A step of one sequence in slot 1; fields that differ between releases of vLLM stay empty."""
    values: dict[str, Any] = {field.name: None for field in fields(LightningMetadata) if field.default is MISSING}
    values |= {"num_prefills": 0, "num_prefill_tokens": 0, "num_decodes": 0, "num_decode_tokens": 0, "num_reqs": 1}
    if length == 1:
        values |= {"num_decodes": 1, "num_decode_tokens": 1}
        return LightningMetadata(**values | {"state_indices_tensor_d": torch.tensor([[1]], dtype=torch.int32)})
    values |= {"num_prefills": 1, "num_prefill_tokens": length}
    values["state_indices_tensor_p"] = torch.tensor([1], dtype=torch.int32)
    values["has_initial_states_p"] = torch.tensor([computed > 0])
    return LightningMetadata(**values, plan=LightningPlan.build([0, length], [computed], device=torch.device("cpu")))


def check_released_layer(vllm_config: Any, layer_idx: int, faults: tuple[Fault, ...] = ()) -> None:
    """A lightning layer with the slopes of the released model: a long prompt in two pieces, then single tokens."""
    heads, dim, num_layers, steps = 64, 32, 80, [500, 300, 1, 1]
    config = tiny_config(
        attn_type_list=[0] * num_layers, num_hidden_layers=num_layers, num_attention_heads=heads, head_dim=dim
    )
    settings = ModelSettings.from_config(SimpleNamespace(**config, rope_parameters={}))
    prefix = f"bf16.{layer_idx}"
    vllm_config.compilation_config.static_forward_context.pop(prefix, None)
    with set_default_torch_dtype(torch.bfloat16):
        layer = LightningAttention(settings, layer_idx, vllm_config, prefix=prefix)
    layer.bind_kv_cache(torch.zeros(2, 1, 1, heads * dim * dim * 4, dtype=torch.int8))
    qkv = torch.randn(sum(steps), heads, 3 * dim).bfloat16()
    out = torch.empty(sum(steps), heads, dim, dtype=torch.bfloat16)
    sumsq, states, done = torch.empty(sum(steps), heads), [], 0
    with ExitStack() as planted:
        for fault in faults:
            planted.enter_context(fault(layer))
        for length in steps:
            rows = slice(done, done + length)
            layer.attend(qkv[rows], out[rows], sumsq[rows], metadata_of(length, done))
            states.append(layer.state_pool.states[1].clone())
            done += length
    check_recurrence(slopes(heads, layer_idx, num_layers), qkv, steps, torch.stack(states), out)
    # Of the outputs before they are rounded.
    torch.testing.assert_close(sumsq.double(), out.double().square().sum(-1), rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("layer_idx", [0, 40, 78])
def test_layers_with_released_slopes(layer_idx: int, tiny_config_of_vllm: Any) -> None:
    """From 0.917 in the fastest head of layer 0 to 4.95e-5 in the slowest of layer 78."""
    check_released_layer(tiny_config_of_vllm, layer_idx)


@pytest.mark.parametrize("fault", RECURRENCE_FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees_in_the_slowest_layer(fault: Fault, tiny_config_of_vllm: Any) -> None:
    with pytest.raises(AssertionError, match=rf"\({RECURRENCE_FAULTS[fault]}\): relative error"):
        check_released_layer(tiny_config_of_vllm, 78, (fault,))


@pytest.mark.parametrize("hidden_size", [64, 512])
def test_the_logits_that_reach_the_experts_are_a_product_in_fp32(hidden_size: int, tiny_config_of_vllm: Any) -> None:
    """A product in bf16 is off by 1e-2 and picks other experts for some of the tokens."""
    architecture = Architecture.from_config(tiny_config(hidden_size=hidden_size, num_local_experts=32))
    with set_default_torch_dtype(torch.bfloat16), set_current_vllm_config(tiny_config_of_vllm):
        block = SparseExperts(architecture, tiny_config_of_vllm, prefix=f"bf16.experts.{hidden_size}")
    weight = torch.randn(32, hidden_size) * hidden_size**-0.5
    block.gate.weight.data.copy_(weight)
    block.gate.quant_method.process_weights_after_loading(block.gate)
    seen: list[Tensor] = []
    block.experts.forward = lambda hidden, logits: seen.append(logits)
    hidden = torch.randn(200, hidden_size).bfloat16()
    block(hidden)
    [logits] = seen
    expected = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, vllm_cache: Path) -> Iterator[tuple[EngineProcess, Oracle]]:
    tensors = random_tensors(CONFIG)
    path = write_checkpoint(tmp_path_factory.mktemp("bf16"), CONFIG, tensors)
    with EngineProcess(
        path, vllm_cache, dtype="bfloat16", max_num_batched_tokens=150, enable_prefix_caching=False
    ) as engine:
        yield engine, Oracle(CONFIG, tensors)


def check_engine(engine: EngineProcess, oracle: Oracle, file: Path, fault: str = "") -> dict[str, float]:
    prompt = torch.randint(3, 128, (215,), generator=torch.Generator().manual_seed(1)).tolist()
    tokens, steps = engine.record(prompt, 9, file, fault)
    assert steps == [150, 65, *[1] * 8]
    return check_layers(oracle, tokens, steps, load_file(file))


@pytest.mark.slow
def test_every_part_is_right_but_for_its_own_roundings(pair: tuple[EngineProcess, Oracle], tmp_path: Path) -> None:
    check_engine(*pair, tmp_path / "record.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees(fault: Fault, pair: tuple[EngineProcess, Oracle], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"\({FAULTS[fault]}\): relative error"):
        check_engine(*pair, tmp_path / "record.safetensors", fault.__name__)
