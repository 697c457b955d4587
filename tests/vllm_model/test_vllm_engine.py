# SPDX-License-Identifier: Apache-2.0
"""Whole engines on a CPU: in fp32 greedy tokens equal to the goldens and the oracle, log probabilities to 1e-4.

Prompts and answers of the original code where a checkpoint has them, the float64 oracle for any others. Each engine
runs several scenarios, because starting it takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from goldens import M1, TEXT01, golden_cases

pytest.importorskip("vllm", reason="vLLM is not installed")

from oracle import Oracle  # noqa: E402
from vllm_engine_process import HAS_CPP_COMPILER, INTERPRETED_TRITON_ENV, EngineProcess  # noqa: E402
from vllm_references import (  # noqa: E402
    Expected,
    assert_equal,
    golden_case,
    link_checkpoint,
    oracle_case,
    random_checkpoint,
    random_prompts,
)

#: Sixteen prompts around the borders of chunks (64) and blocks (128), more than the engine runs at once.
MIXED_LENGTHS = [1, 2, 3, 5, 8, 21, 34, 55, 63, 64, 65, 127, 128, 129, 200, 1]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints"), [0, 0, 0, 1])


@pytest.fixture(scope="module")
def oracle(random_model: Path) -> Oracle:
    return Oracle.from_dir(random_model)


@pytest.fixture(scope="module")
def mixed(oracle: Oracle) -> list[Expected]:
    return [oracle_case(oracle, prompt, 12) for prompt in random_prompts(MIXED_LENGTHS)]


@pytest.fixture(scope="module")
def plain_engine(random_model: Path, vllm_cache: Path) -> Iterator[EngineProcess]:
    """No prefix cache, and too few blocks for eight sequences at a time."""
    with EngineProcess(random_model, vllm_cache, enable_prefix_caching=False, num_gpu_blocks_override=24) as engine:
        yield engine


def test_prompts_alone(plain_engine: EngineProcess, oracle: Oracle) -> None:
    assert plain_engine.facts()["cache_mode"] == "none"
    for prompt in random_prompts([1, 255, 256, 257, 600], seed=6):
        case = oracle_case(oracle, prompt, 16)
        assert_equal(plain_engine.generate([case.prompt], len(case.tokens)), [case])


def test_batch_of_sixteen_mixed_lengths(plain_engine: EngineProcess, mixed: list[Expected]) -> None:
    assert_equal(plain_engine.generate([case.prompt for case in mixed], 12), mixed)


def test_prompts_of_one_token_after_other_requests(plain_engine: EngineProcess, mixed: list[Expected]) -> None:
    """Their slots hold what earlier requests left there."""
    single = [case for case in mixed if len(case.prompt) == 1]
    long = mixed[-2]
    plain_engine.generate([long.prompt] * 4, 4)
    assert_equal(plain_engine.generate([case.prompt for case in single], 12), single)
    batch = [single[0], long, single[1], single[0]]
    assert_equal(plain_engine.generate([case.prompt for case in batch], 12), batch)


def test_preemption(plain_engine: EngineProcess, oracle: Oracle) -> None:
    cases = [oracle_case(oracle, prompt, 24) for prompt in random_prompts([120] * 6, seed=2)]
    before = plain_engine.facts()["preemptions"]
    assert_equal(plain_engine.generate([case.prompt for case in cases], 24), cases)
    assert plain_engine.facts()["preemptions"] > before


@pytest.fixture(scope="module")
def m1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_checkpoint(M1, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def caching_engine(m1: Path, vllm_cache: Path) -> Iterator[EngineProcess]:
    """Prefix cache, prefill in chunks of 48 tokens (smaller than a block of 128), few blocks."""
    with EngineProcess(m1, vllm_cache, max_num_batched_tokens=48, num_gpu_blocks_override=16) as engine:
        yield engine


def test_chunked_prefill_and_prefix_cache_hits(caching_engine: EngineProcess) -> None:
    facts = caching_engine.facts()
    assert facts["cache_mode"] == "align" and facts["block_size"] == 128
    cases = golden_case(M1)
    assert [len(case.prompt) for case in cases] == [300, 37, 5]
    for _ in range(2):
        completions = [caching_engine.generate([case.prompt], len(case.tokens))[0] for case in cases]
        assert_equal(completions, cases)
    assert [completion.cached for completion in completions] == [256, 0, 0]


def test_a_prompt_that_goes_on_from_a_cached_prefix(caching_engine: EngineProcess) -> None:
    oracle = Oracle.from_dir(M1)
    (prompt,) = random_prompts([140], seed=3)
    caching_engine.generate([prompt], 1)
    longer = [oracle_case(oracle, prompt + extra, 8) for extra in random_prompts([1, 30, 90], seed=4)]
    completions = caching_engine.generate([case.prompt for case in longer], 8)
    assert_equal(completions, longer)
    assert all(completion.cached >= 128 for completion in completions)


def test_preemption_with_a_prefix_cache(caching_engine: EngineProcess) -> None:
    oracle = Oracle.from_dir(M1)
    cases = [oracle_case(oracle, prompt, 24) for prompt in random_prompts([120] * 6, seed=5)]
    before = caching_engine.facts()["preemptions"]
    assert_equal(caching_engine.generate([case.prompt for case in cases], 24), cases)
    assert caching_engine.facts()["preemptions"] > before


@pytest.mark.skipif(not HAS_CPP_COMPILER, reason="no C++ compiler")
def test_torch_compile(tmp_path: Path, vllm_cache: Path) -> None:
    """Text-01 with a shared expert, compiled, prefix cache with hits at multiples of 32 tokens."""
    cases, oracle = golden_case(TEXT01), Oracle.from_dir(TEXT01)
    cases += [oracle_case(oracle, prompt, 8) for prompt in random_prompts([1, 70, 1, 9])]
    checkpoint = link_checkpoint(TEXT01, tmp_path)
    with EngineProcess(checkpoint, vllm_cache, enforce_eager=False, prefix_match_unit=32) as engine:
        assert engine.facts()["compilation_mode"] > 0
        for cached in (0, 32):
            completions = engine.generate([cases[0].prompt], len(cases[0].tokens))
            assert_equal(completions, cases[:1])
            assert completions[0].cached == cached
        assert_equal(engine.generate([case.prompt for case in cases[1:]], 8), cases[1:])


def test_model_runner_v2(tmp_path: Path, vllm_cache: Path) -> None:
    """The runner that serves GPUs, its Triton kernels interpreted; prefix cache (hits of 32) and small chunks."""
    pytest.importorskip("triton", reason="Triton is not installed")
    checkpoint, cases = link_checkpoint(TEXT01, tmp_path), golden_case(TEXT01)
    oracle = Oracle.from_dir(TEXT01)
    mixed = [oracle_case(oracle, prompt, 6) for prompt in random_prompts([1, 130, 5, 1, 170])]
    with EngineProcess(
        checkpoint,
        vllm_cache,
        env=INTERPRETED_TRITON_ENV,
        max_num_batched_tokens=96,
        prefix_match_unit=32,
    ) as engine:
        assert engine.facts()["runner"].endswith(".cpu.model_runner")
        assert_equal(engine.generate([case.prompt for case in cases], len(cases[0].tokens)), cases)
        for _ in range(2):
            completions = engine.generate([case.prompt for case in mixed], 6)
            assert_equal(completions, mixed)
        assert [completion.cached for completion in completions] == [0, 128, 0, 0, 160]


@pytest.mark.slow
@golden_cases(repository=False)
def test_shared_golden_cases(case: Path, tmp_path: Path, vllm_cache: Path) -> None:
    with EngineProcess(link_checkpoint(case, tmp_path), vllm_cache) as engine:
        for expected in golden_case(case):
            assert_equal(engine.generate([expected.prompt], len(expected.tokens)), [expected])
