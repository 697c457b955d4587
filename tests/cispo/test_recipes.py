# SPDX-License-Identifier: Apache-2.0
"""Every recipe is a sound configuration, says what it is, and the small one runs as its README says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minimax_plugin.cispo.plots import PANELS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "cispo_recipes").glob("*.yaml"))
ALL = [*RECIPES, ROOT / "examples" / "cispo_arithmetic" / "config.yaml"]


def parse(path: Path, *arguments: str) -> tuple[Any, Any, Any]:
    from trl import ModelConfig, TrlParser

    from minimax_plugin.cispo import CISPOConfig
    from minimax_plugin.cli.train import TaskArguments

    parser = TrlParser((TaskArguments, CISPOConfig, ModelConfig))
    # bf16 needs a GPU to be accepted; whether one is here is not what is tested.
    return parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true", *arguments])


def test_recipes_are_found() -> None:
    assert {path.stem for path in RECIPES} == {"lora_8gpu", "m1_paper", "scalerl", "tiny_cpu"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_is_a_sound_configuration(path: Path) -> None:
    tasks, config, model = parse(path)
    stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {**vars(model), **vars(config), **vars(tasks)}
    for key, value in stated.items():
        if key not in ("use_cpu", "report_to"):  # TRL turns "none" into an empty list
            assert values[key] == value, key
    assert config.epsilon_is_high > 0 and config.beta == 0
    # A rollout is used by whole updates.
    assert config.steps_per_generation % config.gradient_accumulation_steps == 0


def test_the_report_s_recipe_has_the_report_s_numbers() -> None:
    tasks, config, _ = parse(ROOT / "examples" / "cispo_recipes" / "m1_paper.yaml")
    assert config.steps_per_generation // config.gradient_accumulation_steps == 16
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.95, 1e-15)
    assert (config.repetition_stop_tokens, config.repetition_stop_prob) == (3000, 0.99)
    assert config.length_stages == [k * 1024 for k in (40, 48, 56, 64, 72, 80)]
    assert config.epsilon_is_low is None and config.token_mask == "none" and config.cast_lm_head_to_fp32


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minimax_plugin.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_small_recipe_runs(tmp_path: Path) -> None:
    assert run_cli("tiny", "tiny-m1", cwd=tmp_path).returncode == 0
    done = run_cli("train", "cispo", str(ROOT / "examples/cispo_recipes/tiny_cpu.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out reward: " in done.stdout
    summary = json.loads((tmp_path / "tiny-cispo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["updates"] == 4 and summary["machine"]["cpus"] == os.cpu_count()
    assert {"torch", "transformers", "trl"} <= {name for name, version in summary["versions"].items() if version}
    assert [row["step"] for row in summary["log_history"] if "eval_reward" in row] == [0, 4]
    assert {"config.json", "model.safetensors", "tokenizer.json", "curves.png"} <= {
        path.name for path in (tmp_path / "tiny-cispo").iterdir()
    }


def test_every_curve_is_of_something_that_is_logged(make_trainer: Any, prompts: Any) -> None:
    trainer = make_trainer(
        max_steps=1,
        init={"eval_dataset": prompts.select(range(2))},
        per_device_eval_batch_size=2,
        num_generations_eval=1,
    )
    trainer.train()
    trainer.evaluate()
    logged = {name for row in trainer.state.log_history for name in row}
    assert {name for _, _, names in PANELS for name in names} <= logged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no method, expected one of cispo"),
        (["grpo", "x.yaml"], "method is 'grpo', expected one of cispo"),
        (["cispo", "absent.yaml"], "absent.yaml is no file, expected a YAML file of settings"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from minimax_plugin.cli.train import run_program

    assert run_program(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"minimax-plugin train: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_such_field": 1}, "no_such_field"),
        ({"epsilon_is_high": -1.0}, "epsilon_is_high is -1.0, expected a positive number"),
        ({"tasks": None}, "got none of tasks, reasoning_gym and dataset, expected one"),
        ({"dataset": "absent.jsonl"}, "got tasks and dataset of tasks, reasoning_gym and dataset, expected one"),
        ({"tasks": ["algebra"]}, "task is 'algebra', expected one of"),
        ({"tasks": None, "dataset": "absent.jsonl"}, "dataset is 'absent.jsonl', and no such file exists"),
        ({"reward_funcs": ["nice"]}, "reward_funcs has 'nice', expected one of correctness, format, math_verify or"),
        ({"reward_funcs": ["no_module:f"]}, "reward_funcs has 'no_module:f', which cannot be imported"),
        ({"reward_funcs": ["os:sep"]}, "reward_funcs has 'os:sep', which is a str, expected a function"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ],
)
def test_bad_settings_are_one_line(
    tmp_path: Path, settings: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimax_plugin.cli.train import run_program

    values = yaml.safe_load((ROOT / "examples/cispo_recipes/tiny_cpu.yaml").read_text(encoding="utf-8")) | settings
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    assert run_program(["cispo", str(path)]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("minimax-plugin train: ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_settings(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    import minimax_plugin.hf_modeling.modeling_minimax_m1 as modeling

    config = load_config_from_file(str(ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    if name == "fsdp2":
        layer = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert layer in modeling.MiniMaxM1ForCausalLM._no_split_modules
