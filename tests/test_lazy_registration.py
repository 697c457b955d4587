# SPDX-License-Identifier: Apache-2.0
"""Importing the package registers with transformers in every order, and costs nothing where nobody uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_plugin.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "vllm", "numpy", "safetensors", "tokenizers", "huggingface_hub")
PRINT_HEAVY = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"

#: What the auto classes resolve, asked of the mappings that all of them read.
RESOLVES = """
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING
config_class = CONFIG_MAPPING["minimax_m1"]
print(MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__name__, TOKENIZER_MAPPING[config_class].__name__)
"""


def run_python(script: str, *, first_on_path: Path | None = None) -> str:
    paths = [str(path) for path in (first_on_path, ROOT) if path is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.parametrize(
    "module", ["minimax_plugin", "minimax_plugin.checkpoint", "minimax_plugin.architecture", "minimax_plugin.templates"]
)
def test_pure_modules_import_nothing_heavy(module: str) -> None:
    assert run_python(f"import {module}; {PRINT_HEAVY}") == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["doctor", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import contextlib, io\nfrom minimax_plugin.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        f"    main({arguments})\n"
        f"{PRINT_HEAVY}\nassert 'minimax-plugin' in out.getvalue()"
    )
    assert run_python(script) == "[]"


def test_version_and_module_entry() -> None:
    from minimax_plugin import __version__

    command = [sys.executable, "-m", "minimax_plugin", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"minimax-plugin {__version__}\n")
    assert {"doctor", "run", "tiny"} <= COMMANDS.keys()


@pytest.mark.parametrize(
    "imports",
    [
        "import minimax_plugin.checkpoint",
        "from transformers import AutoModelForCausalLM, AutoTokenizer; import minimax_plugin",
        "import pickle; pickle.loads(b'cminimax_plugin.hf_modeling.configuration_minimax_m1\\nMiniMaxM1Config\\n.')",
        pytest.param("import minimax_plugin.hf_modeling.modeling_minimax_m1", marks=pytest.mark.slow),
        pytest.param("import minimax_plugin, accelerate, peft, trl", marks=pytest.mark.slow),
        pytest.param("import minimax_plugin, vllm", marks=pytest.mark.slow),
    ],
)
def test_every_order_of_imports_registers(imports: str) -> None:
    for name in re.findall(r"accelerate|peft|trl|vllm", imports):
        pytest.importorskip(name)
    assert "MiniMaxM1ForCausalLM MiniMaxM1Tokenizer" in run_python(f"{imports}\n{RESOLVES}").splitlines()


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with a package called transformers that says when it is executed and that nothing registers with."""
    (tmp_path / "transformers.py").write_text("print('executed')\n__version__ = '0'\n")
    return tmp_path


def test_asking_for_the_library_does_not_import_it(stub: Path) -> None:
    """``find_spec`` is how libraries ask whether transformers is installed, several times over."""
    script = (
        "import minimax_plugin, importlib.util, sys\n"
        "specs = [importlib.util.find_spec('transformers') for _ in range(3)]\n"
        "assert all(spec.origin.endswith('transformers.py') for spec in specs), specs\n"
        "assert importlib.util.find_spec('no_such_library') is None\n"
        "print('transformers' in sys.modules)"
    )
    assert run_python(script, first_on_path=stub) == "False"


def test_the_library_keeps_its_loader_and_nothing_stays_behind(stub: Path) -> None:
    script = (
        "import sys\nbefore = list(sys.meta_path)\nimport minimax_plugin\nassert sys.meta_path != before\n"
        "import transformers\n"
        "from importlib.machinery import SourceFileLoader\n"
        "assert type(transformers.__spec__.loader) is SourceFileLoader\n"
        "assert sys.meta_path == before"
    )
    said = run_python(script, first_on_path=stub)
    assert said.startswith("executed") and said.count("executed") == 1


def test_a_failure_is_a_warning_that_names_the_doctor(stub: Path) -> None:
    said = run_python("import minimax_plugin, transformers; print('went on')", first_on_path=stub)
    assert "went on" in said
    assert "MiniMax-M1 is unknown to transformers (ImportError: cannot import name" in said
    assert "run `minimax-plugin doctor`" in said


def test_an_absent_library_is_absent(tmp_path: Path) -> None:
    """The finder must not turn the error of a machine without transformers into one of its own."""
    script = (
        "import sys, minimax_plugin\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != 'PathFinder']\n"
        "try:\n    import transformers\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert run_python(script, first_on_path=tmp_path) == "No module named 'transformers'"
