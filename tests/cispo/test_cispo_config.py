# SPDX-License-Identifier: Apache-2.0
"""Arguments: defaults of the report, refusals, and the forms that a command line needs."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from minimax_plugin.cispo import CISPOConfig


def config(tmp_path: Path, **values: Any) -> CISPOConfig:
    return CISPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **values)


def test_defaults_are_the_reports(tmp_path: Path) -> None:
    """arXiv 2506.13585: no lower bound and no KL (3.1), AdamW and fp32 head (3.2), 3,000 tokens above 0.99 (3.2)."""
    args = config(tmp_path)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.95, 1e-15)
    assert (args.beta, args.epsilon_is_low, args.token_mask, args.loss_aggregation) == (0.0, None, "none", "token")
    assert (args.repetition_stop_tokens, args.repetition_stop_prob) == (3000, 0.99)
    assert args.importance_cap == 5.0 and args.cast_lm_head_to_fp32
    assert args.router_aux_loss_coef == 0.0
    assert (args.vllm_importance_sampling_mode, args.vllm_importance_sampling_clip_max) == ("token_truncate", 2.0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epsilon_high": 5.0}, r"epsilon_high is 5.0.*epsilon_is_high = X - 1, here 4"),
        ({"epsilon": 0.3}, r"epsilon is 0.3.*epsilon_is_low"),
        ({"epsilon_is_high": 0.0}, "epsilon_is_high is 0.0, expected a positive number"),
        ({"epsilon_is_high": -1.0}, "epsilon_is_high is -1.0"),
        ({"epsilon_is_high": math.nan}, "epsilon_is_high is nan"),
        ({"epsilon_is_low": 0.0}, "epsilon_is_low is 0.0"),
        ({"token_mask": "clip"}, "token_mask is 'clip', expected one of 'none', 'ppo', 'dual'"),
        ({"token_mask": "ppo", "epsilon_high": 0.0}, "epsilon_high is 0.0"),
        ({"token_mask": "ppo", "epsilon": -0.2}, "epsilon is -0.2"),
        ({"token_mask": "dual"}, "token_mask='dual' needs a ratio above 1"),
        ({"token_mask": "dual", "dual_clip_ratio": 1.0}, "dual_clip_ratio is 1.0, expected a ratio above 1"),
        ({"token_mask": "ppo", "dual_clip_ratio": 3.0}, "dual_clip_ratio is 3.0 and token_mask is 'ppo'"),
        ({"loss_type": "grpo"}, "loss_type is 'grpo', expected 'cispo'"),
        ({"loss_aggregation": "batch"}, "loss_aggregation is 'batch'"),
        ({"sample_loss_weight": 1.5}, "sample_loss_weight is 1.5"),
        ({"importance_base": "old"}, "importance_base is 'old'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level is 'sequence'"),
        ({"delta": 4.0}, "delta is 4.0.*dual_clip_ratio=4.0"),
        ({"log_ratio_bound": 0.0}, "log_ratio_bound is 0.0"),
        ({"log_ratio_bound": 100.0}, "log_ratio_bound is 100.0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"num_generations": 1}, "num_generations is 1, expected at least 2"),
        ({"zero_variance": "skip"}, "zero_variance is 'skip'"),
        ({"zero_variance": "refill", "max_refill_rounds": 0}, "max_refill_rounds is 0"),
        ({"retire_solved_at": 90.0}, "retire_solved_at is 90.0"),
        ({"solved_reward": math.inf}, "solved_reward is inf"),
        ({"rollout_check": "raise"}, "rollout_check is 'raise'"),
        ({"rollout_check_pearson": 99.0}, "rollout_check_pearson is 99.0"),
        ({"mismatch_plot_steps": -1}, "mismatch_plot_steps is -1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_one_message_says_what_is_wrong(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon_is_high": math.inf},
        {"epsilon_is_low": 10.0},
        {"token_mask": "ppo", "epsilon": 0.3, "epsilon_high": 0.28},
        {"token_mask": "dual", "dual_clip_ratio": 3.0},
        {"retire_solved_at": 0.9},
    ],
)
def test_what_is_meant_is_accepted(values: dict[str, Any], tmp_path: Path) -> None:
    config(tmp_path, **values)


def test_every_field_has_a_help_that_a_command_line_can_print(capsys: pytest.CaptureFixture[str]) -> None:
    own = {field.name for field in fields(CISPOConfig)}
    assert all(field.metadata.get("help") for field in fields(CISPOConfig) if field.name in CISPOConfig.__annotations__)
    with pytest.raises(SystemExit) as done:
        HfArgumentParser(CISPOConfig).parse_args(["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in own)


def test_a_command_line_gives_the_types(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu --bf16 false --epsilon_is_high 7 --epsilon_is_low 0.5 --token_mask ppo"
    words += " --length_stages 8 16 --zero_variance refill --retire_solved_at 0.9 --head_chunk_tokens 64"
    (args,) = HfArgumentParser(CISPOConfig).parse_args_into_dataclasses(words.split())
    assert (args.epsilon_is_high, args.epsilon_is_low, args.token_mask) == (7.0, 0.5, "ppo")
    assert (args.length_stages, args.retire_solved_at, args.head_chunk_tokens) == ([8, 16], 0.9, 64)


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses need torch alone; what needs more says so."""
    for name in [name for name in sys.modules if name.startswith("minimax_plugin.cispo.") or name.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    package = importlib.import_module("minimax_plugin.cispo")
    importlib.import_module("minimax_plugin.cispo.losses")
    for name in package.__all__:
        with pytest.raises(ImportError) as error:
            getattr(package, name)
        assert str(error.value) == f"{name} needs trl, which is not installed: pip install 'minimax-plugin[train]'"
