# SPDX-License-Identifier: Apache-2.0
"""Engines that take longer to start: several ranks, speculative decoding, LoRA adapters, the ``-hf`` format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from goldens import M1, TEXT01  # noqa: E402
from oracle import Oracle, load_checkpoint, random_tensors, tiny_config, write_checkpoint  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vllm_engine_process import TORCH_EXPERTS_VARIABLE, EngineProcess  # noqa: E402
from vllm_references import (  # noqa: E402
    Expected,
    assert_equal,
    golden_case,
    link_checkpoint,
    oracle_case,
    random_checkpoint,
    random_prompts,
)

from minimax_plugin.vllm_model import compat  # noqa: E402

pytestmark = pytest.mark.slow

#: vLLM 0.31 forgets how many drafts were accepted.
FORGETFUL = (compat.vllm_version() or (1, 0)) < (0, 32)

#: vLLM would bind each rank to a NUMA node of its own.
RANKS_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
LENGTHS = [1, 130, 1, 64, 5, 200, 17, 1]


def _cases(checkpoint: Path, num_tokens: int = 12) -> list[Expected]:
    oracle = Oracle.from_dir(checkpoint)
    vocab_size = oracle.config["vocab_size"]
    return [oracle_case(oracle, prompt, num_tokens) for prompt in random_prompts(LENGTHS, vocab_size)]


def _check(engine: EngineProcess, cases: list[Expected]) -> None:
    for _ in range(2):
        assert_equal(engine.generate([case.prompt for case in cases], len(cases[0].tokens)), cases)


def test_tensor_parallel(tmp_path: Path, vllm_cache: Path) -> None:
    """With a shared expert, which is split too."""
    checkpoint = link_checkpoint(TEXT01, tmp_path)
    with EngineProcess(checkpoint, vllm_cache, env=RANKS_ENV, tensor_parallel_size=2) as engine:
        golden = golden_case(TEXT01)
        assert_equal(engine.generate([case.prompt for case in golden], len(golden[0].tokens)), golden)
        _check(engine, _cases(checkpoint))


def test_pipeline_parallel(tmp_path: Path, vllm_cache: Path) -> None:
    """vLLM wants a softmax layer in each stage, and on a CPU a compile mode that runs its warm-up."""
    checkpoint = link_checkpoint(M1, tmp_path)
    with EngineProcess(
        checkpoint,
        vllm_cache,
        env=RANKS_ENV,
        pipeline_parallel_size=2,
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    ) as engine:
        for case in golden_case(M1):
            assert_equal(engine.generate([case.prompt], len(case.tokens)), [case])
        _check(engine, _cases(checkpoint))


def test_speculative_decoding(tmp_path: Path, vllm_cache: Path) -> None:
    """Drafts by n-gram; prompts of one token beside others, which the scheduler pads with placeholder drafts."""
    checkpoint = random_checkpoint(tmp_path, [0, 0, 0, 1])
    if FORGETFUL:
        pytest.skip("refused before vLLM 0.32")
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with EngineProcess(
        checkpoint, vllm_cache, enable_prefix_caching=False, speculative_config=drafting, max_num_seqs=6
    ) as engine:
        oracle = Oracle.from_dir(checkpoint)
        prompts = random_prompts([1, 1, 1, 1, 60, 2, 3, 1, 1, 130, 4, 17], oracle.config["vocab_size"])
        _check(engine, [oracle_case(oracle, prompt, 40) for prompt in prompts])
        assert engine.facts()["accepted_drafts"] > 0


def test_lora_on_both_kinds_of_attention(tmp_path: Path, vllm_cache: Path) -> None:
    """An adapter with the checkpoint's module names gives what the merged weights give; the base stays as it was."""
    config = tiny_config(hidden_size=64, attn_type_list=[0, 1, 0, 1])
    tensors = random_tensors(config)
    adapter, merged = _adapter(tensors, tmp_path / "adapter")
    base_cases = _cases(write_checkpoint(tmp_path / "base", config, tensors))
    merged_cases = _cases(write_checkpoint(tmp_path / "merged", config, merged))
    assert [case.tokens for case in base_cases] != [case.tokens for case in merged_cases]
    with EngineProcess(
        tmp_path / "base", vllm_cache, env={TORCH_EXPERTS_VARIABLE: "1"}, enable_lora=True, max_lora_rank=8
    ) as engine:
        _check(engine, base_cases)
        completions = engine.generate([case.prompt for case in merged_cases], 12, lora=str(adapter))
        assert_equal(completions, merged_cases)
        _check(engine, base_cases)


@pytest.mark.skipif(not FORGETFUL, reason="vLLM 0.32 keeps the counts of accepted drafts")
def test_speculative_decoding_is_refused_where_vllm_forgets(tmp_path: Path, vllm_cache: Path) -> None:
    checkpoint = link_checkpoint(M1, tmp_path)
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with (
        pytest.raises(RuntimeError, match="forgets how many drafts were accepted"),
        EngineProcess(checkpoint, vllm_cache, speculative_config=drafting, enable_prefix_caching=False),
    ):
        pass


def _adapter(tensors: dict[str, torch.Tensor], folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A PEFT adapter on all attention projections, and the fp32 weights with it merged."""
    folder.mkdir()
    modules = ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    generator = torch.Generator().manual_seed(5)
    adapter: dict[str, torch.Tensor] = {}
    merged = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.split(".")[-2] not in modules:
            continue
        down = torch.randn(8, tensor.shape[1], generator=generator) * 0.1
        up = torch.randn(tensor.shape[0], 8, generator=generator) * 0.1
        prefix = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        merged[name] = merged[name] + 2.0 * up @ down
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged


def test_converted_checkpoint(tmp_path: Path, vllm_cache: Path) -> None:
    """The ``-hf`` format: other config keys, decay tables among the weights, ``rotary_dim`` as a leftover."""
    original, tensors = load_checkpoint(M1)
    config: dict[str, Any] = {
        key: value
        for key, value in original.items()
        if not key.startswith(("layernorm_", "shared_")) and key not in ("attn_type_list", "auto_map", "postnorm")
    }
    types = ["full_attention" if code else "linear_attention" for code in original["attn_type_list"]]
    config |= {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"], "layer_types": types}
    for new, old in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp")):
        for kind in ("alpha", "beta"):
            config[f"{new}_{kind}_factor"] = original[f"layernorm_{old}_{kind}"]
    tensors["model.layers.0.self_attn.slope_rate"] = torch.zeros(4, 1, 1)
    with EngineProcess(write_checkpoint(tmp_path / "hf", config, tensors), vllm_cache) as engine:
        for case in golden_case(M1):
            assert_equal(engine.generate([case.prompt], len(case.tokens)), [case])


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_type_list": [0, 0, 1, 0, 0], "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"postnorm": False, "layernorm_mlp_alpha": 1.0, "layernorm_full_attention_beta": 0.5, "num_experts_per_tok": 3},
        {"shared_intermediate_size": 24, "shared_moe_mode": "softmax", "tie_word_embeddings": True},
        {"rotary_dim": 32, "num_local_experts": 2, "head_dim": 64},
        {"attn_type_list": [0, 0, 0], "num_hidden_layers": 3},
        {"attn_type_list": [1, 1], "num_hidden_layers": 2},
    ],
    ids=["six-heads", "pre-norm-top-3", "shared-softmax-tied", "full-rotation", "all-lightning", "all-softmax"],
)
def test_other_architectures(changes: dict[str, Any], tmp_path: Path, vllm_cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", tiny_config(hidden_size=64, **changes))
    with EngineProcess(checkpoint, vllm_cache) as engine:
        _check(engine, _cases(checkpoint))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mamba_cache_dtype": "bfloat16"}, "bfloat16 lightning state has a relative output error of up to 0.42"),
        ({"prefix_match_unit": 32}, "--prefix-match-unit 32 would give wrong tokens for this model"),
    ],
    ids=["bf16-state", "parts-of-blocks"],
)
def test_options_that_would_give_wrong_tokens_stop_the_engine(
    args: dict[str, Any], message: str, tmp_path: Path, vllm_cache: Path
) -> None:
    checkpoint = link_checkpoint(M1, tmp_path)
    with pytest.raises(RuntimeError, match=message), EngineProcess(checkpoint, vllm_cache, **args):
        pass
