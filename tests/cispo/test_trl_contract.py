# SPDX-License-Identifier: Apache-2.0
"""The parts of TRL that the trainer replaces or relies on are those it was written against.

TRL calls them private. A failure names what has changed: read it beside our method, run the tests of the trainer with
that TRL, then add its fingerprints here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from typing import Any

import pytest
import trl
from packaging.version import Version
from trl.generation.vllm_generation import VLLMGeneration

from minimax_plugin.cispo import CISPOTrainer
from minimax_plugin.cispo.rollout import ExactVLLMGeneration

#: TRL version -> object -> fingerprint of its source.
KNOWN: dict[str, dict[str, str]] = {
    "1.16.0": {
        "trl.trainer.grpo_trainer:GRPOTrainer.__init__": "00185a948ec1e88f",
        "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": "ebcdf099b720e0b1",
        "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": "0fa47053e69b5847",
        "trl.trainer.grpo_trainer:GRPOTrainer._generate": "33ec69a68a5949e6",
        "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": "4e80ae958e5da4c5",
        "trl.trainer.grpo_trainer:GRPOTrainer._generate_single_turn": "f84edce5a604171f",
        "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies": "cb3259177d76d201",
        "trl.trainer.grpo_trainer:GRPOTrainer._get_train_sampler": "32577f4c28bf47dd",
        "trl.trainer.grpo_trainer:GRPOTrainer._load_optimizer_and_scheduler": "59c16c6d1d66b94d",
        "trl.trainer.grpo_trainer:GRPOTrainer._prepare_inputs": "0b769b55fe83e200",
        "trl.trainer.grpo_trainer:GRPOTrainer._save_checkpoint": "e1179698f93075ef",
        "trl.trainer.grpo_trainer:GRPOTrainer.compute_loss": "f6432847a6b88299",
        "trl.trainer.grpo_trainer:GRPOTrainer.get_high_entropy_mask": "aa5a5659d64b6e0c",
        "trl.trainer.grpo_trainer:GRPOTrainer.get_off_policy_mask": "33bcdeefa248bb76",
        "trl.trainer.grpo_trainer:GRPOTrainer.get_train_dataloader": "4cb511ad431bcfc9",
        "trl.trainer.grpo_trainer:GRPOTrainer.log": "27dc3f9fd82e047b",
        "trl.trainer.grpo_trainer:GRPOTrainer.prediction_step": "5c086f1ae62f7f1d",
        "trl.trainer.grpo_trainer:GRPOTrainer.training_step": "ebd7e9890e2e43dc",
        "trl.trainer.grpo_config:GRPOConfig.__post_init__": "8a5fb2e42bd0d9c3",
        "trl.trainer.utils:add_fused_lm_head": "bde240055785473a",
        "trl.trainer.utils:get_callable_name": "201b8c44976735c7",
        "trl.trainer.utils:is_async_callable": "27fc54a379c4c250",
        "trl.trainer.utils:shuffle_sequence_dict": "5604c86925ca53c2",
        "trl.trainer.utils:split_tensor_dict": "067a3e25a1028603",
        "trl.trainer.utils:FusedCausalLMOutput": "da89671d26c18828",
        "trl.generation.vllm_generation:VLLMGeneration.__init__": "ae2ba37ad4d6e662",
        "trl.generation.vllm_generation:VLLMGeneration._init_vllm": "143e0150ee5dbd13",
        "trl.generation.vllm_generation:VLLMGeneration._iter_named_params": "ac48d5b3fc6bf5b8",
        "trl.generation.vllm_generation:VLLMGeneration.generate": "9af70c1eb3cac991",
        "trl.generation.vllm_generation:VLLMGeneration.sync_weights": "409ac0ef3f85ae62",
    },
}

NEWEST = max(KNOWN, key=Version)
VERSION = trl.__version__ if trl.__version__ in KNOWN else NEWEST


def fingerprint(source: str) -> str:
    """Hash of source text without comments, docstrings and empty lines; the same on every Python."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            end = text.end_lineno or text.lineno
            lines[text.lineno - 1 : end] = [""] * (end - text.lineno + 1)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def resolve(name: str) -> Any:
    module, _, attributes = name.partition(":")
    target: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        target = getattr(target, attribute)
    return inspect.unwrap(target)


@pytest.mark.parametrize("name", KNOWN[VERSION])
def test_trl_is_as_it_was(name: str) -> None:
    assert fingerprint(inspect.getsource(resolve(name))) == KNOWN[VERSION][name], (
        f"{name} of TRL {trl.__version__} is not that of {VERSION}, which the trainer was written against"
    )


def overridden(ours: type, theirs: type) -> set[str]:
    """Methods of TRL's class that a class of this package replaces."""
    own = [cls for cls in ours.__mro__ if cls.__module__.startswith("minimax_plugin.")]
    assert own
    return {
        name for cls in own for name, member in vars(cls).items() if inspect.isfunction(member) and name in vars(theirs)
    }


def test_every_overridden_method_is_listed() -> None:
    listed = set(KNOWN[NEWEST])
    methods = overridden(CISPOTrainer, trl.GRPOTrainer)
    assert {"_compute_loss", "_calculate_rewards", "log"} <= methods
    assert {f"trl.trainer.grpo_trainer:GRPOTrainer.{name}" for name in methods} <= listed
    methods = overridden(ExactVLLMGeneration, VLLMGeneration)
    assert "sync_weights" in methods
    assert {f"trl.generation.vllm_generation:VLLMGeneration.{name}" for name in methods} <= listed


ORIGINAL = '''
    def area(a: int) -> int:
        """Says something."""
        return a * a  # and why
'''


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("Says something.", "Says\n    something else.\n    ", True),
        ("  # and why", "", True),
        ("        return", "        # a reason\n\n        return", True),
        ("        return", "        if a:\n            return", False),
        ("a * a", "a * (a)", False),
        ("a: int", "a: float", False),
        ("a * a", "a * '#'", False),
    ],
)
def test_fingerprints_are_of_what_runs(old: str, new: str, same: bool) -> None:
    changed = ORIGINAL.replace(old, new)
    assert changed != ORIGINAL
    assert (fingerprint(changed) == fingerprint(ORIGINAL)) is same
