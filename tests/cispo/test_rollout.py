# SPDX-License-Identifier: Apache-2.0
"""Rollouts with vLLM in the process of the trainer: probabilities, weights, the repetition stop.

Bounds are those of the measurements in docs/cispo.md with a factor of ten or more; every engine is shared.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_process import (
    NEW_TOKENS,
    PROMPT_LENGTHS,
    RolloutProcess,
    compare,
    ragged_prompts,
    sample_with_transformers,
    training_logps,
)
from transformers import AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

STOP_TOKENS, STOP_PROBABILITY = 8, 0.99
EXACT = {"pearson": 0.99999, "max": 1e-4}


def assert_exact(measured: dict[str, float]) -> None:
    assert measured["tokens"] >= 700
    assert measured["pearson"] >= EXACT["pearson"], measured
    assert measured["max"] <= EXACT["max"], measured


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-cache")


@pytest.fixture(scope="module")
def engine(tiny_m1_dir: Path, cache: Path) -> Iterator[RolloutProcess]:
    """fp32, states of prompts cached, repetition stopped."""
    process = RolloutProcess(
        cache,
        model=str(tiny_m1_dir),
        engine={"dtype": "float32", "enable_prefix_caching": True},
        repetition=[STOP_TOKENS, STOP_PROBABILITY],
    )
    yield process
    process.close()


@pytest.fixture(scope="module")
def model(tiny_m1_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_m1_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rollout_prompts(model: Any) -> list[list[int]]:
    return ragged_prompts(model.config.vocab_size)


@needs_vllm
def test_vllm_samples_with_the_probabilities_of_training(engine: RolloutProcess) -> None:
    assert_exact(engine.ask("parity"))


def test_transformers_samples_with_the_probabilities_of_training(model: Any, rollout_prompts: list[list[int]]) -> None:
    completions, logps = sample_with_transformers(model, rollout_prompts)
    assert_exact(compare(logps, training_logps(model, rollout_prompts, completions)))


def test_the_measure_sees_a_wrong_model(rollout_prompts: list[list[int]], tmp_path: Path) -> None:
    """transformers' own model of the family, with equal weights: it asks its first layer how many tokens the cache
    holds, which a lightning layer does not know, and generates wrongly from left-padded prompts."""
    # Its heads are always rotated as a whole.
    options = TinyOptions(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rotary_dim=32,
        vocab_size=320,
        attn_type_list=(0, 1, 0, 1),
    )
    write_tiny_checkpoint(tmp_path / "m1", options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m1", dtype=torch.float32).eval()
    other = same_weights_in_transformers_own_model(model)
    prompt = [rollout_prompts[-1]]
    once = training_logps(other, [prompt[0][:1]], [prompt[0][1:]])
    assert compare(once, training_logps(model, [prompt[0][:1]], [prompt[0][1:]]))["max"] < 1e-3, "not the same model"

    completions, logps = sample_with_transformers(other, rollout_prompts)
    measured = compare(logps, training_logps(other, rollout_prompts, completions))
    assert measured["pearson"] < 0.99
    assert measured["max"] > 100 * EXACT["max"]


def same_weights_in_transformers_own_model(model: Any) -> Any:
    ours = model.config
    names = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "layer_types"),
        *("rope_parameters", "rms_norm_eps"),
    ]
    factors = {
        f"{kind}_{factor}_factor": getattr(ours, f"layernorm_{long}_{factor}")
        for kind, long in (("linear_attn", "linear_attention"), ("full_attn", "full_attention"), ("mlp", "mlp"))
        for factor in ("alpha", "beta")
    }
    other = MiniMaxForCausalLM(MiniMaxConfig(**{name: getattr(ours, name) for name in names}, **factors)).eval()
    weights = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not set(missing) & {name for name, _ in other.named_parameters()}
    return other


@needs_vllm
def test_syncing_equal_weights_changes_nothing(engine: RolloutProcess) -> None:
    assert engine.ask("sync_unchanged", times=2) <= 1e-6


@needs_vllm
@pytest.mark.parametrize("names", ["memory", "shuffled", "checkpoint"])
def test_sync_of_changed_weights(engine: RolloutProcess, names: str) -> None:
    measured = engine.ask("sync_changed", names=names)
    assert measured["moved"] > 0.5, "the weights hardly changed"
    assert measured["max"] <= 5e-5, measured
    assert measured["back"] <= 5e-5, measured


@needs_vllm
def test_sync_needs_the_experts_packed_anew(engine: RolloutProcess) -> None:
    """Without that step the measurement above fails, by four orders of magnitude."""
    measured = engine.ask("sync_changed", names="memory", repack=False)
    assert measured["max"] > 0.5
    assert measured["back"] <= 5e-5, "a sync with it repairs the engine"


@needs_vllm
def test_sync_of_merged_adapters(engine: RolloutProcess) -> None:
    """LoRA on attention and on the fused experts."""
    measured = engine.ask("sync_adapter")
    assert measured["moved"] > 0.5, "the adapter hardly does anything"
    assert measured["max"] <= 5e-5, measured
    assert measured["changed"] == [], "frozen weights changed"
    assert measured["back"] <= 5e-5, measured


@needs_vllm
def test_a_sync_empties_the_prefix_cache(engine: RolloutProcess) -> None:
    assert_exact(engine.ask("generate_with_old_prefix") | {"tokens": 700})


@needs_vllm
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_repetition_stop(engine: RolloutProcess, temperature: float) -> None:
    """16 of 16 sequences end where a count after the fact says, and are the same up to there."""
    measured = engine.ask("repetition", temperature=temperature, head=2.0)
    free, logps = measured["free"], measured["logps"]
    ends = [end_of_run(row, STOP_TOKENS) for row in logps]
    cut = [end is not None and end < len(row) for row, end in zip(free, ends, strict=True)]
    assert 3 <= sum(cut) <= 13, "loops and sequences without one are needed"
    assert measured["stopped"] == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert measured["scored"] == [len(row) for row in measured["stopped"]]
    assert measured["flags"] == cut

    for row, logp, limit, mixed in zip(free, logps, measured["limits"], measured["mixed"], strict=True):
        end = None if limit is None else end_of_run(logp, limit)
        assert mixed == (row if end is None or end == len(row) else [*row[:end], measured["eos"]])


def end_of_run(logps: list[float], tokens: int) -> int | None:
    for end in range(tokens, len(logps) + 1):
        if all(value > math.log(STOP_PROBABILITY) for value in logps[end - tokens : end]):
            return end
    return None


@needs_vllm
@pytest.mark.slow
def test_bf16_rollouts(tiny_m1_dir: Path, cache: Path) -> None:
    process = RolloutProcess(cache, model=str(tiny_m1_dir), engine={"dtype": "bfloat16"})
    measured = process.ask("parity")
    process.close()
    assert measured["tokens"] >= 700
    assert measured["pearson"] >= 0.999, measured
    assert measured["max"] > 10 * EXACT["max"], "not bf16"


@needs_vllm
@pytest.mark.slow
def test_engine_routes_bring_bf16_rollouts_closer(tiny_m1_dir: Path, cache: Path) -> None:
    """Model Runner V2, its Triton kernels interpreted, returns the experts of every token but the last."""
    pytest.importorskip("triton", reason="Model Runner V2 needs Triton")
    process = RolloutProcess(
        cache,
        model=str(tiny_m1_dir),
        env={"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
        engine={"dtype": "bfloat16"},
        return_routes=True,
    )
    measured = process.ask("parity_with_routes", dtype="bfloat16")
    process.close()
    lengths = [length + NEW_TOKENS - 1 for length in PROMPT_LENGTHS]
    assert measured["shapes"] == [[length, 4, 2] for length in lengths]
    live, replayed = measured["bfloat16 live"], measured["bfloat16 replayed"]
    assert replayed["pearson"] >= 0.9999, measured
    assert 1 - replayed["pearson"] < 0.8 * (1 - live["pearson"]), measured
    assert 0 < measured["bfloat16 rerouted"] < 0.05


@needs_vllm
@pytest.mark.slow
def test_an_engine_without_routes_says_so(tiny_m1_dir: Path, cache: Path) -> None:
    """Model Runner V1, which serves on a CPU by default."""
    process = RolloutProcess(cache, model=str(tiny_m1_dir), engine={"dtype": "float32"}, return_routes=True)
    log = process.log()
    process.close()
    assert "this vLLM engine returns no routes: AuxOutput Connector requires Model Runner V2" in log


@needs_vllm
@pytest.mark.slow
def test_updates_with_vllm(tiny_m1_dir: Path, cache: Path) -> None:
    """32 updates of all weights, each on a rollout of its own."""
    process = RolloutProcess(cache)
    result = process.ask("train", model=str(tiny_m1_dir), steps=32)
    process.close()
    assert result["error"] is None
    assert result["moved"] > 0.01
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in result["log"]]
    assert len(differences) == 32
    assert max(differences) <= EXACT["max"], differences
    assert min(entry["rollout/prob_pearson"] for entry in result["log"]) >= EXACT["pearson"]


@needs_vllm
@pytest.mark.slow
def test_updates_of_another_family(tiny_qwen3_dir: Path, cache: Path, tmp_path: Path) -> None:
    """Qwen3, so sure of itself that some completions are cut."""
    path = tmp_path / "sure"
    shutil.copytree(tiny_qwen3_dir, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    model.save_pretrained(path)
    process = RolloutProcess(cache)
    result = process.ask("train", model=str(path), steps=4, repetition_stop_tokens=2)
    process.close()
    assert result["error"] is None
    assert result["moved"] > 1e-3
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in result["log"]) <= EXACT["max"]
    shares = [entry["repetition/truncated_frac"] for entry in result["log"]]
    assert len(shares) == 4
    assert max(shares) > 0
    for entry, share in zip(result["log"], shares, strict=True):
        assert entry["completions/clipped_ratio"] >= share


@needs_vllm
@pytest.mark.slow
def test_the_first_rollout_is_checked(tiny_m1_dir: Path, cache: Path) -> None:
    """With experts in the wrong layout the training ends before its first update, saying how far off it was."""
    process = RolloutProcess(cache)
    result = process.ask("train", model=str(tiny_m1_dir), steps=2, repack=False)
    process.close()
    assert result["log"] == []
    assert result["moved"] == 0
    assert "the first rollout does not match the training forward pass" in result["error"]
