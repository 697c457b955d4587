# SPDX-License-Identifier: Apache-2.0
"""What stays fp32 in a model of lower precision: slopes, states, routers, rotations, logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_helpers import load_fp32, make_pair, random_ids, relative_error
from oracle import OracleCache, random_tensors, slopes, tiny_config, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from minimax_plugin.hf_modeling.batch import LightningBatch
from minimax_plugin.hf_modeling.cache import adopt_cache
from minimax_plugin.hf_modeling.configuration_minimax_m1 import MiniMaxM1Config
from minimax_plugin.hf_modeling.layers import (
    MiniMaxM1LightningAttention,
    MiniMaxM1RMSNorm,
    MiniMaxM1RotaryEmbedding,
    MiniMaxM1TopKRouter,
    apply_rotary,
)
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1DecoderLayer, MiniMaxM1ForCausalLM


def loaded(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def converted(path: Path) -> PreTrainedModel:
    return load_fp32(path).to(torch.bfloat16)


def halved(path: Path) -> PreTrainedModel:
    return load_fp32(path).half()


@pytest.mark.parametrize("make", [loaded, converted, halved])
def test_what_stays_fp32(tmp_path: Path, make: Callable[[Path], PreTrainedModel]) -> None:
    tensors = random_tensors(tiny_config())
    model = make(write_checkpoint(tmp_path, tiny_config(), tensors)).eval()
    assert model.dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad():
        output = model(random_ids(1, 9), output_router_logits=True)
    assert output.logits.dtype == torch.float32
    for layer_idx, layer in enumerate(model.model.layers):
        router = layer.block_sparse_moe.gate.weight
        assert router.dtype == torch.float32
        assert torch.equal(router, tensors[f"model.layers.{layer_idx}.block_sparse_moe.gate.weight"])
        assert output.router_logits[layer_idx].dtype == torch.float32
        if model.config.layer_types[layer_idx] == "linear_attention":
            assert output.past_key_values.layers[layer_idx].recurrent_states[0].dtype == torch.float32
            assert torch.equal(layer.self_attn.slopes(model.device).double(), slopes(4, layer_idx, 4))
            assert layer.self_attn.out_proj.weight.dtype == model.dtype
    angles = 3000 * 1e7 ** -(torch.arange(8, dtype=torch.float64) / 8)
    cos, sin = (x[0, 0] for x in model.model.rotary_emb(output.logits, torch.tensor([[3000]])))
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos - angles.cos().repeat(2)).abs().max() <= 1e-3
    assert (sin - angles.sin().repeat(2)).abs().max() <= 1e-3


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-module", "autocast"])
def test_router_multiplies_in_fp32(autocast: bool) -> None:
    """A product in bf16 is off by 1e-2 and picks other experts for some of the tokens."""
    router = MiniMaxM1TopKRouter(MiniMaxM1Config(**tiny_config(hidden_size=512, num_local_experts=32)))
    nn.init.normal_(router.weight, std=512**-0.5)
    x = torch.randn(2000, 512).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, weights, chosen = router.to(torch.bfloat16)(x)
    expected = x.double() @ router.weight.double().T
    assert (logits - expected).abs().max() <= 1e-5
    assert torch.equal(chosen, expected.topk(2).indices)
    best = expected.gather(1, chosen).softmax(-1)
    assert (weights - best).abs().max() <= 1e-5


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-module", "autocast"])
def test_shared_expert_is_mixed_in_fp32(autocast: bool) -> None:
    """Its share comes from a product in fp32, and the sum of the two experts is rounded once."""
    config = MiniMaxM1Config(**tiny_config(hidden_size=512, shared_intermediate_size=24))
    layer = MiniMaxM1DecoderLayer(config, 0).to(torch.bfloat16)
    x, routed = torch.randn(2, 100, 512).bfloat16(), torch.randn(2, 100, 512).bfloat16()
    nn.init.normal_(layer.coefficient.weight, std=512**-0.5)
    layer.block_sparse_moe.forward = lambda hidden: routed
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        share, mixed = layer.coefficient(x), layer._experts(x)
        shared = layer.shared_mlp(x).double()
    expected = (x.double() @ layer.coefficient.weight.double().T).sigmoid()
    assert share.dtype == torch.float32 and shared.abs().max() > 0.1
    assert (share - expected).abs().max() <= 1e-6
    rounded = (routed.double() * (1 - expected) + shared * expected).bfloat16()
    assert mixed.dtype == torch.bfloat16
    assert (mixed != rounded).double().mean() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_rounds_before_its_weight(dtype: torch.dtype) -> None:
    """As the released module does; one rounding after the weight changes the last bit of a quarter of the values."""
    norm = MiniMaxM1RMSNorm(256, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(64, 256).to(dtype)
    normed = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    expected = (norm.weight.double() * normed.double()).to(dtype)
    assert (norm(x) != expected).double().mean() <= 1e-3


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-module", "autocast"])
def test_logits_are_a_product_in_fp32(tmp_path: Path, autocast: bool) -> None:
    model = loaded(write_checkpoint(tmp_path, tiny_config())).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(random_ids(1, 9), output_hidden_states=True)
    expected = output.hidden_states[-1].double() @ model.lm_head.weight.double().T
    assert output.hidden_states[-1].dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert (output.logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_of_a_low_precision_checkpoint_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(tiny_config()).items()}
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, tiny_config(), tensors), dtype=dtype)
    assert model.model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32
    assert model._keep_in_fp32_modules_strict == {"block_sparse_moe.gate"}


def test_rotation_is_the_same_after_loading_from_meta(tmp_path: Path) -> None:
    config = tiny_config(rotary_dim=8, rope_theta=1e4)
    path = write_checkpoint(tmp_path, config)
    expected = 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    for model in (load_fp32(path), MiniMaxM1ForCausalLM(MiniMaxM1Config(**config))):
        assert torch.allclose(model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6)


def test_rotation_in_bf16_is_rounded_once() -> None:
    """transformers' own models round cos and sin to the dtype of the model first."""
    config = MiniMaxM1Config(**tiny_config(rotary_dim=8, rope_theta=1e4))
    x = torch.randn(1, 4, 50, 32).bfloat16()
    positions = torch.arange(3000, 3050)
    actual = apply_rotary(x, *MiniMaxM1RotaryEmbedding(config)(x, positions[None]))
    angles = positions.double()[:, None] * 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.view_as_complex(torch.stack([x[..., :4].double(), x[..., 4:8].double()], dim=-1))
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag, x[..., 8:].double()], dim=-1)
    assert actual.dtype == torch.bfloat16
    # Half a unit in the last place of bf16, and the rounding of fp32 angles near 3,000.
    assert ((actual.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-3).all()


def test_autocast_keeps_router_and_state(tmp_path: Path) -> None:
    model, oracle = make_pair(tmp_path)
    ids, cache = random_ids(1, 30), OracleCache()
    expected = oracle(ids[0].tolist(), cache)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, output_router_logits=True)
    assert output.router_logits[0].dtype == torch.float32
    assert output.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32
    # Layer 0 sees rounded inputs; a router in bf16 would add an error of its own.
    assert relative_error(output.router_logits[0], expected.router_logits[0]) <= 1e-2


def test_model_dtype_for_logits_on_request(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_config(head_dtype="model"))
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(path)(random_ids(1, 3)).logits.dtype == torch.bfloat16


def decode_error(layer_idx: int, num_steps: int, head_dim: int) -> float:
    """Largest relative error over the heads of the state that a released layer in bf16 has after decoding.

    The layer as a model holds it after ``.to(bfloat16)``: projection, activation, slopes, cache. The expected state is
    that of the projections it made, activated and widened, under slopes of the oracle.
    """
    num_heads, num_layers = 64, 80
    sizes = {"num_hidden_layers": num_layers, "num_attention_heads": num_heads, "head_dim": head_dim}
    config = MiniMaxM1Config(**tiny_config(**sizes))
    layer = MiniMaxM1LightningAttention(config, layer_idx)
    nn.init.normal_(layer.qkv_proj.weight, std=config.hidden_size**-0.5)
    layer.to(torch.bfloat16)
    projected: list[Tensor] = []
    layer.qkv_proj.register_forward_hook(lambda module, inputs, output: projected.append(output[0, 0]))
    cache = DynamicCache(config=config)
    adopt_cache(cache, config.layer_types)
    batch = LightningBatch.build(1, 1, None, torch.device("cpu"), cached=True)
    with torch.no_grad():
        for _ in range(num_steps):
            layer(torch.randn(1, 1, config.hidden_size).bfloat16(), lightning_batch=batch, past_key_values=cache)
    qkv = torch.stack(projected).view(num_steps, num_heads, 3 * head_dim)
    assert qkv.dtype == torch.bfloat16
    _, k, v = nn.functional.silu(qkv).chunk(3, dim=-1)
    expected = final_state(k, v, slopes(num_heads, layer_idx, num_layers))
    actual = cache.layers[layer_idx].recurrent_states[0][0].double()
    return ((actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def final_state(k: Tensor, v: Tensor, slopes_of_heads: Tensor) -> Tensor:
    """``sum_t exp(-s (T - 1 - t)) k_t v_t^T`` in float64."""
    age = torch.arange(k.shape[0] - 1, -1, -1, dtype=torch.float64)
    weights = torch.exp(-age[:, None] * slopes_of_heads.double())
    return torch.einsum("th,thk,thv->hkv", weights, k.double(), v.double())


@pytest.mark.parametrize("layer_idx", [0, 40, 78])
def test_state_error_of_4000_bf16_decode_steps(layer_idx: int) -> None:
    # A state in bf16 gives 2.8e-2 to 1.3, slopes rounded to bf16 give 2.2e-3 to 3.1e-3.
    assert decode_error(layer_idx, num_steps=4000, head_dim=32) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layer_idx", [0, 40, 78])
def test_state_error_at_the_released_head_size(layer_idx: int) -> None:
    assert decode_error(layer_idx, num_steps=4000, head_dim=128) <= 1e-4
