# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="the trainer needs trl: pip install 'minimax-plugin[train]'")

from resume_process import make_trainer  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from minimax_plugin.cispo.checkpoint import UNFINISHED_DIR, load_weights  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 9  # two rollouts of four updates and the first update of the third


def settings(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    config = {"max_steps": UPDATES, "save_strategy": "steps", "save_steps": 3} | changes.pop("config", {})
    return {"model": str(model), "output_dir": str(output), "config": config} | changes


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def whole(tiny_m1_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An uninterrupted run with a checkpoint after every update."""
    output = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(settings(tiny_m1_dir, output, config={"save_steps": 1}))
    trainer.train()
    return output, weights(trainer)


@pytest.mark.parametrize("step", [4, 6], ids=["between-rollouts", "within-a-rollout"])
def test_resumed_run_is_bit_equal(
    tiny_m1_dir: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, step: int
) -> None:
    output, expected = whole
    trainer = make_trainer(settings(tiny_m1_dir, tmp_path, config={"save_strategy": "no"}))
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
    assert trainer.state.global_step == UPDATES
    assert difference(weights(trainer), expected) == 0.0
    assert trainer.prompt_pool.state_dict() == {"position": 0, "solved": []}


@pytest.mark.parametrize("method", ["_load_from_checkpoint", "_load_rollout"])
def test_without_our_loading_the_weights_differ(
    tiny_m1_dir: Path,
    whole: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """What the tests above would say of transformers' own loading, and of a rollout that is not restored."""
    output, expected = whole
    trainer = make_trainer(settings(tiny_m1_dir, tmp_path, config={"save_strategy": "no"}))
    if method == "_load_from_checkpoint":
        load = GRPOTrainer._load_from_checkpoint
        monkeypatch.setattr(type(trainer), method, lambda self, path, model=None: load(self, path, model))
    else:
        monkeypatch.setattr(type(trainer), method, lambda self, path: None)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    assert difference(weights(trainer), expected) > 1e-5


def test_loading_restores_every_bit_of_a_model_with_an_fp32_head(tiny_m1_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_m1_dir, dtype=torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, tmp_path)
    for name, value in model.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert model.lm_head.weight.dtype == torch.float32


def test_another_model_is_refused(tiny_m1_dir: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    config = model.config.to_dict() | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    Qwen3ForCausalLM(type(model.config)(**config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds another model: 11 parameters differ, model.layers.2.input_layernorm"):
        load_weights(model, tmp_path)


def test_rollouts_that_do_not_fit_are_refused(
    tiny_m1_dir: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(whole[0] / "checkpoint-6", checkpoint)
    trainer = make_trainer(settings(tiny_m1_dir, tmp_path, config={"save_strategy": "no"}))
    state_file = checkpoint / "rollout_state.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    for name, value in {"num_processes": 2, "steps_per_generation": 8, "num_iterations": 3}.items():
        state_file.write_text(json.dumps(state | {name: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"written with {name} = {value}, this run has {state[name]}"):
            trainer._load_from_checkpoint(str(checkpoint))
    state_file.write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "rollout_0.pt").unlink()
    with pytest.raises(ValueError, match="lacks rollout_0.pt"):
        trainer._load_from_checkpoint(str(checkpoint))


def test_old_checkpoints_go_and_the_newest_stays(tiny_m1_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(settings(tiny_m1_dir, tmp_path, config={"save_steps": 1, "save_total_limit": 2}))
    trainer.train()
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-8", "checkpoint-9"}
    assert not any((tmp_path / UNFINISHED_DIR).iterdir())


def test_best_model_comes_back_whole(tiny_m1_dir: Path, tmp_path: Path) -> None:
    """The best checkpoint is found under its final name, and experts come back with the rest."""
    config = {"save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2}
    extra = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "per_device_eval_batch_size": 4}
    trainer = make_trainer(settings(tiny_m1_dir, tmp_path, config=config | extra))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert saved["best_model_checkpoint"] == str(best)
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    assert difference(weights(trainer), dict(expected.named_parameters())) == 0.0


def run(values: dict[str, Any], folder: Path) -> int:
    file = folder / "settings.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(Path(__file__).with_name("resume_process.py")), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "left"),
    [({"die_after": 5}, "checkpoint-4"), ({"die_after": 7}, "checkpoint-6"), ({"die_while_saving": 6}, "checkpoint-4")],
    ids=["between-rollouts", "within-a-rollout", "while-saving"],
)
def test_killed_and_resumed(
    tiny_m1_dir: Path,
    whole: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    death: dict[str, int],
    left: str,
) -> None:
    output, result = tmp_path / "out", tmp_path / "result.safetensors"
    values = settings(tiny_m1_dir, output, config={"save_steps": 2}, result=str(result))
    assert run(values | death, tmp_path) == -signal.SIGKILL
    assert max(path.name for path in output.glob("checkpoint-*")) == left
    assert not result.exists()
    assert run(values | {"resume": str(output / left)}, tmp_path) == 0
    assert difference(load_file(result), whole[1]) == 0.0
    assert not any((output / UNFINISHED_DIR).iterdir())
