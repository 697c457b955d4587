# SPDX-License-Identifier: Apache-2.0
"""The layers one by one: what must stay in fp32, what is refused, how heads are split over ranks."""

from __future__ import annotations

import weakref
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import tiny_config
from recurrence import recurrence
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

from minimax_plugin.architecture import LIGHTNING_NORM_EPS  # noqa: E402
from minimax_plugin.vllm_model import MiniMaxM1ForCausalLM  # noqa: E402
from minimax_plugin.vllm_model import lightning as lightning_module  # noqa: E402
from minimax_plugin.vllm_model.lightning import HeadsRMSNorm, LightningAttention  # noqa: E402
from minimax_plugin.vllm_model.metadata import LightningMetadata  # noqa: E402
from minimax_plugin.vllm_model.settings import ModelSettings  # noqa: E402


def _cache_config(**changes: str) -> Any:
    dtypes = {"mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto"} | changes
    return SimpleNamespace(cache_config=SimpleNamespace(**dtypes))


@pytest.mark.parametrize("flag", ["mamba_cache_dtype", "mamba_ssm_cache_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_state_is_refused_with_the_reason(flag: str, dtype: str) -> None:
    option = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{option} is '{dtype}', expected 'auto' or 'float32'.*0\.42"):
        MiniMaxM1ForCausalLM.get_mamba_state_dtype_from_config(_cache_config(**{flag: dtype}))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_state_is_fp32(dtype: str, tiny_model: Any) -> None:
    config = _cache_config(mamba_cache_dtype=dtype)
    assert MiniMaxM1ForCausalLM.get_mamba_state_dtype_from_config(config) == (torch.float32,)
    assert tiny_model.model.layers[0].self_attn.get_state_dtype() == (torch.float32,)


def test_shape_of_the_state_follows_the_ranks() -> None:
    def shape(tp_size: int) -> tuple[tuple[int, ...], ...]:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=tp_size),
            model_config=SimpleNamespace(hf_config=SimpleNamespace(**tiny_config())),
        )
        return MiniMaxM1ForCausalLM.get_mamba_state_shape_from_config(config)

    assert shape(1) == ((4, 32, 32),)
    assert shape(2) == ((2, 32, 32),)


@pytest.mark.parametrize(
    ("page", "layers", "unit", "refused"),
    [(2, 2, 32, True), (2, 2, None, False), (1, 2, 32, False), (2, 1, 32, False)],
    ids=["padded", "whole-blocks-only", "not-padded", "one-layer"],
)
def test_parts_of_blocks_are_hit_only_where_vllm_copies_all_of_a_block(
    page: int, layers: int, unit: int | None, refused: bool, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padded states and several layers per group, vLLM 0.31 and 0.32 leave keys and values behind."""
    layer = tiny_model.model.layers[0].self_attn
    monkeypatch.setattr(layer.vllm_config.cache_config, "prefix_match_unit", unit)
    monkeypatch.setattr(layer.vllm_config.cache_config, "enable_prefix_caching", True)
    state = 4 * 32 * 32 * 4
    pages = torch.zeros(layers * 3 * page * state, dtype=torch.int8)[: 3 * page * state].view(3, 1, 1, -1)[..., :state]
    if refused:
        with pytest.raises(ValueError, match="--prefix-match-unit 32 would give wrong tokens"):
            layer.bind_kv_cache(pages)
    else:
        layer.bind_kv_cache(pages)


def test_a_layer_lets_go_of_the_block_pool_when_vllm_does(tiny_model: Any) -> None:
    """vLLM profiles CUDA graphs over a small pool, takes it back from the layers and allocates the real one."""
    from vllm.v1.worker.utils import clear_layer_kv_caches

    layer = tiny_model.model.layers[0].self_attn
    memory = np.zeros((3, 1, 1, 4 * 32 * 32 * 4), dtype=np.int8)
    layer.bind_kv_cache(torch.from_numpy(memory))
    assert layer.state_pool.states.data_ptr() == memory.ctypes.data
    alive = weakref.ref(memory)
    del memory
    assert alive() is not None
    clear_layer_kv_caches([layer])
    assert alive() is None, "the layer still holds the block pool"


def test_heads_must_split_over_the_ranks(tiny_config_of_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimax_plugin.vllm_model import model as model_module

    monkeypatch.setattr(model_module, "get_tensor_model_parallel_world_size", lambda: 3)
    with pytest.raises(ValueError, match="num_attention_heads = 4 is not divisible by the tensor parallel size 3"):
        model_module.MiniMaxModel(vllm_config=tiny_config_of_vllm, prefix="model")


def test_a_model_checks_where_its_graphs_split(tiny_config_of_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimax_plugin.vllm_model.model import MiniMaxModel

    monkeypatch.setattr(tiny_config_of_vllm.compilation_config, "splitting_ops", ["vllm::unified_attention"])
    with pytest.raises(ValueError, match="without 'minimax_plugin::lightning_layer'"):
        MiniMaxModel(vllm_config=tiny_config_of_vllm, prefix="model")


def test_norm_spans_the_heads_of_all_ranks(distributed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other in this process, against the norm over all heads in float64."""
    heads, dim, tokens = 6, 16, 5
    generator = torch.Generator().manual_seed(0)
    out, gate = (torch.randn(tokens, heads * dim, generator=generator) for _ in range(2))
    weight = torch.randn(heads * dim, generator=generator)
    sumsq = out.view(tokens, heads, dim).square().sum(-1)
    total = sumsq.sum(-1)
    scale = torch.rsqrt(out.double().square().mean(-1, keepdim=True) + 1e-6)
    expected = torch.sigmoid(gate.double()) * weight.double() * out.double() * scale
    monkeypatch.setattr(lightning_module, "get_tensor_model_parallel_world_size", lambda: 2)
    reduced: list[Tensor] = []

    def all_reduce(partial: Tensor) -> Tensor:
        reduced.append(partial)
        return total

    monkeypatch.setattr(lightning_module, "tensor_model_parallel_all_reduce", all_reduce)
    local = heads * dim // 2
    for rank in range(2):
        monkeypatch.setattr(lightning_module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        norm = HeadsRMSNorm(heads * dim)
        HeadsRMSNorm.weight_loader(norm.weight, weight)
        channels = slice(rank * local, (rank + 1) * local)
        part = norm(out[:, channels], gate[:, channels], sumsq[:, rank * 3 : (rank + 1) * 3])
        torch.testing.assert_close(part.double(), expected[:, channels], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reduced[0] + reduced[1], total)
    # vLLM reduces fp32 in two dimensions through a workspace made for 16-bit activations, and gets wrong sums.
    assert all(partial.dtype == torch.float32 and partial.shape == (tokens,) for partial in reduced)


def test_a_norm_weight_of_another_size_is_refused(distributed: None) -> None:
    norm = HeadsRMSNorm(64)
    with pytest.raises(ValueError, match=r"norm weight of a lightning layer has shape \(32,\), expected \(64,\)"):
        HeadsRMSNorm.weight_loader(norm.weight, torch.ones(32))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_the_slopes_of_its_heads(
    rank: int, tiny_config_of_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_module, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(lightning_module, "get_tensor_model_parallel_rank", lambda: rank)
    settings = ModelSettings.from_config(SimpleNamespace(**tiny_config(), rope_parameters={}))
    layer = LightningAttention(settings, 1, tiny_config_of_vllm, prefix=f"ranks.{rank}")
    assert layer.slopes.tolist() == oracle.slopes(4, 1, 4)[2 * rank : 2 * rank + 2].tolist()
    assert layer.num_heads == 2 and layer.state_shape == (2, 32, 32)
    with pytest.raises(ValueError, match=f"two layers are called 'ranks.{rank}'"):
        LightningAttention(settings, 1, tiny_config_of_vllm, prefix=f"ranks.{rank}")


def test_norm_uses_the_epsilon_of_the_released_module(distributed: None) -> None:
    """Inputs so small that 1e-6 and the 1e-5 of every other norm differ by a factor of three."""
    out = torch.full((1, 64), 1e-4)
    norm = HeadsRMSNorm(64)
    result = norm(out, torch.full((1, 64), 50.0), out.square().sum(-1, keepdim=True))
    torch.testing.assert_close(result, out / (1e-8 + 1e-6) ** 0.5)
    assert LIGHTNING_NORM_EPS == 1e-6


def test_rotation_stays_in_fp32(tiny_model: Any) -> None:
    """Given a bf16 query, vLLM's rotary embedding rounds its own table to bf16 for good."""
    attention = tiny_model.model.layers[1].self_attn
    rotary = attention.rotary_emb
    generator = torch.Generator().manual_seed(0)
    widths = [attention.num_heads * 32, attention.num_kv_heads * 32, attention.num_kv_heads * 32]
    qkv = torch.randn(6, sum(widths), generator=generator).bfloat16()
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            seen.extend(args)
            return seen[0] if len(args) == 3 else (args[0], None)

    positions = torch.tensor([0, 1, 7, 100, 500, 1023])
    original = attention.qkv_proj, attention.attn, attention.o_proj
    attention.qkv_proj, attention.attn, attention.o_proj = (Spy() for _ in range(3))
    attention.qkv_proj.forward = lambda hidden: (qkv, None)
    try:
        attention(positions, torch.zeros(6, 64))
    finally:
        attention.qkv_proj, attention.attn, attention.o_proj = original
    assert rotary.cos_sin_cache.dtype == torch.float32
    assert rotary.cos_sin_cache.shape[0] == 1024  # max_model_len, not the positions of the config
    theta = 10_000_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    angles = positions.double()[:, None, None] * theta
    for x, rotated in zip(qkv.split(widths, -1)[:2], seen[:2], strict=True):
        heads = x.double().view(6, -1, 32)
        first, second = heads[..., :8], heads[..., 8:16]
        expected = torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
                heads[..., 16:],
            ],
            dim=-1,
        )
        assert rotated.dtype == torch.bfloat16
        # One rounding to bf16 (half a unit of 2^-8) and the fp32 angle; a bf16 table is off by several units.
        torch.testing.assert_close(rotated.double().view(6, -1, 32), expected, rtol=2**-8, atol=1e-4)


def test_the_router_is_fp32_in_a_bf16_model(tiny_checkpoint: Path, distributed: None) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(tiny_checkpoint), dtype="bfloat16", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    fp32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert fp32 == {
        f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in ("block_sparse_moe.gate", "coefficient")
    }
    assert model.logits_processor.head_dtype == torch.float32
    assert model.model.layers[0].self_attn.slopes.dtype == torch.float32


def test_a_profiling_run_gives_zeros(tiny_config_of_vllm: Any) -> None:
    from vllm.forward_context import set_forward_context

    qkv = torch.randn(7, 384)
    out, sumsq = torch.full((7, 4, 32), float("nan")), torch.full((7, 4), float("nan"))
    with set_forward_context(None, tiny_config_of_vllm):
        torch.ops.minimax_plugin.lightning_layer(qkv, out, sumsq, "model.layers.0.self_attn")
    assert not out.any() and not sumsq.any()


def test_dual_batch_overlap_is_refused(tiny_config_of_vllm: Any) -> None:
    """vLLM then hands over the metadata of both halves of the batch as a list."""
    from vllm.forward_context import set_forward_context

    halves: Any = [{"model.layers.0.self_attn": None}] * 2
    out, sumsq = torch.empty(7, 4, 32), torch.empty(7, 4)
    with (
        set_forward_context(halves, tiny_config_of_vllm),
        pytest.raises(NotImplementedError, match="dual batch overlap is not supported.*leave --enable-dbo out"),
    ):
        torch.ops.minimax_plugin.lightning_layer(torch.randn(7, 384), out, sumsq, "model.layers.0.self_attn")


def test_the_operator_is_one_node_for_the_compiler() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        qkv, out, sumsq = torch.empty(5, 384), torch.empty(5, 4, 32), torch.empty(5, 4)
        torch.ops.minimax_plugin.lightning_layer(qkv, out, sumsq, "model.layers.0.self_attn")
    schema = torch.ops.minimax_plugin.lightning_layer.default._schema
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == {"out", "sumsq"}


@pytest.mark.parametrize("masked", [True, False])
def test_padding_rows_of_the_released_vocabulary_are_never_sampled(
    masked: bool, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_model._suppressed_ids == []  # a vocabulary of another size has no such rows
    config = SimpleNamespace(vocab_size=200_064, mask_vocab_padding=masked)
    monkeypatch.setattr(tiny_model, "config", config)
    monkeypatch.setattr(tiny_model, "_suppressed_ids", [])
    monkeypatch.setattr(tiny_model, "_suppressed_index", None)
    tiny_model._suppress(None)
    logits = torch.zeros(2, 200_064)
    monkeypatch.setattr(tiny_model.logits_processor, "forward", lambda *_: logits)
    result = tiny_model.compute_logits(torch.zeros(2, 64))
    assert result[:, :200_032].isfinite().all()
    assert bool(result[:, 200_032:].isneginf().all()) is masked


@pytest.mark.parametrize("layer_idx", [0, 40, 78])
def test_4000_decode_steps_in_bf16(layer_idx: int, tiny_config_of_vllm: Any) -> None:
    """A layer of the released model, with smaller heads, made as the engine makes it in bf16."""
    heads, dim, steps, num_layers = 64, 32, 4_000, 80
    config = tiny_config(
        attn_type_list=[int(layer % 8 == 7) for layer in range(num_layers)],
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=dim,
        rotary_dim=dim // 2,
    )
    settings = ModelSettings.from_config(SimpleNamespace(**config, rope_parameters={}))
    with set_default_torch_dtype(torch.bfloat16):
        layer = LightningAttention(settings, layer_idx, tiny_config_of_vllm, prefix=f"decode.{layer_idx}")
    layer.bind_kv_cache(torch.zeros(2, 1, 1, heads * dim * dim * 4, dtype=torch.int8))
    generator = torch.Generator().manual_seed(layer_idx)
    qkv = torch.randn(steps, heads, 3 * dim, generator=generator).bfloat16()
    metadata = _decode_metadata(slot=1)
    out, sumsq = torch.empty(1, heads, dim, dtype=torch.bfloat16), torch.empty(1, heads)
    for t in range(steps):
        layer.attend(qkv[t : t + 1], out, sumsq, metadata)
    state = layer.state_pool.states[1]
    q, k, v = torch.nn.functional.silu(qkv).double().chunk(3, -1)
    expected_out, expected = recurrence(q, k, v, oracle.slopes(heads, layer_idx, num_layers))
    error = (state.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # 3e-3 is promised, but slopes rounded to bf16 would keep that on two of the layers.
    assert error.max() <= 1e-4, error
    output_error = (out[0].double() - expected_out[-1]).norm(dim=-1) / expected_out[-1].norm(dim=-1)
    assert output_error.max() <= 1e-2, output_error


def _decode_metadata(slot: int) -> LightningMetadata:
    """One decoding row; fields that differ between releases of vLLM stay empty."""
    values: dict[str, Any] = {field.name: None for field in fields(LightningMetadata) if field.default is MISSING}
    values |= {"num_prefills": 0, "num_prefill_tokens": 0, "num_decodes": 1, "num_decode_tokens": 1, "num_reqs": 1}
    values["state_indices_tensor_d"] = torch.tensor([[slot]], dtype=torch.int32)
    return LightningMetadata(**values)
