# SPDX-License-Identifier: Apache-2.0
"""What the Markdown files point to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minimax_plugin.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "examples").glob("**/*.md")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8"))
    targets = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    missing = [target for target in targets if not (file.parent / target).exists()]
    assert not missing


def test_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"minimax-plugin ([a-z]+) ", readme)) <= COMMANDS.keys()
    scripts = re.findall(r"^bash (scripts/\S+)", readme, flags=re.MULTILINE)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "bash scripts/test.sh" in scripts_of(ci) and "bash scripts/lint.sh" in scripts_of(ci)


def scripts_of(shell: str) -> list[str]:
    return [line.removesuffix(" --slow") for line in shell.splitlines() if line.startswith("bash ")]
