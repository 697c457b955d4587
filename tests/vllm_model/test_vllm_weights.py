# SPDX-License-Identifier: Apache-2.0
"""Names of every format reach their parameters; what is missing, misshapen or damaged is named."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import load_checkpoint, write_checkpoint
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from minimax_plugin.architecture import Architecture  # noqa: E402
from minimax_plugin.checkpoint import CheckpointError  # noqa: E402
from minimax_plugin.vllm_model.weights import WeightLedger  # noqa: E402


@pytest.fixture
def original(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_checkpoint(tiny_checkpoint)[1]


def _load(model: Any, weights: Any, *, whole: bool = False) -> set[str]:
    model._expects_whole_checkpoint = whole
    return model.load_weights(iter(weights))


def _parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _scramble(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def _in_memory_names(original: dict[str, Tensor], block: str) -> dict[str, Tensor]:
    """The tensors as transformers holds them: experts of a layer fused, the expert block called ``block``."""
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in original.items():
        match = re.match(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            fused[name.replace(".block_sparse_moe.", f".{block}.")] = tensor
    for layer, parts in experts.items():
        count = len(parts) // 3
        gate_up = [torch.cat([parts[expert, "w1"], parts[expert, "w3"]]) for expert in range(count)]
        fused[f"{layer}.{block}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{layer}.{block}.experts.down_proj"] = torch.stack([parts[expert, "w2"] for expert in range(count)])
    return fused


def test_every_released_tensor_reaches_a_parameter(checkpoint_dir: Path, distributed: None) -> None:
    """All 8,243 names and shapes of the released checkpoint, on the real model without memory behind it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(checkpoint_dir),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=4096,
        skip_tokenizer_init=True,
        load_format="dummy",
    ).create_engine_config()
    with set_current_vllm_config(config), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    index = json.loads((checkpoint_dir / "model.safetensors.index.json").read_text())["weight_map"]
    specs = Architecture.from_config(config.model_config.hf_config).tensors()
    assert len(index) == 8_243 and index.keys() == specs.keys()
    weights = ((name, torch.empty(specs[name].shape, dtype=torch.bfloat16, device="meta")) for name in index)
    config.model_config.model = "the released checkpoint"  # whose shards are not here
    loaded = _load(model, weights, whole=True)
    # 0.31 reports experts by the name of the module around the one that owns them.
    names = {name.replace(".routed_experts.", ".") for name in loaded}
    assert names == {name.replace(".routed_experts.", ".") for name, _ in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 456_089_655_296
    router = dict(model.named_parameters())["model.layers.0.block_sparse_moe.gate.weight"]
    assert router.dtype == torch.float32


def test_all_name_formats_give_the_same_parameters(tiny_model: Any, original: dict[str, Tensor]) -> None:
    _scramble(tiny_model)
    _load(tiny_model, original.items(), whole=True)
    expected = _parameters(tiny_model)
    assert not any(value.isnan().any() for value in expected.values())
    for block in ("block_sparse_moe", "mlp"):
        renamed = _in_memory_names(original, block)
        for order in (list(renamed), list(reversed(renamed))):
            _scramble(tiny_model)
            for name in order:  # a trainer sends one tensor per call
                _load(tiny_model, [(name, renamed[name])])
            for name, value in _parameters(tiny_model).items():
                assert torch.equal(value, expected[name]), (block, name)


def test_lightning_projection_keeps_the_heads_together(tiny_model: Any, original: dict[str, Tensor]) -> None:
    _load(tiny_model, original.items())
    stored = original["model.layers.0.self_attn.qkv_proj.weight"].float()
    assert torch.equal(tiny_model.model.layers[0].self_attn.in_proj.weight, stored)


def test_decay_tables_of_converted_checkpoints_are_ignored(tiny_model: Any) -> None:
    names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    assert _load(tiny_model, [(f"model.layers.0.self_attn.{name}", torch.ones(1)) for name in names]) == set()


def test_ids_without_an_embedding_are_not_sampled(
    tiny_model: Any, original: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers; also where a trainer sends new weights."""
    monkeypatch.setattr(tiny_model.logits_processor, "forward", lambda head, hidden: torch.zeros(len(hidden), 128))
    unused = [90, *range(120, 128)]
    name = "model.embed_tokens.weight"
    trained = original[name].clone()
    original[name][unused] = 0
    _load(tiny_model, original.items(), whole=True)
    used = [i for i in range(128) if i not in unused]
    for _ in range(2):
        logits = tiny_model.compute_logits(torch.randn(3, 64))
        assert logits[:, unused].isneginf().all() and logits[:, used].isfinite().all()
    _load(tiny_model, [("model.norm.weight", original["model.norm.weight"])])
    assert tiny_model.compute_logits(torch.randn(3, 64))[:, unused].isneginf().all()
    _load(tiny_model, [(name, trained)])
    assert tiny_model.compute_logits(torch.randn(3, 64)).isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.0.self_attn.norm.weight",
        "model.layers.3.shared_mlp.up_proj.weight",
        "model.layers.2.block_sparse_moe.gate.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tiny_model: Any, original: dict[str, Tensor]) -> None:
    """vLLM itself takes the parameters of all experts for loaded as soon as one expert came."""
    del original[name]
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ tensors of this model: {re.escape(name)}"):
        _load(tiny_model, original.items(), whole=True)


def test_only_the_first_pass_must_be_whole(tiny_model: Any, original: dict[str, Tensor]) -> None:
    _load(tiny_model, original.items(), whole=True)
    name = "model.norm.weight"
    assert tiny_model.load_weights([(name, original[name])]) == {name}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.block_sparse_moe.experts.0.w2.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_wrong_shape_is_named(name: str, tiny_model: Any, original: dict[str, Tensor]) -> None:
    shape = tuple(original[name].shape)
    wrong = torch.zeros(shape[0] + 2, *shape[1:])
    message = re.escape(f"has shape {tuple(wrong.shape)}, expected {shape}")
    with pytest.raises(ValueError, match=f"tensor {re.escape(name)} of the checkpoint .* {message}"):
        _load(tiny_model, [(name, wrong)])


def test_a_wrong_dtype_is_named(tiny_model: Any, original: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.out_proj.weight"
    with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} .* is torch.int8, expected one of"):
        _load(tiny_model, [(name, original[name].to(torch.int8))])


def _remove(shard: Path) -> None:
    shard.unlink()


def _truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def _name_absent_tensor(shard: Path) -> None:
    path = shard.with_name("model.safetensors.index.json")
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = shard.name
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, "found no such file"),
        (_truncate, "found .* truncated"),
        (_name_absent_tensor, "tensor model.extra.weight: found no such tensor"),
    ],
)
def test_damaged_files_are_named_before_anything_is_loaded(
    damage: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_config_of_vllm: Any,
    tiny_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_checkpoint(tmp_path, *load_checkpoint(tiny_checkpoint), num_shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    damage(shard)
    monkeypatch.setattr(tiny_config_of_vllm.model_config, "model", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"{shard.name}: {message}"):
        _load(tiny_model, [], whole=True)


def test_a_file_that_breaks_off_is_an_error(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Where the files are not in a local folder, only the reader of vLLM notices."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config, _ = load_checkpoint(tiny_checkpoint)
    ledger = WeightLedger(Architecture.from_config(config), quantized=False, source="some/repository")
    weights = safetensors_weights_iterator([str(tmp_path / "model.safetensors")], use_tqdm_on_load=False)
    with pytest.raises(ValueError, match="cannot read the checkpoint some/repository"):
        list(ledger.watch(weights))


def test_a_tensor_that_comes_twice_is_named(tiny_model: Any, original: dict[str, Tensor]) -> None:
    """vLLM reads all safetensors files of a folder without an index, stale ones too."""
    name = "model.layers.0.self_attn.out_proj.weight"
    with pytest.raises(ValueError, match=f"tensor {re.escape(name)} of the checkpoint .* comes twice"):
        _load(tiny_model, [*original.items(), (name, original[name])])


def test_half_of_the_fused_experts_is_not_all_of_them(tiny_model: Any, original: dict[str, Tensor]) -> None:
    fused = _in_memory_names(original, "mlp")
    del fused["model.layers.2.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"lacks 4 of the \d+ .*: model.layers.2.block_sparse_moe.experts.0.w2.weight"):
        _load(tiny_model, fused.items(), whole=True)


def test_what_other_ranks_hold_is_not_missed_here(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts where vLLM reads only those of a rank, and layers of another pipeline stage."""
    from minimax_plugin.vllm_model import model as model_module

    names = ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.layers.3.self_attn.o_proj.weight")
    monkeypatch.setattr(tiny_model, "_skips_foreign_experts", False)
    assert [tiny_model._is_elsewhere(name) for name in names] == [False, False]
    monkeypatch.setattr(tiny_model, "_skips_foreign_experts", True)
    assert [tiny_model._is_elsewhere(name) for name in names] == [True, False]
    monkeypatch.setattr(model_module, "is_pp_missing_parameter", lambda name, model: ".layers.3." in name)
    assert [tiny_model._is_elsewhere(name) for name in names] == [True, True]


def test_tensors_of_other_ranks_are_not_missed(tiny_checkpoint: Path) -> None:
    config, tensors = load_checkpoint(tiny_checkpoint)
    ledger = WeightLedger(Architecture.from_config(config), quantized=False, source="somewhere")
    list(ledger.watch((name, tensor) for name, tensor in tensors.items() if ".layers.3." not in name))
    ledger.require_complete(lambda name: ".layers.3." in name)
    with pytest.raises(ValueError, match="lacks"):
        ledger.require_complete(lambda name: False)


def test_quantized_names_count_by_module(tiny_checkpoint: Path) -> None:
    config, tensors = load_checkpoint(tiny_checkpoint)
    ledger = WeightLedger(Architecture.from_config(config), quantized=True, source="somewhere")

    def packed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if re.search(r"experts\.\d+\.w", name):
                yield name.replace(".weight", ".weight_packed"), tensor.to(torch.int32)
                yield name.replace(".weight", ".weight_scale"), tensor
            else:
                yield name, tensor

    list(ledger.watch(packed()))
    ledger.require_complete(lambda name: False)


def test_weight_loaders_call_their_parameter_param(tiny_model: Any) -> None:
    """vLLM's layerwise reload finds the parameter by that name and loads garbage without an error if it cannot."""
    for name, parameter in tiny_model.named_parameters():
        loader = getattr(parameter, "weight_loader", None)
        if loader is not None:
            assert "param" in inspect.signature(loader).parameters, name


def test_names_of_modules_are_the_checkpoint_names(tiny_model: Any) -> None:
    """Ignore lists of quantization configs and LoRA adapters match on module names."""
    prefixes = {name: module.prefix for name, module in tiny_model.named_modules() if hasattr(module, "prefix")}
    assert prefixes
    for name, prefix in prefixes.items():
        assert prefix in (name, f"{name}.attn"), name
    rename = tiny_model.hf_to_vllm_mapper.get_rename_mapper()
    assert rename.apply_list(["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.q_proj"]) == [
        "model.layers.0.self_attn.in_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_slopes_survive_a_change_of_dtype_elsewhere(tiny_model: Any) -> None:
    """Not a parameter (reload would leave it uninitialised), not a plain attribute (sleep mode would lose it)."""
    layer = tiny_model.model.layers[2].self_attn
    assert "slopes" in dict(layer.named_buffers()) and "slopes" not in layer.state_dict()
    assert layer.slopes.dtype == torch.float32
    assert layer.slopes.tolist() == tiny_model.architecture.slopes(2)
