# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin run``: programs that never heard of the plugin run with it, under their own name and arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]

#: Says how it was started and what a Python process that it starts has loaded.
REPORT = """
import json, os, subprocess, sys

def main():
    child = [sys.executable, "-c", "import sys; print('minimax_plugin' in sys.modules, 'torch' in sys.modules)"]
    out = subprocess.run(child, capture_output=True, text=True).stdout.split()
    print(json.dumps({"argv": sys.argv, "name": __name__, "path": sys.path[0], "child": out,
                      "loaded": "minimax_plugin" in sys.modules}))
    return 7
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: a distribution with the command ``planted`` and a module of the same content."""
    folder = tmp_path / "site"
    info = folder / "planted-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "planted_module.py").write_text(f"{REPORT}\nif __name__ == '__main__':\n    sys.exit(main())\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nplanted = planted_module:main\n")
    return folder


def run(site: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-m", "minimax_plugin", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd or site.parent)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 7, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["loaded"]
    assert result["child"] == ["True", "False"], "a child process has the plugin, and pays nothing for it"
    return result


def test_command_of_a_package(site: Path) -> None:
    result = report(run(site, "planted", "sft", "-m", "--help", "--", "x"))
    assert Path(result["argv"][0]).name == "planted"
    assert result["argv"][1:] == ["sft", "-m", "--help", "--", "x"]


def test_module(site: Path) -> None:
    result = report(run(site, "-m", "planted_module", "--help"))
    assert result["argv"] == [str(site / "planted_module.py"), "--help"]
    assert (result["name"], result["path"]) == ("__main__", str(site.parent))


@pytest.mark.parametrize("name", ["script.py", "script"])
def test_script(name: str, site: Path, tmp_path: Path) -> None:
    script = tmp_path / "folder" / name
    script.parent.mkdir()
    (site / "planted_module.py").rename(script)
    result = report(run(site, f"folder/{name}", "-x"))
    assert result["argv"] == [f"folder/{name}", "-x"]
    assert (result["name"], result["path"]) == ("__main__", str(script.parent))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "nothing to run"),
        (["-m"], "nothing to run"),
        (["no_such_program"], "'no_such_program' is no file and no command of an installed package"),
        (["no_such.py"], "'no_such.py' is no file"),
        (["-m", "no_such.module"], "there is no module 'no_such.module'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], problem: str, site: Path) -> None:
    done = run(site, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"minimax-plugin run: {problem}; expected minimax-plugin run ")
    assert done.stderr.count("\n") == 1


def test_traceback_and_status_of_the_program_are_its_own(site: Path, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit('a reason')\n")
    done = run(site, str(tmp_path / "fails.py"))
    assert (done.returncode, done.stderr) == (1, "a reason\n")


def test_site_customisation_of_the_user_still_runs_in_children(site: Path) -> None:
    (site / "sitecustomize.py").write_text("import sys; sys.customised = True\n")
    (site / "planted_module.py").write_text(
        "import subprocess, sys\n"
        "def main():\n"
        "    script = 'import sys; print(sys.customised, \"minimax_plugin\" in sys.modules)'\n"
        "    return subprocess.run([sys.executable, '-c', script]).returncode\n"
    )
    done = run(site, "planted")
    assert (done.returncode, done.stdout) == (0, "True True\n")


def test_a_program_that_never_heard_of_the_plugin_loads_the_model(site: Path, tmp_path: Path) -> None:
    options = TinyOptions(num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=16, rotary_dim=8)
    write_tiny_checkpoint(tmp_path / "model", options)
    (tmp_path / "program.py").write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)\n"
    )
    done = run(site, str(tmp_path / "program.py"), str(tmp_path / "model"))
    assert done.stdout == "minimax_plugin.hf_modeling.modeling_minimax_m1\n", done.stderr


@pytest.mark.slow
def test_trl_trains_the_model(site: Path, tmp_path: Path) -> None:
    """Its command starts another process, which trains."""
    pytest.importorskip("trl")
    options = TinyOptions(num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=16, rotary_dim=8)
    write_tiny_checkpoint(tmp_path / "model", options)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "a", "completion": "b c"}, {"prompt": "d", "completion": "e f"}]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    done = run(site, "trl", "sft", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MiniMaxM1ForCausalLM"]
