# SPDX-License-Identifier: Apache-2.0
"""How the trainer generates: cut completions, the check of the first rollout, engine arguments, refusals."""

from __future__ import annotations

import ast
import inspect
import logging
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as trl_generation
import trl.trainer.grpo_trainer as trl_grpo
from transformers import AutoModelForCausalLM

from minimax_plugin.cispo import CISPOConfig, rollout, weight_sync
from minimax_plugin.cispo.repetition import RepetitionRule
from minimax_plugin.cispo.rollout import (
    TRL_ENGINE_ARGUMENTS,
    ExactVLLMGeneration,
    check_expert_sizes,
    exact_generation,
    judge_first_rollout,
)

N, P, WINDOW = 4, 0.99, 32


@pytest.fixture
def looping_trainer(make_trainer: Callable[..., Any], tiny_m1_dir: Path) -> Callable[..., Any]:
    """A factory of trainers whose model falls into loops."""

    def make(**config: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_m1_dir, dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        config = {"max_completion_length": WINDOW, "repetition_stop_tokens": N} | config
        return make_trainer(model, zero_variance="keep", **config)

    return make


def rollout_of(trainer: Any) -> dict[str, Any]:
    rows = [trainer.train_dataset[index // 4] for index in range(8)]
    trainer.model.train()
    torch.manual_seed(11)
    return trainer._generate_and_score_completions(rows)


def ends_by_count(trainer: Any, batch: dict[str, Any]) -> list[int | None]:
    """Where each completion is to be cut, from one forward pass."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits.float()
    start = batch["prompt_ids"].shape[1]
    logps = logits[:, start - 1 : -1].log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
    ends: list[int | None] = []
    for row, length in zip(logps.tolist(), batch["completion_mask"].sum(1).tolist(), strict=True):
        likely = [value > math.log(P) for value in row[:length]]
        ends.append(next((end for end in range(N, length) if all(likely[end - N : end])), None))
    return ends


@pytest.mark.parametrize("masked", [False, True])
def test_cut_completions_count_as_truncated(looping_trainer: Callable[..., Any], masked: bool) -> None:
    free = looping_trainer(repetition_stop_tokens=None)
    before = rollout_of(free)
    ends = ends_by_count(free, before)
    cut = [end is not None for end in ends]
    assert 0 < sum(cut) < len(cut), "some completions must be cut and others not"

    trainer = looping_trainer(mask_truncated_completions=masked)
    after = rollout_of(trainer)
    lengths = before["completion_mask"].sum(1).tolist()
    expected = [length if end is None else end for length, end in zip(lengths, ends, strict=True)]
    eos = set(trainer.eos_token_ids)
    for row, (length, end) in enumerate(zip(expected, ends, strict=True)):
        ids = after["completion_ids"][row, :length].tolist()
        assert ids == before["completion_ids"][row, :length].tolist()
        truncated = ids[-1] not in eos
        assert truncated or end is None, "the forced end token must not be trained on"
        assert after["completion_mask"][row].sum() == (0 if masked and truncated else length)
    metrics = trainer._metrics["train"]
    assert metrics["repetition/truncated_frac"] == [pytest.approx(sum(cut) / len(cut))]
    last = [after["completion_ids"][row, length - 1].item() for row, length in enumerate(expected)]
    assert metrics["completions/clipped_ratio"] == [pytest.approx(sum(token not in eos for token in last) / len(last))]
    assert metrics["completions/mean_length"] == [pytest.approx(sum(expected) / len(expected))]


def test_training_with_cut_completions(looping_trainer: Callable[..., Any]) -> None:
    trainer = looping_trainer(mask_truncated_completions=True)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logged)
    assert max(entry["repetition/truncated_frac"] for entry in logged) > 0


def test_the_rule_is_off_where_it_cannot_apply(tmp_path: Path) -> None:
    def rule(**options: Any) -> RepetitionRule | None:
        return RepetitionRule.from_config(CISPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options))

    assert rule(max_completion_length=3000) is None
    assert rule(max_completion_length=3001) == RepetitionRule(3000, 0.99)
    assert rule(max_completion_length=3001, repetition_stop_tokens=None) is None
    assert rule(max_completion_length=8, length_stages=[8, 4000]) == RepetitionRule(3000, 0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_stop_tokens": 0}, "repetition_stop_tokens is 0, expected a whole number of at least 1"),
        ({"repetition_stop_prob": 1.0}, "repetition_stop_prob is 1.0, expected a number of at least 0.5"),
        (
            {"repetition_stop_tokens": 4, "use_transformers_continuous_batching": True},
            "continuous batching takes no logits processor",
        ),
        (
            {"repetition_stop_tokens": 4, "use_vllm": True, "vllm_mode": "server", "temperature": 0.7},
            "repetition_stop_tokens is 4 with temperature=0.7.*or set repetition_stop_tokens=None",
        ),
    ],
)
def test_refused_with_the_config(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CISPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, r"vllm_mode is 'server'.*runs on 'cpu'.*vllm_mode='colocate'"),
        (
            {"use_vllm": True, "vllm_mode": "colocate", "vllm_llm_kwargs": {"gpu_memory_utilization": 0.5}},
            r"gpu_memory_utilization=0.5, which TRL passes.*set vllm_gpu_memory_utilization",
        ),
        (
            {"use_vllm": True, "vllm_mode": "colocate", "vllm_llm_kwargs": '{"seed": 3}'},
            r"seed=3, which TRL passes.*cannot be changed",
        ),
        ({"vllm_llm_kwargs": {"dtype": "float32"}}, "starts no vLLM engine"),
    ],
)
def test_refused_before_a_model_is_loaded(
    options: dict[str, Any], message: str, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr(trl_grpo, "create_model_from_path", load)
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_absent_vllm_is_named(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'minimax-plugin\[vllm\]'"):
        make_trainer(use_vllm=True, vllm_mode="colocate")


@pytest.mark.parametrize(
    ("sizes", "tensor_parallel", "message"),
    [
        ({"hidden_size": 48, "intermediate_size": 64}, 1, "hidden_size is 48, .* multiples of 32;"),
        ({"hidden_size": 64, "intermediate_size": 80}, 1, "intermediate_size is 80, .* multiples of 32;"),
        ({"hidden_size": 64, "moe_intermediate_size": 80, "intermediate_size": 64}, 1, "moe_intermediate_size is 80"),
        ({"hidden_size": 64, "intermediate_size": 96}, 2, "intermediate_size is 96, .* on each of 2 processes;"),
        ({"hidden_size": 64, "intermediate_size": 64}, 2, None),
    ],
)
def test_experts_that_do_not_fit_a_cpu(sizes: dict[str, int], tensor_parallel: int, message: str | None) -> None:
    config = SimpleNamespace(num_local_experts=4, **sizes)
    config.get_text_config = lambda: config
    if message is None:
        check_expert_sizes(config, tensor_parallel)
        return
    with pytest.raises(ValueError, match=message):
        check_expert_sizes(config, tensor_parallel)
    config.num_local_experts = None
    check_expert_sizes(config, tensor_parallel)  # a dense model may have any size


def test_experts_are_checked_before_a_model_is_loaded(
    make_trainer: Callable[..., Any], tiny_m1_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("vLLM would run on the GPU")
    text = (tiny_m1_dir / "config.json").read_text().replace('"intermediate_size": 64', '"intermediate_size": 72')
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(trl_grpo, "create_model_from_path", lambda *a, **k: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match="intermediate_size is 72, but vLLM's experts on a CPU"):
        make_trainer(tmp_path, use_vllm=True, vllm_mode="colocate")


def test_the_engine_arguments_are_those_that_trl_sets() -> None:
    """Read from TRL's source: a new one must be refused too, one that is gone may be set."""
    source = textwrap.dedent(inspect.getsource(trl_generation.VLLMGeneration._init_vllm))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "LLM"]
    assert {keyword.arg for keyword in call.keywords} == TRL_ENGINE_ARGUMENTS.keys()


def test_the_class_is_in_place_only_inside() -> None:
    original = trl_grpo.VLLMGeneration
    with pytest.raises(RuntimeError, match="inside"), exact_generation({"dtype": "float32"}):
        assert trl_grpo.VLLMGeneration.func is ExactVLLMGeneration
        assert trl_grpo.VLLMGeneration.keywords["engine_arguments"] == {"dtype": "float32"}
        raise RuntimeError("inside")
    assert trl_grpo.VLLMGeneration is original


def mismatch(**values: float) -> Any:
    numbers = {"prob_pearson": 1.0, "logp_diff_mean": 0.0, "logp_diff_p99": 0.0, "logp_diff_max": 0.0, "tokens": 77}
    return SimpleNamespace(**numbers | values)


def arguments(**values: Any) -> SimpleNamespace:
    neutral = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    checks = {"rollout_check": "error", "rollout_check_pearson": 0.99, "cast_lm_head_to_fp32": True}
    return SimpleNamespace(**neutral | checks | values)


def test_a_rollout_that_matches_passes(caplog: pytest.LogCaptureFixture) -> None:
    judge_first_rollout(mismatch(prob_pearson=0.9901), arguments())
    judge_first_rollout(mismatch(prob_pearson=math.nan, logp_diff_mean=0.001), arguments())
    judge_first_rollout(mismatch(prob_pearson=0.2), arguments(rollout_check="off"))
    assert not caplog.records


@pytest.mark.parametrize("values", [{"prob_pearson": 0.94}, {"prob_pearson": math.nan, "logp_diff_mean": 0.5}])
def test_a_rollout_that_does_not_match(values: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    far = mismatch(**{"logp_diff_max": 8.4} | values)
    settings = {"top_p": 0.9, "cast_lm_head_to_fp32": False}
    with pytest.raises(ValueError, match=r"expected at least 0.99.*max 8.4 over 77 tokens.*causes: top_p=0.9; cast_lm"):
        judge_first_rollout(far, arguments(**settings))
    with caplog.at_level(logging.WARNING):
        judge_first_rollout(far, arguments(rollout_check="warn"))
    assert "the first rollout does not match" in caplog.text
    assert "temperature" not in caplog.text, "the trainer divides by the temperature too"


def test_only_the_first_rollout_is_judged(make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    with caplog.at_level(logging.WARNING, logger="minimax_plugin"):
        trainer._judge_rollout(mismatch(prob_pearson=0.1), "eval")
        assert "first rollout" not in caplog.text
        trainer._judge_rollout(mismatch(prob_pearson=0.1), "train")
        trainer._judge_rollout(mismatch(prob_pearson=0.1), "train")
    assert len([record for record in caplog.records if "first rollout" in record.message]) == 1


def test_vllm_versions(caplog: pytest.LogCaptureFixture) -> None:
    (oldest, newest) = (".".join(map(str, release)) for release in weight_sync.SEEN)
    with caplog.at_level(logging.WARNING):
        weight_sync.check_vllm_version(f"{oldest}.0")
        weight_sync.check_vllm_version(f"{newest}.1+cpu")
        assert not caplog.records
        weight_sync.check_vllm_version("0.99.0")
        assert "seen exact with vLLM" in caplog.text
        caplog.clear()
        weight_sync.check_vllm_version("0.1.dev20+g123")
        assert "cannot tell the release" in caplog.text
    with pytest.raises(ImportError, match=r"vLLM is 0.22.1, but syncing weights exactly needs .* use_vllm=False"):
        weight_sync.check_vllm_version("0.22.1")


def test_a_parameter_that_gets_no_weights_is_an_error() -> None:
    """vLLM only warns, and goes on with the old value."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def load_weights(self, weights: Any) -> set[str]:
            return {name for name, _ in weights}

    model = Model()
    runner = SimpleNamespace(
        get_model=lambda: model, reload_weights=lambda weights_iterator: model.load_weights(weights_iterator)
    )
    weights = dict(model.named_parameters())
    pytest.importorskip("vllm", reason="vLLM is not installed")
    weight_sync.reload_weights(runner, weights.items())
    del weights["second.bias"]
    with pytest.raises(ValueError, match="1 of 4 parameters of vLLM's Model got no new weights: second.bias"):
        weight_sync.reload_weights(runner, weights.items())
    assert "load_weights" not in vars(model)
    with pytest.raises(RuntimeError, match="has no reload_weights"):
        weight_sync.reload_weights(object(), [])


def generation(monkeypatch: pytest.MonkeyPatch, outputs: list[list[Any]], **attributes: Any) -> Any:
    """An ``ExactVLLMGeneration`` without an engine, over TRL's ``generate`` that returns ``outputs``."""
    seen: list[dict[str, Any]] = []

    def generate(self: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        seen.append(dict(self.generation_kwargs))
        return prompts, *outputs

    monkeypatch.setattr(trl_generation.VLLMGeneration, "generate", generate)
    made: Any = ExactVLLMGeneration.__new__(ExactVLLMGeneration)
    vars(made).update(
        {"generation_kwargs": {}, "tensor_parallel_size": 1, "returns_routes": False, "seen": seen} | attributes
    )
    return made


def test_completions_of_a_server_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without the logits processor in the server: the reported log-probabilities say where."""
    sure, unsure = -0.001, -0.5
    logps = [[sure, sure, sure, 0.0], [sure, unsure, sure, sure], [sure, sure, sure, sure]]
    outputs: list[Any] = [[[1, 2, 3, 9], [1, 2, 3, 4], [1, 2, 3, 4]], [[[x] for x in row] for row in logps]]
    made = generation(
        monkeypatch,
        [*outputs, outputs[0]],
        mode="server",
        _repetition=RepetitionRule(3, P),
        generation_kwargs={"vllm_xargs": {"mine": 1}},
    )
    _, completions, kept_logps, _ = made.generate([[5]] * 3, None, 1)
    assert completions == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3]]
    assert [len(row) for row in kept_logps] == [3, 4, 3]
    assert made.stopped == [True, False, True]
    asked = {"mine": 1, "repetition_stop_tokens": 3, "repetition_stop_prob": P}
    assert made.seen == [{"vllm_xargs": asked}]
    assert made.generation_kwargs == {"vllm_xargs": {"mine": 1}}


def test_each_rank_of_a_tensor_parallel_group_cuts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank generates all completions of the group and TRL hands each its share."""
    names: list[str] = []

    class Params:
        extra_args = {"mine": 1}

        def clone(self) -> Any:
            return SimpleNamespace(extra_args=dict(self.extra_args))

    class Engine:
        def generate(self, prompts: list[Any], sampling_params: list[Any]) -> None:
            names.extend(params.extra_args["repetition_stop_name"] for params in sampling_params)
            assert all(params.extra_args["mine"] == 1 for params in sampling_params)

    made = generation(
        monkeypatch,
        [[[1, 2], [3, 4]]] * 3,
        mode="colocate",
        llm=Engine(),
        tensor_parallel_size=2,
        _repetition=RepetitionRule(3, P),
    )
    inner = trl_generation.VLLMGeneration.generate

    def generate(self: Any, prompts: list[Any], *args: Any, **kwargs: Any) -> tuple:
        self.llm.generate(prompts * 2, sampling_params=Params())
        return inner(self, prompts, *args, **kwargs)

    monkeypatch.setattr(trl_generation.VLLMGeneration, "generate", generate)
    monkeypatch.setattr(ExactVLLMGeneration, "_rank_in_tp_group", lambda self: 1)
    monkeypatch.setattr(RepetitionRule, "take_stopped", lambda self: {names[0], names[3]})
    _, completions, _, _ = made.generate([[5], [6]], None, 1)
    assert len(set(names)) == 4
    assert completions == [[1, 2], [3]], "the second rank holds the third and fourth completion"
    assert made.stopped == [False, True]
    assert "generate" not in vars(made.llm)
