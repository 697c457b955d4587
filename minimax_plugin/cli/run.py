# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin run PROGRAM``: run a Python program that does not import the plugin as if it did.

It runs in this process under its own name and arguments. Python processes that it starts, as ``trl`` and
``accelerate launch`` do, have the plugin too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import minimax_plugin

USAGE = "minimax-plugin run [-m MODULE | SCRIPT | PROGRAM] [ARGUMENT ...]"

EPILOG = (
    "PROGRAM is the command of an installed package (trl, lm_eval), SCRIPT a file, MODULE what python -m takes. "
    "Everything after it is passed on. Example: minimax-plugin run trl sft --model_name_or_path DIR ..."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For ``--help`` alone; see :func:`run_program`."""
    parser.usage = USAGE
    parser.epilog = EPILOG


def run_program(argv: Sequence[str]) -> Any:
    """Run ``[-m MODULE | SCRIPT | PROGRAM] [ARGUMENT ...]`` and return what ``sys.exit`` is to be given.

    Raises:
        SystemExit: as the program raises it.
    """
    if not argv or list(argv) == ["-m"]:
        return _wrong_usage("nothing to run")
    _reach_children()
    if argv[0] == "-m":
        return _run_module(argv[1], argv[2:])
    name, arguments = argv[0], argv[1:]
    is_path = os.sep in name or name.endswith(".py")
    if not is_path:
        for point in metadata.entry_points(group="console_scripts", name=name):
            return _run_entry_point(point, arguments)
    if Path(name).exists():
        return _run_script(name, arguments)
    return _wrong_usage(f"{name!r} is no file" + ("" if is_path else " and no command of an installed package"))


def _run_module(module: str, arguments: Sequence[str]) -> int:
    _put_first_on_path(os.getcwd())
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return _wrong_usage(f"there is no module {module!r}")
    sys.argv = ["-m", *arguments]  # runpy puts the file of the module in front
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _run_script(script: str, arguments: Sequence[str]) -> None:
    _put_first_on_path(os.path.dirname(os.path.realpath(script)))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _run_entry_point(point: metadata.EntryPoint, arguments: Sequence[str]) -> Any:
    folder = sysconfig.get_path("scripts")
    _put_first_on_path(folder)
    sys.argv = [shutil.which(point.name) or os.path.join(folder, point.name), *arguments]
    return point.load()()


def _put_first_on_path(folder: str) -> None:
    """Where Python itself would have put it: the first entry is this program's own."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _reach_children() -> None:
    folder = os.path.join(os.path.dirname(os.path.abspath(minimax_plugin.__file__)), "autoload")
    inherited = os.environ.get("PYTHONPATH", "")
    if folder not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{inherited}" if inherited else folder


def _wrong_usage(problem: str) -> int:
    print(f"minimax-plugin run: {problem}; expected {USAGE}", file=sys.stderr)
    return 2
